"""What the command line does beside its work: speed, interrupts, bugs, missing parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from stackwise import cli, cli_inspect, cli_run
from stackwise.cli import main
from stackwise.cli_run import format_table, print_json, trained_depth
from stackwise.config import StackWiseConfig
from stackwise.runs import RunStore
from stackwise.training.trainers import UnifiedTrainer

TINY = [
    "model.d_model=32",
    "model.n_layers=3",
    "model.n_heads=2",
    "training.seq_len=32",
    "training.batch_size=4",
    "training.warmup_steps=0",
    "training.max_steps=6",
    "training.save_interval=1",
    "training.device=cpu",
    "data.tokenizer_vocab_size=280",
]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        (texts / f"{index}.txt").write_text(f"Frame {index} holds a name and a list of lines. " * 3)
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{dir: {tmp_path / 'runs'}}}\ndata: {{dataset_path: {texts}}}\n")
    return str(file)


def settings(*more: str) -> list[str]:
    return [part for item in [*TINY, *more] for part in ("--set", item)]


def run_cli(*arguments: str, repository: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    program = code or "import sys; from stackwise.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
        check=False,
    )


def test_help_and_configuration_errors_do_not_import_torch(repository: Path) -> None:
    code = (
        "import sys\nfrom stackwise.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert main(['plan', 'nowhere.yaml']) == 2\n"
        "print('torch' in sys.modules)"
    )
    finished = run_cli(repository=repository, code=code)
    assert finished.stdout.splitlines()[-1] == "False", finished.stderr
    assert "train the run that a configuration describes" in finished.stdout


@pytest.mark.parametrize(
    "command", ["train", "eval", "generate", "plan", "prepare", "info", "tune"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"stackwise {command}" in capsys.readouterr().out


def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "no CUDA device: nothing to tune" in capsys.readouterr().err


def test_bench_without_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_inspect, "__file__", str(tmp_path / "stackwise" / "cli_inspect.py"))
    assert main(["bench", "training-step"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err


def test_bench_hands_its_arguments_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "--help"])
    assert leaving.value.code == 0
    assert "stackwise bench" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(cli_inspect, "info", broken)
    with pytest.raises(KeyError):
        main(["info"])


def test_the_traceback_of_an_error_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACKWISE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="cannot be read"):
        main(["plan", "nowhere.yaml"])


def test_no_memory_left_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def greedy(options: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(cli_inspect, "info", greedy)
    assert main(["info"]) == 2
    message = capsys.readouterr().err
    assert "2 GiB\nThe device has no memory left: lower training.batch_size" in message
    assert "and more" not in message


def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = warnings.formatwarning

    def warning(options: object) -> int:
        assert warnings.formatwarning("careful", UserWarning, "f.py", 3) == (
            "stackwise: warning: careful\n"
        )
        return 0

    monkeypatch.setattr(cli_inspect, "info", warning)
    assert main(["info"]) == 0
    assert warnings.formatwarning is shown


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = UnifiedTrainer.__init__

    def with_interrupt(self: UnifiedTrainer, *args: object, **kwargs: object) -> None:
        started(self, *args, **kwargs)  # type: ignore[arg-type]

        def stop(record: dict[str, float]) -> None:
            if record["step"] == 4:
                raise KeyboardInterrupt

        self._on_step = stop  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(UnifiedTrainer, "__init__", with_interrupt)
        assert main(["train", recipe, *settings()]) == 130
    words = capsys.readouterr().err.strip().splitlines()[-1].split()
    assert words[:4] == ["stackwise:", "interrupted;", "continue", "with:"]
    run = Path(words[-1])
    assert run.is_dir()
    with pytest.warns(UserWarning, match="has not finished"):
        assert main(["eval", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["blocks"] == 2, "the third block has not been trained yet"
    assert main(["train", *words[-2:]]) == 0
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["blocks"] == 3


def test_blocks_that_no_stage_trains_are_not_evaluated(recipe: str) -> None:
    config = StackWiseConfig.from_yaml(recipe, [*TINY, "training.total_blocks=2"])
    run = UnifiedTrainer(config).train().run_path
    store = RunStore.open(run)
    assert trained_depth(store, store.load_config()) == 2
    assert trained_depth(store, store.load_config(), stage=0) == 1


def test_an_interrupt_before_there_is_a_run_names_none(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: UnifiedTrainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UnifiedTrainer, "train", interrupted)
    assert main(["train", recipe]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stackwise: interrupted"


def test_config_and_resume_exclude_each_other(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, "--resume", "runs/x"]) == 2
    assert "give either CONFIG or --resume RUN" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(repository: Path) -> None:
    command = f"{sys.executable} -m stackwise info | head -n 1; echo ${{PIPESTATUS[0]}}"
    finished = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
        check=True,
    )
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("stackwise")
    assert lines[1] == "0"
    assert finished.stderr == ""


def test_json_holds_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": (2,)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [2]}


def test_tables_align_numbers_to_the_right() -> None:
    assert format_table([("name", "steps"), ("a", "1,000"), ("bcdef", "2")]) == (
        "name   steps\n------------\na      1,000\nbcdef      2"
    )


def test_the_parser_knows_no_command_without_a_function() -> None:
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if a.dest == "command")
    for name in commands.choices or ():
        assert callable(getattr(cli_run, name, None) or getattr(cli_inspect, name))
