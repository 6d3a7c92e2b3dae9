"""Generation: diffusion sampling and infilling, causal sampling."""

from stackwise.generation.generate import generate

__all__ = ["generate"]
