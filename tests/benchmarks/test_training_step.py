"""The training-step bench: its gate catches a wrong side, its rows carry the documented columns."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import pytest
import torch

from benchmarks import bench_training_step as bench
from benchmarks import records, runner

SMALL = bench.Shape(batch=2, length=32, d_model=64, n_layers=2, n_heads=2, vocab=211)


def test_both_sides_compute_the_same_loss_and_gradients():
    bench.check_same_loss(SMALL, bench.Problem(SMALL))


def test_the_gate_catches_a_side_that_attends_causally(monkeypatch):
    build = bench.huggingface_model

    def causal(shape):
        model = build(shape)
        forward = model.forward

        def masked(input_ids, attention_mask):
            return forward(input_ids, attention_mask=attention_mask.tril())

        model.forward = masked
        return model

    monkeypatch.setattr(bench, "huggingface_model", causal)
    with pytest.raises(AssertionError):
        bench.check_same_loss(SMALL, bench.Problem(SMALL))


def test_steps_of_every_mode_lower_their_loss(tmp_path):
    problem = bench.Problem(SMALL)
    for (provider, mode), step in bench._steps(SMALL, problem, tmp_path).items():
        losses = [step() for _ in range(12)]
        assert losses[-1] < losses[0], (provider, mode)


def test_rows_have_the_documented_columns_and_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "Shape", lambda **kwargs: SMALL)
    monkeypatch.setattr(runner, "results_file", lambda name: tmp_path / f"{name}.csv")
    assert runner.main(["training-step", "--json", "--quick"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(list(row) == records.COLUMNS for row in rows)
    speeds = {
        (row["kernel_provider"], row["kernel_operation_mode"]): row["y_value_50"]
        for row in rows
        if (row["metric_name"], row["metric_unit"]) == ("speed", "tokens/s")
    }
    assert {
        ("huggingface", "end_to_end"),
        ("stackwise", "end_to_end"),
        ("stackwise", "layerwise_cached"),
        ("stackwise", "layerwise_cached_frozen_head"),
    } == set(speeds)
    assert all(speed > 0 for speed in speeds.values())
    assert not list(tmp_path.iterdir()), "a quick run leaves no results file"


def test_ratio_is_peer_time_over_ours():
    rows = bench._rows(SMALL, "stackwise", "end_to_end", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0])
    assert [row.y_value_50 for row in rows] == [SMALL.tokens / 2.0, 2.0]


def test_csv_round_trips(tmp_path):
    row = records.make_row(
        "op", "stackwise", "forward", [3.0, 1.0, 2.0], metric=("speed", "ms"), x=("N", "rows", 8),
        extra={"dtype": "bf16"},
    )  # fmt: skip
    assert (row.y_value_20, row.y_value_50, row.y_value_80) == pytest.approx((1.4, 2.0, 2.6))
    file = tmp_path / "new" / "op.csv"
    records.write_csv([row], file)
    with file.open() as handle:
        (read,) = csv.DictReader(handle)
    assert read == {name: str(value) for name, value in dataclasses.asdict(row).items()}
    assert read["torch_version"] == torch.__version__


def test_results_are_kept_per_device():
    assert records.results_file("training-step").parent.name == "cpu"
    assert records.results_file("training-step").name == "training_step.csv"


def test_an_unknown_bench_is_named(capsys):
    assert runner.main(["speed-of-light"]) == 2
    assert "speed-of-light" in capsys.readouterr().err


def test_every_bench_module_can_be_run_by_name():
    assert "training-step" in runner.names()
    folder = pathlib.Path(bench.__file__).parent
    assert len(runner.names()) == len(list(folder.glob("bench_*.py")))
