"""Pictures of a results file: ms and share of the roof over size, a line per provider."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Results

MODE = "full"  # forward and backward, what a training step pays
COLUMNS = 4  # series beside each other at most


def draw(results: Results, file: Path) -> Path:
    """Writes ``file`` (PNG): per series of cases, above ms, below % of the roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = list(dict.fromkeys(key[0] for key in results.cells()))
    columns = min(COLUMNS, len(series))
    lines = -(-len(series) // columns)
    figure, grid = plt.subplots(
        2 * lines, columns, figsize=(max(5.0, 3.4 * columns), 4.6 * lines), dpi=110, squeeze=False
    )
    for index, name in enumerate(series):
        top, column = 2 * (index // columns), index % columns
        _panel(grid[top][column], results, name, "ms")
        _panel(grid[top + 1][column], results, name, "% of roof")
        grid[top][column].set_title(name, fontsize=9)
    for index in range(len(series), lines * columns):
        for row in (0, 1):
            grid[2 * (index // columns) + row][index % columns].set_axis_off()
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    first = results.rows[0]
    figure.suptitle(f"{first.kernel_name}, forward + backward\n{first.gpu_name}", fontsize=10)
    figure.legend(
        handles.values(), handles, loc="lower center", ncols=max(1, 2 * columns), fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 0.97))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
    return file


def _panel(axes, results: Results, series: str, what: str) -> None:  # type: ignore[no-untyped-def]
    keys = sorted(key for key in results.cells() if key[0] == series and key[2] == MODE)
    for number, provider in enumerate(results.providers()):
        points = [
            (key[1], value)
            for key in keys
            if (value := results.get(key, provider, "speed", "ms") if what == "ms"
                else results.share(key, provider)) is not None
        ]  # fmt: skip
        if points:
            ours = provider.startswith("stackwise")
            axes.plot(
                *zip(*points, strict=True),
                label=provider,
                color=f"C{number}",
                marker="o" if ours else "x",
                linewidth=2.0 if ours else 1.0,
            )
    values = [key[1] for key in keys]
    if values and max(values) > min(values):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    row = next(row for row in results.rows if row.kernel_provider != "roofline")
    axes.set_xlabel(row.x_label, fontsize=8)
    axes.set_ylabel(what, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
