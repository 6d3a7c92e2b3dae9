"""Kill -9 at any moment, resume, and end with the numbers of the run that was never killed."""

from __future__ import annotations

import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from stackwise.config import ConfigError
from stackwise.runs import RunError, RunStore
from stackwise.training.loop import TrainingError
from stackwise.training.trainers import UnifiedTrainer

RECIPES = {
    "layerwise_cached": [
        "training.mode=layerwise",
        "training.activation_cache=true",
        "training.cache_masks=2",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=18",
    ],
    "fused_dropout": [
        "training.mode=fused",
        "training.block_size=1",
        "training.fusion_mode=trainable",
        "training.joint_tuning_steps=3",
        "model.dropout=0.1",
        "training.log_interval=3",
        "training.max_steps=18",
    ],
}


def numbers(run: pathlib.Path) -> list[tuple]:
    """What must repeat exactly, from metrics.jsonl."""
    return [
        (r["step"], r["stage"], r.get("loss"), r.get("validation_loss"), r.get("grad_norm"))
        for r in RunStore.open(run).read_metrics()
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stackwise", "train", *arguments],
        env=environment,
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def temporary_files(run: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in run.rglob("*") if p.name.endswith((".tmp", ".displaced"))]


def kill_and_resume(make_config, tmp_path, recipe: str, kills: int, seed: int) -> None:
    """Runs ``recipe`` once undisturbed and once killed ``kills`` times at random moments."""
    long = [*RECIPES[recipe], f"training.max_steps={150 * kills}", "training.save_interval=5"]
    undisturbed = UnifiedTrainer(make_config(*long, "run.id=whole")).train().run_path
    config = make_config(*long, "run.id=killed")
    file = tmp_path / "config.yaml"
    config.to_yaml(str(file))
    run = pathlib.Path(config.run.dir) / "killed"
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(["--resume", str(run)] if (run / "config.yaml").exists() else [str(file)])
        already = _progress(run)
        deadline = time.monotonic() + 60
        while _progress(run) == already and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.7))
        assert process.poll() is None, "the run was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (run / "model").exists()
    process = start(["--resume", str(run)])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert numbers(run) == numbers(undisturbed)
    assert temporary_files(run) == []


def _progress(run: pathlib.Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else -1


@pytest.mark.parametrize("seed", [0])
def test_three_kills_while_training_and_saving(make_config, tmp_path, seed):
    kill_and_resume(make_config, tmp_path, "layerwise_cached", kills=3, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_ten_kills_per_recipe(make_config, tmp_path, recipe):
    kill_and_resume(make_config, tmp_path, recipe, kills=10, seed=1)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("moment", [1, 5, 8, 13])
def test_an_exception_at_any_step_is_resumed_to_the_same_numbers(make_config, recipe, moment):
    whole = UnifiedTrainer(make_config(*RECIPES[recipe], "run.id=whole")).train()

    def interrupt(record):
        if record["step"] == moment:
            raise Interrupted

    config = make_config(*RECIPES[recipe], "run.id=broken")
    with pytest.raises(Interrupted):
        UnifiedTrainer(config, on_step=interrupt).train()
    resumed = UnifiedTrainer.resume(pathlib.Path(config.run.dir) / "broken").train()
    assert numbers(resumed.run_path) == numbers(whole.run_path)


def test_resuming_a_finished_run_changes_nothing(make_config):
    result = UnifiedTrainer(make_config("training.mode=end_to_end")).train()
    before = numbers(result.run_path)
    UnifiedTrainer.resume(result.run_path).train()
    assert numbers(result.run_path) == before


def test_resume_refuses_settings_that_would_change_the_run(make_config):
    result = UnifiedTrainer(make_config("training.mode=end_to_end")).train()
    with pytest.raises(ConfigError, match=r"training\.lr=1"):
        UnifiedTrainer.resume(result.run_path, ["training.lr=1"])
    UnifiedTrainer.resume(result.run_path, ["training.log_interval=5"])


def test_resume_refuses_other_data(make_config, corpus_folder):
    config = make_config("training.mode=end_to_end", "run.id=moved")
    result = UnifiedTrainer(config).train()
    store = RunStore.open(result.run_path)
    changed = store.load_config()
    changed.data.packing = "concatenate"
    store.save_config(changed)
    with pytest.raises(TrainingError, match="prepared data"):
        UnifiedTrainer.resume(result.run_path).train()


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(make_config, monkeypatch):
    config = make_config("training.mode=end_to_end", "run.id=diverged")

    def poison(record):
        if record["step"] == 5:
            trainer_model[0].head.weight.data.fill_(float("nan"))

    trainer_model = []
    build = UnifiedTrainer._build_model

    def remember(self, *args, **kwargs):
        trainer_model.append(build(self, *args, **kwargs))
        return trainer_model[-1]

    monkeypatch.setattr(UnifiedTrainer, "_build_model", remember)
    with pytest.raises(TrainingError, match=r"NaN.*step 6 of 12.*step_00000004"):
        UnifiedTrainer(config, on_step=poison).train()
    checkpoint = RunStore.open(pathlib.Path(config.run.dir) / "diverged").latest_checkpoint()
    assert checkpoint.step == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint.load("model").values())


def test_a_full_disk_stops_with_a_clear_error_and_the_run_goes_on_afterwards(make_config):
    """The file size limit stands in for a full disk: the kernel refuses writes past it."""
    whole = UnifiedTrainer(make_config("training.mode=end_to_end", "run.id=whole")).train()
    config = make_config("training.mode=end_to_end", "run.id=full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(record):
        if record["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(RunError, match="disk"):
            UnifiedTrainer(config, on_step=fill).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    run = pathlib.Path(config.run.dir) / "full"
    assert RunStore.open(run).latest_checkpoint().step == 4
    assert numbers(UnifiedTrainer.resume(run).train().run_path) == numbers(whole.run_path)
