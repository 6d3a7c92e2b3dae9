"""Evaluation: likelihood bounds, perplexities and accuracies, each with its interval."""

from stackwise.evaluation.evaluate import evaluate
from stackwise.evaluation.intervals import Estimate

__all__ = ["Estimate", "evaluate"]
