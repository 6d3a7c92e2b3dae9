"""The commands that work on a corpus or a run: train, eval, generate, prepare."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config import ConfigError, GenerationConfig, StackWiseConfig
from stackwise.config.loading import apply_overrides

if TYPE_CHECKING:
    from stackwise.model.decoder import Decoder
    from stackwise.runs import RunStore
    from stackwise.training.trainers import TrainResult


_NUMERIC = re.compile(r"-?[0-9][0-9.,e+-]*(?: [kMGT]?B)?|-|")


def train(options: argparse.Namespace) -> int:
    """``stackwise train CONFIG`` and ``stackwise train --resume RUN``."""
    if (options.config is None) == (options.resume is None):
        raise ConfigError(
            "give either CONFIG or --resume RUN: a resumed run keeps its own configuration, and "
            "--set changes what may change"
        )
    from stackwise.training.trainers import UnifiedTrainer

    if options.resume is not None:
        from stackwise.runs import RunStore

        folder = RunStore.open(options.resume).path
        trainer = UnifiedTrainer.resume(folder, options.set)
    else:
        config = StackWiseConfig.from_yaml(options.config, options.set)
        # Chosen here, so that an interrupted run can be named.
        config.run.id = config.run.id or _new_run_id(config.training.mode)
        folder = Path(config.run.dir) / config.run.id
        trainer = UnifiedTrainer(config)
    print(f"run folder: {folder}", file=sys.stderr)
    try:
        result = trainer.train()
    except KeyboardInterrupt:
        if not folder.is_dir():
            raise
        raise KeyboardInterrupt(f"continue with: stackwise train --resume {folder}") from None
    _print_result(result)
    return 0


def _new_run_id(mode: str) -> str:
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{mode}-{secrets.token_hex(2)}"


def _print_result(result: TrainResult) -> None:
    rows = [("stage", "steps", "tokens", "seconds", "peak MB", "validation loss")]
    for stage in result.stages:
        rows.append(
            (
                stage["name"],
                str(stage["steps"]),
                f"{stage['tokens']:,}",
                f"{stage['seconds']:.1f}",
                f"{stage['peak_memory_mb']:,.0f}",
                f"{stage['validation_loss']:.4f}",
            )
        )
    print(format_table(rows))
    print(f"\nrun: {result.run_path}\n  stackwise eval {result.run_path}")


def prepare(options: argparse.Namespace) -> int:
    """``stackwise prepare CONFIG``."""
    from stackwise.data.prepared import describe, prepare_data

    config = StackWiseConfig.from_yaml(options.config, options.set)
    figures = describe(prepare_data(config))
    if options.json:
        print_json(figures)
        return 0
    splits = {name: value for name, value in figures.items() if isinstance(value, dict)}
    for name, value in figures.items():
        if name not in splits:
            print(f"{name.replace('_', ' '):24} {_number(value)}")
    columns = list(next(iter(splits.values())))
    rows = [("split", *columns)]
    rows += [(name, *(_number(values[c]) for c in columns)) for name, values in splits.items()]
    print("\n" + format_table(rows))
    return 0


def eval(options: argparse.Namespace) -> int:
    """``stackwise eval RUN``."""
    from stackwise.data import prepare_data
    from stackwise.evaluation import evaluate
    from stackwise.runs import load_run_tokenizer

    store, config = _open_run(options)
    tokenizer = load_run_tokenizer(store.path)
    model = _load_model(store, config, options.stage)
    data = prepare_data(config, tokenizer=tokenizer, progress=False)
    figures = {
        "run": str(store.path),
        "split": options.split,
        "blocks": options.blocks or len(model.blocks),
        **evaluate(
            model,
            data.train if options.split == "train" else data.validation,
            tokenizer,
            config,
            n_blocks=options.blocks,
            progress=not options.json,
            seed=options.seed,
            train_rows=data.train,
            mask_range=tuple(options.mask_range),
        ),
    }
    if options.json:
        print_json(figures)
    else:
        print(_evaluation_text(figures))
    return 0


def _evaluation_text(figures: dict[str, Any]) -> str:
    """The figures of ``evaluate`` for a terminal, with what kind of figure they are."""
    if figures["exact"]:
        kind = "exact: every token given all before it"
    elif figures["is_bound"]:
        kind = "upper bound over mask fractions (0, 1]"
    else:
        kind = "not a likelihood bound"
    lines = [
        f"{figures['run']}: {figures['objective']}, {figures['blocks']} blocks, {figures['split']} "
        f"split, {figures['tokens']:,} tokens of {figures['documents']:,} documents",
        kind,
        "",
    ]
    rows = [("", "value", "95% interval")]
    for name, value in figures.items():
        if f"{name}_low" not in figures:
            continue
        low, high = figures[f"{name}_low"], figures[f"{name}_high"]
        interval = "" if low is None else f"[{_number(low)}, {_number(high)}]"
        rows.append((name.replace("_", " "), _number(value), interval))
    perplexity = "perplexity" if figures["exact"] else "perplexity bound"
    if figures["is_bound"]:
        rows.append((perplexity, _number(figures["perplexity_bound"]), ""))
    rows.append(("unigram bits per byte", _number(figures["unigram_bits_per_byte"]), ""))
    return "\n".join(lines) + format_table(rows)


def generate(options: argparse.Namespace) -> int:
    """``stackwise generate RUN --prompt TEXT``."""
    from stackwise.generation import generate as generate_texts
    from stackwise.runs import load_run_tokenizer

    store, config = _open_run(options)
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config.generation = dataclasses.replace(config.generation, **given)
    config.validate()
    texts = generate_texts(
        _load_model(store, config),
        load_run_tokenizer(store.path),
        options.prompt,
        config.generation,
        seed=options.seed,
        n_samples=options.num_samples,
        mode=options.mode,
    )
    for index, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {index + 1}")
        print(text)
    return 0


def _open_run(options: argparse.Namespace) -> tuple[RunStore, StackWiseConfig]:
    """The run and its configuration, with what it asks of this process (threads, kernels)."""
    import torch

    from stackwise import kernels
    from stackwise.runs import RunStore

    store = RunStore.open(options.run)
    config = apply_overrides(store.load_config(), options.set)
    kernels.use(config.kernels)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    return store, config


def _load_model(store: RunStore, config: StackWiseConfig, stage: int | None = None) -> Decoder:
    """The run's model on its device, without the blocks that no stage has run yet."""
    from stackwise.runs import load_run_model
    from stackwise.training.devices import resolve_device

    model = load_run_model(store.path, stage)
    depth = trained_depth(store, config, stage)
    model.blocks = model.blocks[:depth]
    return model.to(resolve_device(config.training.device))


def trained_depth(store: RunStore, config: StackWiseConfig, stage: int | None = None) -> int | None:
    """Blocks that training has run so far, or up to the end of ``stage``; None: all of them."""
    from stackwise.training.stages import build_stages

    stages = build_stages(config, steps_per_epoch=1)
    if stage is None:
        stage = len(stages) - 1
        if store.read_summary() is None:
            checkpoint = store.latest_checkpoint()
            if checkpoint is not None:
                state = checkpoint.state
                stage = max(0, state["stage"] - (state["stage_step"] == 0))
    return stages[min(stage, len(stages) - 1)].depth if stage >= 0 else None


def print_json(value: Any) -> None:
    """One object on one line; infinities and NaN become null."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells in aligned columns, the first row underlined; columns of numbers right."""
    columns = []
    for header, *cells in zip(*rows, strict=True):
        width = max(map(len, (header, *cells)))
        right = all(_NUMERIC.fullmatch(cell) for cell in cells)
        columns.append([c.rjust(width) if right else c.ljust(width) for c in (header, *cells)])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
