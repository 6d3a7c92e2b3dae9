"""The demo, shrunk: every mode trains, is evaluated, and ends up in the report."""

from __future__ import annotations

import json
import pathlib

import pytest

from stackwise import demo

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
    "training.max_steps=8",
    "data.num_samples=300",
    "evaluation.max_rows=8",
    "model.d_model=32",
]


@pytest.mark.slow
def test_demo_reports_every_mode(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = [part for setting in SMALL for part in ("--set", setting)]
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert demo.main(["--config", config, "--out", str(tmp_path), *settings]) == 0
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    report = (folder / "report.md").read_text()
    assert [result["mode"] for result in results] == list(demo.MODES)
    assert len({result["tokens"] for result in results}) == 1
    assert results[0]["cache_seconds"] > 0
    assert results[-1]["cache_seconds"] < 0.01
    for result in results:
        row = demo.ModeResult(**result).cells()
        assert " | ".join(row) in report
        assert row[1] in printed
    assert (folder / "loss_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "->" in report
