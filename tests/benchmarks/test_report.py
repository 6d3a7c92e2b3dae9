"""docs/benchmarks.md: true to the results files, and the pictures that go with it."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks import plots, records, report

ROOT = pathlib.Path(report.__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def row(provider: str, mode: str, value: float, metric=("speed", "ms"), x: float = 64.0):
    extra = {"series": "bf16"} if metric[1] != "x all rows" else {}
    return records.make_row(
        "op", provider, mode, [value], metric=metric, x=("D", "width", x), extra=extra
    )


def rows() -> list[records.Row]:
    found = []
    for x in (64.0, 128.0):
        found += [
            row("stackwise-torch", "gate", 0.5, ("correctness", "error / bound"), x),
            row("eager", "gate", 3.0, ("correctness", "error / bound"), x),
            row("cce", "gate", float("inf"), ("correctness", "error / bound"), x),
            row("stackwise-torch", "full", x / 32, x=x),
            row("stackwise-torch", "full", 80.0, ("bandwidth", "% of copy"), x),
            row("stackwise-torch", "full", 1.5, ("memory", "MB"), x),
            row("eager", "full", 5.0, x=x),
            row("eager", "full", 8.0, ("cpu", "ms"), x),
        ]
    return found


def test_the_page_is_what_the_files_say() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.render(), "run `make plots`"


def test_every_results_file_is_on_the_page_with_its_picture() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.devices(), "no results"
    for device in report.devices():
        for file in (records.RESULTS / device).glob("*.csv"):
            measured = records.read_csv(file)
            assert f"### {measured[0].kernel_name}\n" in page
            if report.Results(measured).cells():
                assert report.picture_of(device, file.stem).read_bytes().startswith(PNG)


def test_ratios_are_theirs_over_ours(tmp_path: pathlib.Path) -> None:
    records.write_csv(rows(), tmp_path / "cpu" / "op.csv")
    page = report.render(tmp_path)
    assert "| case | x | mode | ours | ms | % of roof | MB | × eager |" in page
    assert "| bf16 | D=64 | full | torch | 2 | 80 | 1.5 | 2.5 |" in page
    assert "| bf16 | D=128 | full | torch | 4 | 80 | 1.5 | 1.25 |" in page
    assert "eager is outside the error rule in 2 of the cases, timed all the same: up to 3" in page
    assert "cce is outside the error rule in 2 of the cases, not timed: NaN or no result." in page
    assert "stackwise-torch is outside" not in page
    assert "processors at work during a call: 1.60." in page


def test_files_of_another_form_are_listed_as_they_are(tmp_path: pathlib.Path) -> None:
    records.write_csv(
        [row("stackwise", "loss", 0.25, ("ratio", "x all rows"))], tmp_path / "d/m.csv"
    )
    assert "| loss | stackwise | D=64 | 0.25 | 0.25 to 0.25 | x all rows |" in report.render(
        tmp_path
    )


def test_pictures_show_every_provider(tmp_path: pathlib.Path, monkeypatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        plots, "_panel", lambda axes, results, series, what: drawn.append(f"{series} {what}")
    )
    file = plots.draw(report.Results(rows()), tmp_path / "new" / "op.png")
    assert file.read_bytes().startswith(PNG)
    assert drawn == ["bf16 ms", "bf16 % of roof"]


def test_a_panel_has_a_line_per_provider() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    plots._panel(axes, report.Results(rows()), "bf16", "ms")
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"stackwise-torch": [2.0, 4.0], "eager": [5.0, 5.0]}
    plt.close(figure)
