"""metrics.jsonl survives kills and resumes without losing, doubling or inventing a line."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

from stackwise.runs.errors import RunError
from stackwise.runs.metrics import MetricsLog


def log_of(path, steps) -> MetricsLog:
    log = MetricsLog(path / "metrics.jsonl")
    for step in steps:
        log.append({"step": step, "loss": step / 3})
    return log


def steps_in(log: MetricsLog) -> list[int]:
    return [record["step"] for record in log.read()]


def test_records_come_back_exactly_and_in_order(tmp_path):
    log = log_of(tmp_path, range(5))
    assert log.read() == [{"step": n, "loss": n / 3} for n in range(5)]


def test_lines_are_strict_json_even_for_nan_numpy_and_tensors(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.append({"a": float("nan"), "b": np.float32(0.5), "c": torch.tensor(3), "d": [np.inf, (1,)]})
    strict = json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": None, "b": 0.5, "c": 3, "d": [None, [1]]}


def test_half_written_last_line_is_ignored_then_separated_from_the_next(tmp_path):
    log = log_of(tmp_path, range(3))
    with open(log.path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert steps_in(log) == [0, 1, 2]
    log.append({"step": 4})
    with pytest.warns(UserWarning, match="line 4, is not a complete record"):
        assert steps_in(log) == [0, 1, 2, 4]


def test_truncation_drops_later_steps_and_the_half_written_line(tmp_path):
    log = log_of(tmp_path, range(10))
    with open(log.path, "ab") as file:
        file.write(b'{"step": 1')
    assert log.truncate(6) == 3
    assert steps_in(log) == [0, 1, 2, 3, 4, 5, 6]
    assert log.path.read_bytes().endswith(b"}\n")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncation_keeps_records_without_a_step(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.append({"note": "start"})
    log.append({"step": 9})
    assert log.truncate(0) == 1
    assert log.read() == [{"note": "start"}]


def test_truncation_is_atomic(tmp_path, monkeypatch):
    log = log_of(tmp_path, range(5))
    before = log.path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="disk filled up"):
        log.truncate(2)
    assert log.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_missing_log_reads_empty(tmp_path):
    log = MetricsLog(tmp_path / "m")
    assert log.read() == []
    assert log.truncate(3) == 0


def test_full_disk_while_appending_is_a_run_error():
    with pytest.raises(RunError, match="disk filled up while writing /dev/full"):
        MetricsLog("/dev/full").append({"step": 1})
