"""Pictures of a run: training and validation loss over tokens, written as PNG."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from stackwise.runs import RunStore


def plot_losses(runs: Mapping[str, pathlib.Path], file: pathlib.Path, title: str) -> pathlib.Path:
    """Draws the loss curves of ``runs`` ({label: run folder}) into ``file`` (PNG).

    The x axis is tokens summed over the stages; dots are validation losses at stage ends. Losses
    of stages with different mask fractions are not comparable with each other: the bound that
    ``stackwise eval`` prints is.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=130)
    for color, (label, path) in zip(_colors(plt), runs.items(), strict=False):
        curve, dots = _series(RunStore.open(path).read_metrics())
        if curve:
            axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.4, label=label)
        if dots:
            axes.scatter(*zip(*dots, strict=True), color=color, s=18, zorder=3)
    axes.set_xlabel("training tokens, summed over stages")
    axes.set_ylabel("loss (nats per maskable token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if len(runs) > 1:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
    return file


def _colors(plt: Any) -> list[str]:
    return plt.rcParams["axes.prop_cycle"].by_key()["color"]


Points = list[tuple[float, float]]


def _series(metrics: list[dict[str, Any]]) -> tuple[Points, Points]:
    """(tokens, loss) of every training line, and (tokens, validation loss) of every stage."""
    curve: Points = []
    dots: Points = []
    before, here, stage = 0, 0, 0
    for record in metrics:
        if record["stage"] != stage:
            before, here, stage = before + here, 0, record["stage"]
        if "loss" in record:
            here = record["tokens"]
            curve.append((before + here, record["loss"]))
        if "validation_loss" in record:
            dots.append((before + here, record["validation_loss"]))
    return curve, dots
