"""The command line: ``stackwise train|eval|generate|plan|prepare|info|bench|tune``.

Commands import what they need when they run, so that ``--help`` is quick. Errors a user can act on
are one line and exit code 2; with STACKWISE_TRACEBACK=1 they show where they come from.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from stackwise import __version__

EXAMPLES = """\
examples:
  stackwise train configs/quickstart.yaml
  stackwise train configs/quickstart.yaml --set data.dataset_path=my_texts/ --set training.lr=3e-4
  stackwise train --resume runs/RUN
  stackwise eval runs/RUN
  stackwise generate runs/RUN --prompt "The [MASK:6] returns a list."
  stackwise plan configs/gpt2_fusion.yaml

`stackwise COMMAND --help` describes a command; every configuration field is described in
docs/configuration.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (nothing done), 2 (error), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.formatwarning = _one_line_warning
        try:
            return _run(arguments)
        except BrokenPipeError:
            # The reader (head, less) has gone; keep Python from complaining about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt as interrupt:
            print(f"\nstackwise: interrupted{_hint_of(interrupt)}", file=sys.stderr)
            return 130
        except Exception as error:
            if os.environ.get("STACKWISE_TRACEBACK") == "1" or not _is_for_users(error):
                raise
            print(f"stackwise: error: {_message(error)}", file=sys.stderr)
            return 2


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:
        from stackwise.cli_inspect import bench

        return bench(arguments[1:])
    options = build_parser().parse_args(arguments)
    if options.command in ("plan", "info", "tune"):
        from stackwise import cli_inspect as commands
    else:
        from stackwise import cli_run as commands  # type: ignore[no-redef]
    code: int = getattr(commands, options.command)(options)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="stackwise",
        description="Train GPT-2/LLaMA-style decoders block by block.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stackwise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _train_parser(commands)
    _eval_parser(commands)
    _generate_parser(commands)
    _inspection_parsers(commands)
    return parser


Commands = argparse._SubParsersAction


def _train_parser(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train the run that a configuration describes, or resume one",
        description="Trains in the mode that training.mode names and leaves a run folder.",
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, see configs/")
    train.add_argument(
        "--resume", metavar="RUN", help="run folder (or id under runs/) to continue instead"
    )
    _add_set(train)


def _eval_parser(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a run on held-out documents",
        description="The likelihood bound (diffusion), loss (mlm) or perplexity (clm) of a run.",
    )
    evaluate.add_argument("run", metavar="RUN", help="run folder, or id under runs/")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument(
        "--split", choices=("validation", "train"), default="validation", help="default: validation"
    )
    evaluate.add_argument(
        "--stage", type=int, metavar="K", help="the model at the end of stage K (from 0), if kept"
    )
    evaluate.add_argument("--blocks", type=int, metavar="N", help="only the first N blocks")
    evaluate.add_argument(
        "--mask-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="mask fractions measured; other than 0 1 gives a loss that is not a bound",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="seed of masks and row choice")
    _add_set(evaluate, "evaluation.samples=8, data.dataset_path=FOLDER, training.device=cpu, ...")


def _generate_parser(commands: Commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt or fill its gaps",
        description="Samples text. [MASK] in the prompt is a gap of one token, [MASK:8] of eight; "
        "a prompt without gaps is continued.",
    )
    generate.add_argument("run", metavar="RUN", help="run folder, or id under runs/")
    generate.add_argument("--prompt", required=True, help="text, with or without gaps")
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="length of a continuation"
    )
    generate.add_argument("--steps", type=int, metavar="N", help="diffusion steps")
    generate.add_argument("--block-length", type=int, metavar="N", help="tokens filled at a time")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    generate.add_argument("--top-p", type=float, metavar="P", help="sample within this mass")
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="default: 1")
    generate.add_argument("--seed", type=int, default=0, help="default: 0")
    generate.add_argument(
        "--mode", choices=("diffusion", "causal"), help="default: as the model attends"
    )
    _add_set(generate, "generation.steps=16, training.device=cpu, ...")


def _inspection_parsers(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="parameters, stages, memory and disk of a run, without training",
        description="What a configuration will train, how long and how large. Formulas: the "
        "docstring of stackwise/planning.py.",
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument(
        "--rows", type=int, metavar="N", help="training rows, instead of preparing the corpus"
    )
    _add_set(plan)
    prepare = commands.add_parser(
        "prepare",
        help="build the corpus of a configuration and describe it",
        description="Reads, splits, tokenises and packs the corpus; training then reuses it.",
    )
    prepare.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    prepare.add_argument("--json", action="store_true", help="print one JSON object")
    _add_set(prepare)
    info = commands.add_parser("info", help="versions, devices and kernel variants of this machine")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("bench", help="measure an operation or a training step beside its peers")
    _tune_parser(commands)


def _tune_parser(commands: Commands) -> None:
    tune = commands.add_parser(
        "tune",
        help="certify kernel variants on this GPU",
        description="Proves every kernel variant against its definition, races the proven ones "
        "against torch, and keeps the verdicts: where a variant won, it becomes the default on "
        "this GPU. Takes less than a minute.",
    )
    tune.add_argument("--ops", metavar="OP,OP", help="only these operations")
    tune.add_argument(
        "--seconds", type=float, default=55.0, metavar="S", help="time for everything, default: 55"
    )
    tune.add_argument("--json", action="store_true", help="print one JSON object")
    tune.add_argument("--clear", action="store_true", help="forget the verdicts for this GPU")


def _add_set(parser: argparse.ArgumentParser, example: str = "training.lr=3e-4") -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"override a configuration field, e.g. {example}; can be repeated",
    )


def _is_for_users(error: Exception) -> bool:
    """Errors about input, files and memory; anything else is a bug and keeps its traceback."""
    own = type(error).__module__.partition(".")[0] == "stackwise"
    return own or isinstance(error, (ValueError, OSError, MemoryError)) or _out_of_memory(error)


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError")


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if _out_of_memory(error):
        text = (
            f"{text.splitlines()[0]}\nThe device has no memory left: lower training.batch_size "
            "(and raise training.gradient_accumulation_steps), set training.gradient_checkpointing "
            "or training.mixed_precision: bf16; `stackwise plan` estimates what a stage needs"
        )
    return text


def _hint_of(interrupt: KeyboardInterrupt) -> str:
    return f"; {interrupt.args[0]}" if interrupt.args else ""


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"stackwise: warning: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
