"""The command line as a user types it: outputs, errors in one line, exit codes."""

from __future__ import annotations

import json
import pathlib

import pytest

from stackwise.cli import main

SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "training.seq_len=32",
    "training.batch_size=4",
    "training.max_steps=6",
    "training.warmup_steps=0",
    "training.log_interval=2",
    "training.device=cpu",
    "data.tokenizer_vocab_size=280",
    "evaluation.samples=1",
    "evaluation.mask_rates=[0.5]",
]


def settings(*more: str) -> list[str]:
    return [part for setting in [*SMALL, *more] for part in ("--set", setting)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    """Your own folder of .txt files."""
    folder = tmp_path_factory.mktemp("my_texts")
    for index in range(40):
        (folder / f"{index}.txt").write_text(
            f"Chapter {index}. The function returns the list of names that frame {index} holds, "
            "and raises an error if the stack is empty."
        )
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("config") / "mine.yaml"
    file.write_text("training:\n  mode: layerwise\n  lr: 1e-3\n")
    return str(file)


@pytest.fixture(scope="module")
def run(recipe, texts, tmp_path_factory) -> pathlib.Path:
    runs = tmp_path_factory.mktemp("runs")
    places = settings(f"data.dataset_path={texts}", f"run.dir={runs}", "run.id=mine")
    assert main(["train", recipe, *places]) == 0
    return runs / "mine"


def output(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_train_leaves_a_run_with_everything_in_it(run):
    present = {path.name for path in run.iterdir()}
    assert {
        "config.yaml", "metrics.jsonl", "summary.json", "loss.png", "tokenizer",
        "checkpoints", "full_precision", "model",
    } <= present  # fmt: skip
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "activation_cache" not in present


def test_eval_json_is_one_object_with_an_interval_around_the_bound(run, capsys):
    figures = json.loads(output(capsys, "eval", str(run), "--json"))
    assert figures["is_bound"]
    low, high = figures["bits_per_byte_low"], figures["bits_per_byte_high"]
    assert low < figures["bits_per_byte"] < high
    assert figures["unigram_bits_per_byte"] > 0
    assert figures["blocks"] == 2


def test_eval_prints_a_table_and_says_what_is_not_a_bound(run, capsys):
    assert "upper bound" in output(capsys, "eval", str(run))
    restricted = output(capsys, "eval", str(run), "--mask-range", "0.2", "0.5")
    assert "not a likelihood bound" in restricted


def test_eval_of_the_first_block_differs_from_the_whole(run, capsys):
    one = json.loads(output(capsys, "eval", str(run), "--json", "--blocks", "1"))
    two = json.loads(output(capsys, "eval", str(run), "--json"))
    assert one["bits_per_byte"] != two["bits_per_byte"]


def test_generate_fills_gaps_and_repeats_with_the_same_seed(run, capsys):
    arguments = ["generate", str(run), "--prompt", "The [MASK:5] returns", "--num-samples", "2"]
    first = output(capsys, *arguments, "--seed", "3")
    assert first == output(capsys, *arguments, "--seed", "3")
    assert first != output(capsys, *arguments, "--seed", "4")
    assert first.count("The ") >= 2
    assert "MASK" not in first


def test_plan_counts_the_parameters_that_training_has(recipe, run, texts, capsys):
    places = settings(f"data.dataset_path={texts}")
    plan = json.loads(output(capsys, "plan", recipe, "--json", *places))
    from stackwise.runs import load_run_model

    text = json.dumps(plan)
    assert str(load_run_model(run).num_parameters) in text
    assert len(plan["stages"]) == 2
    assert sum(stage["steps"] for stage in plan["stages"]) == 6


def test_info_lists_every_operation_and_its_default(capsys):
    info = json.loads(output(capsys, "info", "--json"))
    text = json.dumps(info)
    assert all(op in text for op in ("attention", "linear_cross_entropy", "rms_norm", "rope"))


def test_prepare_describes_the_corpus(recipe, texts, capsys):
    places = settings(f"data.dataset_path={texts}")
    figures = json.loads(output(capsys, "prepare", recipe, "--json", *places))
    assert figures["train"]["documents"] + figures["validation"]["documents"] == 40


def test_resume_of_a_finished_run_succeeds(run, capsys):
    assert str(run) in output(capsys, "train", "--resume", str(run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "CONFIG or --resume"),
        (["eval", "nowhere"], "no run here"),
        (["train", "{recipe}", "--set", "training.learning_rate=1"], "training.lr"),
        (["train", "{recipe}", "--set", "model.n_heads=3"], "n_heads"),
        (["train", "{recipe}", "--set", "training.quantization_enabled=true"], "quantization"),
        (["train", "{recipe}", "--set", "data.dataset_path=./no_such_folder/"], "no_such_folder"),
        (["bench", "no-such-bench"], "no-such-bench"),
    ],
)
def test_errors_are_readable_lines_with_exit_code_2(arguments, message, recipe, capsys):
    assert main([a.format(recipe=recipe) for a in arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_faulty_generation_setting_is_refused(run, capsys):
    assert main(["generate", str(run), "--prompt", "x", "--top-p", "1.5"]) == 2
    assert "top_p" in capsys.readouterr().err


def test_all_faults_arrive_together(recipe, capsys):
    faults = ["--set", "training.lr=-1", "--set", "model.dropout=2", "--set", "data.pakcing=none"]
    assert main(["train", recipe, *faults]) == 2
    errors = capsys.readouterr().err
    assert all(name in errors for name in ("training.lr", "model.dropout", "data.packing"))
