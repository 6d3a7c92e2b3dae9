"""`stackwise tune` without a GPU: variants that are wrong, slow, crash or hang get their verdicts,
and nothing they do ends the tuning.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise import cli_inspect, tuning
from stackwise.cli import main
from stackwise.kernels import dispatch, evidence, oracle_cases
from stackwise.kernels.examiner import Examiner
from tests.kernels import examined_variants

SWIGLU, GEGLU = ("swiglu", "cuda"), ("geglu", "cuda")
MACHINE = {"gpu": "Made-up 9", "capability": "sm_90", "driver": "1", **evidence.software()}

Make = Callable[..., tuning.Settings]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Make:
    """Settings for a variant of examined_variants.py, registered here and in the child."""
    registry = {op: dict(variants) for op, variants in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.setattr(oracle_cases, "_cases", dict(oracle_cases._all()))
    monkeypatch.setenv("PYTHONPATH", str(repository))

    def settings(variant: str, *pairs: tuning.Pair, **options: Any) -> tuning.Settings:
        examined_variants.register_all(variant)
        monkeypatch.setenv("EXAMINED_VARIANT", variant)
        command = (sys.executable, str(examined_variants.__file__))
        defaults: dict[str, Any] = {"device": "cpu", "seconds": 60.0, "workers": 1}
        return tuning.Settings(pairs or (SWIGLU,), command=command, **defaults | options)

    return settings


def test_a_crash_loses_only_the_variant_that_crashed(make: Make) -> None:
    records = tuning.prove(make("crash", SWIGLU, GEGLU, dtypes=("fp32",)), 60.0)
    assert records[SWIGLU]["status"].startswith("failed: crashed (SIGABRT) in 1x1 fp32")
    assert records[SWIGLU]["dtypes"] == []
    assert records[GEGLU]["status"] == "validated"
    assert records[GEGLU]["dtypes"] == ["fp32"]
    assert records[GEGLU]["cases"] == 2


def test_a_hang_ends_with_its_time_and_an_error_with_its_process(make: Make) -> None:
    settings = make("hang", SWIGLU, GEGLU, dtypes=("fp32",))
    swiglu, geglu = tuning.shards(settings)
    with Examiner(settings.command) as examiner:
        answers = tuning._prove_shard(examiner, settings, geglu, 60.0)
        assert answers[-1] == {"event": "done", "complete": True}
        first = examiner._child
        task = {"mode": "prove", "op": "swiglu", "variant": "cuda", "device": "cpu"}
        task |= {"dtypes": ["fp32"], "cases": list(swiglu.cases), "seconds": 60.0}
        (failed,) = examiner.run(task, 1.0)
        assert failed == {"event": "failed", "reason": "no answer within 1 s, in 1x1 fp32"}
        assert first is not None
        assert first.poll() is not None
        unknown = dataclasses.replace(geglu, pair=("nothing", "cuda"))
        answers = tuning._prove_shard(examiner, settings, unknown, 60.0)
        assert answers == [{"event": "failed", "reason": "KeyError: 'nothing'"}]
        assert examiner._child is not first
        assert examiner._child.poll() is not None


def test_the_faster_variant_wins_its_class(make: Make) -> None:
    (record,) = tuning.tune(make("fast"))["swiglu"].values()
    assert record["status"] == "validated"
    assert record["dtypes"] == ["bf16"]
    assert record["raced"] == 1
    (figures,) = record["faster"].values()
    assert record["faster"].keys() == {"bf16 tiny"}
    assert figures["torch_ms"] > 5
    assert figures["ms"] < figures["torch_ms"]
    assert figures["speedup"] > 1
    assert re.fullmatch(
        r"validated on 2 cases, faster in 1 of 1 raced \(.*x to .*x\)", tuning.summary(record)
    )


def test_a_triton_variant_is_proven_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shard = tuning.Shard(("swiglu", "triton"), "fp32", ("63x113", "0x64"))
    settings = tuning.Settings([shard.pair], "cpu")
    with Examiner() as examiner:
        events = tuning._prove_shard(examiner, settings, shard, 100.0)
    record = tuning.proof_of({shard: events})
    assert record["status"] == "validated"
    assert record["cases"] == 2
    assert 0 < record["worst_error"] <= 1


def test_what_the_time_does_not_reach_has_no_verdict(make: Make) -> None:
    (record,) = tuning.tune(make("fast", seconds=0.0))["swiglu"].values()
    assert record["status"] == "not reached"
    assert "faster" not in record
    text = cli_inspect.tune_text({"swiglu": {"cuda": record}})
    assert "run it again" in text


def finding(error: float = 0.5, repeats: bool = True, skipped: str = "") -> dict[str, Any]:
    return {
        "event": "finding", "case": "1x1", "dtype": "bf16", "error": error, "tensor": "out0",
        "repeats": repeats, "skipped": skipped, "passed": error <= 1 and repeats,
    }  # fmt: skip


DONE = {"event": "done", "complete": True}


@pytest.mark.parametrize(
    ("events", "status", "dtypes"),
    [
        ([finding(), DONE], "validated", ["bf16"]),
        ([finding(), finding(skipped="dtype"), DONE], "validated", ["bf16"]),
        ([finding(skipped="on cpu"), DONE], "covers no case here", []),
        ([finding(), DONE | {"complete": False}], "not reached", []),
        ([], "not reached", []),
        (
            [finding(1.2), DONE],
            "failed: 1x1 bf16: out0 has 1.2 times the error it may",
            [],
        ),
        ([finding(float("nan")), DONE], "failed: 1x1 bf16: out0 has nan", []),
        ([finding(repeats=False), DONE], "failed: 1x1 bf16: two runs differ", []),
        ([finding(), {"event": "failed", "reason": "crashed"}], "failed: crashed", []),
    ],
)
def test_verdicts(events: list[dict[str, Any]], status: str, dtypes: list[str]) -> None:
    record = tuning.proof_of({tuning.Shard(SWIGLU, "bf16", ("1x1",)): events})
    assert record["status"].startswith(status)
    assert record["dtypes"] == dtypes


def test_a_race_that_fails_takes_the_proof_away() -> None:
    record = tuning.race_of([{"event": "failed", "reason": "crashed"}], "cuda")
    assert record == {"raced": 0, "faster": {}, "status": "failed: crashed"}


def contest(ratio: float, key: str = "bf16 large") -> dict[str, Any]:
    times = {
        "torch": {"forward": [1.0] * 5, "full": [3.0] * 5},
        "cuda": {"forward": [1.0] * 5, "full": [3.0 / ratio] * 5},
    }
    memory = {"torch": 100, "cuda": 100}
    return {
        "event": "contest", "case": "x", "dtype": "bf16", "case_class": key, "times": times,
        "memory": memory,
    }  # fmt: skip


def test_a_class_is_won_only_with_all_of_its_cases() -> None:
    events = [contest(1.5), contest(1.2), contest(1.5, "bf16 small"), contest(0.9, "bf16 small")]
    record = tuning.race_of([*events, DONE], "cuda")
    assert record["raced"] == 4
    assert record["faster"].keys() == {"bf16 large"}
    assert record["faster"]["bf16 large"]["speedup"] == pytest.approx(1.2)


def test_every_operation_with_a_variant_has_cases() -> None:
    """A new Triton or CUDA variant that tune would leave out."""
    waiting = {
        op
        for op, variants in dispatch.available().items()
        if set(variants) - {"reference", "torch"} and op not in oracle_cases.operations()
    }
    assert not waiting


def test_candidates_are_the_variants_that_may_become_a_default() -> None:
    pairs = tuning.candidates()
    assert ("rms_norm", "triton") in pairs
    assert not {variant for _, variant in pairs} & {"reference", "torch"}
    assert tuning.candidates(["rope"]) == [("rope", "triton")]
    with pytest.raises(ValueError, match=r"--ops: no such operation: rpoe; accepted: .*rope"):
        tuning.candidates(["rpoe"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command believes in a GPU, and keeps its verdicts here."""
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evidence, "machine_of", lambda index=0: MACHINE)
    return tmp_path / "tune" / "made-up-9.json"


def test_the_command_keeps_prints_and_clears_its_verdicts(
    gpu: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("fast")
    records = {
        "swiglu": {
            "cuda": tuning.proof_of({tuning.Shard(SWIGLU, "bf16", ("1x1",)): [finding(), DONE]})
            | {"fingerprint": tuning.fingerprint(*SWIGLU)}
            | tuning.race_of([contest(1.5), DONE], "cuda")
        }
    }

    def on_the_cpu(settings: tuning.Settings) -> Any:
        assert settings.seconds == 40
        assert settings.device == "cuda:0"
        settings.progress(1, 1, "swiglu (cuda)")
        return records

    monkeypatch.setattr(tuning, "tune", on_the_cpu)
    arguments = ["tune", "--ops", "swiglu", "--seconds", "40"]
    monkeypatch.setattr(tuning, "candidates", lambda ops: [SWIGLU])
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "faster in 1 of 1 raced" in shown
    assert re.search(r"Made-up 9: \d+ s; kept in .*made-up-9\.json", shown)
    assert evidence.read_cache(MACHINE)["swiglu"]["cuda"]["status"] == "validated"
    assert not list(gpu.parent.glob(".*")), "a partial file was left"

    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["verdicts"]["swiglu"]["cuda"]["faster"]
    assert figures["machine"]["gpu"] == "Made-up 9"

    assert main(["tune", "--clear"]) == 0
    assert not gpu.exists()
    assert "deleted" in capsys.readouterr().out


def test_verdicts_stay_where_tuning_does_not_reach(
    gpu: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("fast")
    records = {
        op: {"cuda": {"status": "validated", "fingerprint": tuning.fingerprint(op, "cuda")}}
        for op in ("swiglu", "geglu")
    }
    evidence.write_cache(MACHINE, records)
    failed = {"swiglu": {"cuda": records["swiglu"]["cuda"] | {"status": "failed: so"}}}
    failed["geglu"] = {"cuda": records["geglu"]["cuda"] | {"status": "not reached"}}
    monkeypatch.setattr(tuning, "tune", lambda settings: failed)
    assert main(["tune", "--ops", "swiglu", "--json"]) == 0
    kept = evidence.read_cache(MACHINE)
    assert kept["swiglu"]["cuda"]["status"] == "failed: so"
    assert kept["geglu"]["cuda"]["status"] == "validated"
