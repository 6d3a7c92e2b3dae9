"""Configuration of a run: dataclasses, YAML loading, cross-field rules."""

from stackwise.config.errors import ConfigError
from stackwise.config.schema import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    RunConfig,
    StackWiseConfig,
    TokenizerEmbeddingConfig,
    TrainingConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RunConfig",
    "StackWiseConfig",
    "TokenizerEmbeddingConfig",
    "TrainingConfig",
]
