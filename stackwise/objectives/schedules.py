"""Which mask rates each stage trains on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stackwise.config import ConfigError, ObjectiveConfig

_TIME_STEP_MAX = 0.85


@dataclass(frozen=True)
class MaskPlan:
    """The mask rates of a stage: t is drawn from [low, high]; equal ends are one fixed rate."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(
                f"MaskPlan needs 0 <= low <= high <= 1, got low={self.low}, high={self.high}"
            )


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "exponential": lambda p: math.expm1(p) / math.expm1(1.0),
    "cosine": lambda p: (1.0 - math.cos(math.pi * p)) / 2.0,
}


def scheduled_fractions(schedule: str, low: float, high: float, n_stages: int) -> list[float]:
    """One mask fraction per stage, low + g(p) (high - low) with p = k / (n_stages - 1).

    g(p) is p (linear), (e^p - 1) / (e - 1) (exponential) or (1 - cos pi p) / 2 (cosine). A single
    stage uses ``low``.
    """
    if schedule not in _SHAPES:
        raise ValueError(f"schedule must be one of {', '.join(_SHAPES)}, got {schedule!r}")
    shape = _SHAPES[schedule]
    last = max(n_stages - 1, 1)
    return [low + shape(k / last) * (high - low) for k in range(n_stages)]


def time_step_fractions(config: ObjectiveConfig) -> list[float]:
    """The mask fraction of every time bin, ascending.

    ``config.time_step_mask_fractions`` is a list (one fraction per bin), a mapping {bin: fraction}
    that is interpolated linearly over bins 0..max(num_time_steps - 1, largest bin) and held
    constant outside its bins, or None: ``num_time_steps`` equal steps from ``mask_fraction_min`` to
    0.85. Raises ``ConfigError`` when a fraction is outside (0, 1] or the bins do not ascend.
    """
    given = config.time_step_mask_fractions
    name = "objective.time_step_mask_fractions"
    if given is None:
        steps = max(config.num_time_steps - 1, 1)
        low, high = config.mask_fraction_min, max(_TIME_STEP_MAX, config.mask_fraction_min)
        fractions = [low + (high - low) * k / steps for k in range(config.num_time_steps)]
    elif isinstance(given, Mapping) and given:
        fractions = _interpolated(given, config.num_time_steps, name)
    elif isinstance(given, Sequence) and not isinstance(given, str) and given:
        fractions = [_number(value, name) for value in given]
    else:
        raise ConfigError(f"{name} must be a list of fractions or {{bin: fraction}}, got {given!r}")
    if not all(0.0 < f <= 1.0 for f in fractions):
        raise ConfigError(f"{name} must lie in (0, 1], got {fractions}")
    if any(later < earlier for earlier, later in itertools.pairwise(fractions)):
        raise ConfigError(f"{name} must ascend, got {fractions}")
    return fractions


def _number(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must hold numbers, got {value!r}") from None


def _interpolated(given: Mapping, num_time_steps: int, name: str) -> list[float]:
    points = sorted((_number(key, name), _number(value, name)) for key, value in given.items())
    if any(key < 0 or key != int(key) for key, _ in points):
        raise ConfigError(f"{name} must have bins 0, 1, 2, ... as keys, got {list(given)}")
    n_bins = max(num_time_steps, int(points[-1][0]) + 1)
    fractions = []
    for k in range(n_bins):
        below = [point for point in points if point[0] <= k] or points[:1]
        above = [point for point in points if point[0] >= k] or points[-1:]
        (x0, y0), (x1, y1) = below[-1], above[0]
        fractions.append(y0 if x1 <= x0 else y0 + (y1 - y0) * (k - x0) / (x1 - x0))
    return fractions


def stage_mask_plans(config: ObjectiveConfig, n_stages: int) -> list[MaskPlan]:
    """The mask plan of each of ``n_stages`` stages.

    - clm masks nothing: (0, 0).
    - time_step_masking: stage k uses the fraction of bin min(k, last bin).
    - mask_schedule linear, exponential, cosine: one fixed fraction per stage.
    - mask_schedule random: the range [mask_fraction_min, mask_fraction_max] in every stage for
      diffusion, ``mlm_probability`` for mlm.
    """
    if n_stages < 1:
        raise ValueError(f"n_stages must be at least 1, got {n_stages}")
    if config.type == "clm":
        return [MaskPlan(0.0, 0.0)] * n_stages
    low, high = config.mask_fraction_min, config.mask_fraction_max
    if config.time_step_masking:
        bins = time_step_fractions(config)
        fractions = [bins[min(k, len(bins) - 1)] for k in range(n_stages)]
    elif config.mask_schedule != "random":
        fractions = scheduled_fractions(config.mask_schedule, low, high, n_stages)
    elif config.type == "mlm":
        fractions = [config.mlm_probability] * n_stages
    else:
        return [MaskPlan(low, high)] * n_stages
    return [MaskPlan(fraction, fraction) for fraction in fractions]
