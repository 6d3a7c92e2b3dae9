"""`make gpu-check` without a GPU: the order, budget, crashes, hangs and resumption of its steps,
the page and the archive, and the step that proves a variant.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_check_proofs, gpu_check_report, records
from benchmarks import gpu_check_runner as runner
from benchmarks.gpu_check_runner import State, Step
from stackwise import tuning
from stackwise.kernels import dispatch, oracle_cases
from tests.kernels import examined_variants

MACHINE = {"gpu": "Made-up 9", "capability": "sm_90", "torch": "2.99"}


def step(name: str, code: str, limit: float = 20.0, value: float = 1.0, **options: Any) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, value, least=0.0, **options)


def note(tmp_path: Path, name: str) -> str:
    """Code that records its turn."""
    return f"open({str(tmp_path / 'turns')!r}, 'a').write({name + chr(10)!r})"


def turns(tmp_path: Path) -> list[str]:
    file = tmp_path / "turns"
    return file.read_text().split() if file.exists() else []


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.load(tmp_path / "out" / "state.json", "sources 1")


def go(steps: list[Step], state: State, budget: float = 60.0) -> None:
    runner.run(steps, state, budget, os.environ, say=lambda line: None)


def test_the_most_valuable_second_comes_first_and_nothing_runs_twice(
    tmp_path: Path, state: State
) -> None:
    steps = [
        step("cheap", note(tmp_path, "cheap"), limit=10, value=1),
        step("long", note(tmp_path, "long"), limit=20, value=4),
        step("build", note(tmp_path, "build"), limit=20, value=0.1, first=True),
    ]
    go(steps, state)
    assert turns(tmp_path) == ["build", "long", "cheap"]
    assert {state.status(s.name) for s in steps} == {"ok"}
    go(steps, State.load(state.file, "sources 1"))
    assert len(turns(tmp_path)) == 3, "a step that is done is not repeated"
    go(steps, State.load(state.file, "sources 2"))
    assert len(turns(tmp_path)) == 6, "other sources have to be checked anew"


def test_crashes_failures_and_hangs_lose_only_themselves(tmp_path: Path, state: State) -> None:
    pid = tmp_path / "grandchild"
    child = (
        "import subprocess\nsleeper = subprocess.Popen(['sleep', '60'])\n"
        f"print(sleeper.pid, file=open({str(pid)!r}, 'w'), flush=True)"
    )
    steps = [
        step("crash", "import os; print('before', flush=True); os.abort()", value=9),
        step("hang", f"{child}\nimport time; time.sleep(60)", limit=2.0, value=0.9),
        step("wrong", "import sys; print('two differ'); sys.exit(1)", value=7),
        step("absent", "import sys; sys.exit(77)", value=6),
        step("too short", "import sys; sys.exit(75)", value=5),
        step("needs wrong", note(tmp_path, "pointless"), after="wrong"),
        step("last", note(tmp_path, "last"), value=0.1),
    ]
    start = time.monotonic()
    go(steps, state)
    assert time.monotonic() - start < 30
    found = {s.name: state.status(s.name) for s in steps}
    assert found == {
        "crash": "crashed",
        "hang": "timed out",
        "wrong": "failed",
        "absent": "unavailable",
        "too short": "unfinished",
        "needs wrong": "not reached",
        "last": "ok",
    }
    assert turns(tmp_path) == ["last"]
    assert state.steps["crash"]["code"] == -6
    assert state.steps["wrong"]["last"] == "two differ"
    assert (state.file.parent / "logs" / "wrong.log").read_text() == "two differ\n"
    assert set(runner.not_reached(steps, state)) == {"hang", "too short"}
    grandchild = int(pid.read_text())
    deadline = time.monotonic() + 10
    while _alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(grandchild)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_budget_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, state: State) -> None:
    steps = [
        step("short", note(tmp_path, "short"), value=9),
        step("cut", f"import time; time.sleep(4); {note(tmp_path, 'cut')}", value=5),
        step("later", note(tmp_path, "later")),
    ]
    go(steps, state, budget=2.0)
    assert turns(tmp_path) == ["short"]
    assert state.status("cut") == "interrupted", "its own limit was not reached"
    assert runner.not_reached(steps, state) == ["later", "cut"], "what is new comes first"
    go(steps, State.load(state.file, "sources 1"))
    assert turns(tmp_path) == ["short", "later", "cut"]


def test_a_step_that_needs_more_than_is_left_is_not_begun(tmp_path: Path, state: State) -> None:
    needy = Step("needy", [sys.executable, "-c", note(tmp_path, "needy")], 100, 50, least=30)
    go([needy, step("small", note(tmp_path, "small"))], state, budget=15.0)
    assert turns(tmp_path) == ["small"]
    assert runner.not_reached([needy], state) == ["needy"]


def test_a_damaged_state_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    for content in ("{", "[]", '{"key": "k"}', '{"key": "k", "steps": 3}'):
        file.write_text(content)
        assert State.load(file, "k").steps == {}


RECORD = {
    "status": "validated", "worst_error": 0.7, "dtypes": ["bf16", "fp32"],
    "faster": {"bf16 large": {"speedup": 1.5}},
}  # fmt: skip


def test_the_page_and_the_archive_hold_everything(tmp_path: Path, state: State) -> None:
    steps = [
        step("good", "print('fine')", value=9),
        step("bad", "import sys; sys.exit('it is wrong')"),
        step("absent", "import sys; sys.exit(77)"),
    ]
    go(steps, state)
    steps.append(step("far", ""))
    results, evidence = tmp_path / "results" / "made-up-9", tmp_path / "evidence.json"
    results.mkdir(parents=True)
    (results / "validation.csv").write_text("a,b\n")
    content = {"gpus": {"Made-up 9 sm_90": {"rope": {"triton": RECORD}}}}
    evidence.write_text(json.dumps(content))
    found = gpu_check_report.read_records(evidence, "Made-up 9 sm_90")
    page = gpu_check_report.summary(steps, state, MACHINE, found)
    archive = gpu_check_report.pack(state.file.parent, results, evidence, page)
    assert "| rope | triton | validated | 0.70 | bf16, fp32 | 1, 1.50x to 1.50x |" in page
    assert "## Steps: 3 of 4 ended, 1 failed" in page
    assert "| bad | failed | it is wrong |" in page
    assert "Not possible on this machine: absent." in page
    assert "Not reached (1; run it again): far." in page
    with tarfile.open(archive) as opened:
        names = set(opened.getnames())
        packed = opened.extractfile("gpu-check/summary.md")
        assert packed is not None
        assert packed.read().decode() == page
    assert {
        "gpu-check/summary.md",
        "gpu-check/state.json",
        "gpu-check/logs/bad.log",
        "gpu-check/results/made-up-9/validation.csv",
        "gpu-check/evidence.json",
    } <= names


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU that torch can use; nothing was checked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_whole_run_with_steps_that_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_machine", lambda: MACHINE)
    steps = [step("good", "print('fine')"), step("bad", "import sys; sys.exit(3)")]
    monkeypatch.setattr(gpu_check, "all_steps", lambda results, proven: steps)
    out, evidence = tmp_path / "out", tmp_path / "evidence.json"
    arguments = ["--out", str(out), "--results", str(tmp_path / "r"), "--evidence", str(evidence)]
    assert gpu_check.main([*arguments, "--budget", "60"]) == 1
    shown = capsys.readouterr().out
    assert "failed: bad" in shown
    assert "all steps reached" in shown
    assert (out / "gpu-check.tar.gz").is_file()
    assert json.loads(evidence.read_text())["gpus"] == {}
    steps.pop()
    assert gpu_check.main([*arguments, "--budget", "60"]) == 0


def test_every_variant_and_every_bench_has_its_steps(tmp_path: Path) -> None:
    steps = {s.name: s for s in gpu_check.all_steps(tmp_path, {})}
    assert {"build", "gpu tests", "bench rms-norm"} <= steps.keys()
    for op, variants in dispatch.available().items():
        for variant in set(variants) - {"reference", "torch"}:
            jobs = ("prove", "race", "memcheck", "racecheck")
            assert {f"{job} {op} {variant}" for job in jobs} <= steps.keys()
    assert "tests/triton/gpu/test_variants.py" in steps["gpu tests"].command
    ordered = [s.name for s in runner.order(list(steps.values()), State(tmp_path / "s", "k"))]
    assert ordered[0] == "build"
    assert ordered[1].startswith("prove ")


def test_what_is_proven_already_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_still_holds", lambda op, variant, record: op == "rope")
    ordered = runner.order(gpu_check.all_steps(tmp_path, {}), State(tmp_path / "s", "k"))
    names = [s.name for s in ordered]
    assert names.index("prove rope triton") > names.index("race rms_norm triton")


def test_the_key_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.py"
    source.write_text("1")
    first = gpu_check.source_key(tmp_path)
    (tmp_path / "kernels" / "evidence.json").write_text("{}")
    assert gpu_check.source_key(tmp_path) == first
    source.write_text("2")
    assert gpu_check.source_key(tmp_path) != first


def test_the_step_that_proves_a_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    registry = {op: dict(variants) for op, variants in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.setattr(oracle_cases, "_cases", dict(oracle_cases._cases))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("EXAMINED_VARIANT", "fast")
    examined_variants.register_all("fast")
    command = (sys.executable, str(examined_variants.__file__))
    options = ["--results", str(tmp_path), "--device", "cpu", "--workers", "1"]
    options += ["--dtypes", "fp32", "--seconds", "60"]
    assert gpu_check_proofs.main(["prove", "swiglu", "cuda", *options], command) == 0
    proof = _proof(tmp_path)
    assert proof["status"] == "validated"
    assert proof["dtypes"] == ["fp32"]

    options[-1] = "4"
    options += ["--dtypes", "bf16"]
    assert gpu_check_proofs.main(["race", "swiglu", "cuda", *options], command) == 0
    full, forward = sorted(
        records.read_csv(tmp_path / "races.csv"), key=lambda row: row.kernel_operation_mode
    )[::-1]
    assert (full.kernel_operation_mode, forward.kernel_operation_mode) == ("full", "forward")
    extra = json.loads(full.extra_benchmark_config_str)
    assert extra["case_class"] == "bf16 tiny"
    assert extra["torch_ms"] > 5
    assert full.y_value_20 <= full.y_value_50 <= full.y_value_80
    found = {name: json.loads(row.extra_benchmark_config_str)["fingerprint"]
             for name, row in (("full", full), ("forward", forward))}  # fmt: skip
    assert set(found.values()) == {proof["fingerprint"]}

    wrong = {"event": "finding", "case": "1x1", "dtype": "fp32", "error": 3.0, "tensor": "dup",
             "repeats": True, "skipped": "", "passed": False}  # fmt: skip
    shard = tuning.Shard(("swiglu", "cuda"), "fp32", ("1x1",))
    answers = {shard.pair: {shard: [wrong, {"event": "done", "complete": True}]}}
    monkeypatch.setattr(tuning, "prove_events", lambda settings, seconds: answers)
    assert gpu_check_proofs.main(["prove", "swiglu", "cuda", *options], command) == 1
    proof = _proof(tmp_path)
    assert proof["status"] == "failed: 1x1 fp32: dup has 3 times the error it may"


def _proof(folder: Path) -> dict[str, Any]:
    """What the last row says; it and the rows of the cases are of one run."""
    *cases, proof = records.read_csv(folder / "validation.csv")
    assert {row.metric_name for row in cases} == {"case"}
    assert (proof.metric_name, proof.kernel_provider) == ("validation", "stackwise-cuda")
    assert proof.x_value == len(cases)
    extra: dict[str, Any] = json.loads(proof.extra_benchmark_config_str)
    return extra


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("validated", 0),
        ("3 cases raced", 0),
        ("memcheck: no errors", 0),
        ("failed: 1x1", 1),
        ("not reached", 75),
        ("covers no case here", 77),
        ("unavailable: no compute-sanitizer", 77),
    ],
)
def test_exit_codes(status: str, code: int) -> None:
    assert gpu_check_proofs.exit_code(status) == code


@pytest.mark.parametrize(
    ("said", "status", "errors"),
    [
        ("4 cases ran\n== ERROR SUMMARY: 0 errors", "memcheck: no errors", 0),
        ("4 cases ran\n== ERROR SUMMARY: 2 errors", "failed: 2 errors of memcheck", 2),
        ("4 cases ran\n== RACECHECK SUMMARY: 3 hazards displayed", "failed: 3 errors", 3),
        ("Error: Device not supported", "unavailable: Error: Device not supported", None),
        ("== ERROR SUMMARY: 0 errors", "unavailable", None),
        ("", "unavailable: nothing was printed", None),
    ],
)
def test_what_the_sanitizer_said(said: str, status: str, errors: int | None) -> None:
    rows, found = gpu_check_proofs.judge_sanitizer(("rope", "triton"), "memcheck", said)
    assert found.startswith(status)
    assert [row.y_value_50 for row in rows] == ([] if errors is None else [errors])
