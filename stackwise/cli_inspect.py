"""The commands that look without training: plan, info, bench, tune."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import __version__
from stackwise.cli_run import format_table, print_json
from stackwise.config import StackWiseConfig

if TYPE_CHECKING:
    from stackwise.planning import Plan

PACKAGES = ("torch", "triton", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


def plan(options: argparse.Namespace) -> int:
    """``stackwise plan CONFIG``."""
    from stackwise.planning import needs_rows
    from stackwise.planning import plan as make_plan

    config = StackWiseConfig.from_yaml(options.config, options.set)
    n_rows = options.rows
    if n_rows is None and needs_rows(config):
        from stackwise.data import prepare_data

        print("preparing the corpus to count its rows (--rows N skips this)", file=sys.stderr)
        n_rows = len(prepare_data(config).train)
    made = make_plan(config, n_rows)
    if options.json:
        print_json(made.to_dict())
    else:
        print(plan_text(made))
    return 0


def plan_text(made: Plan) -> str:
    """A plan for a terminal."""
    counts = made.parameters
    blocks = counts["blocks"]
    even = len(set(blocks)) == 1
    each = f"{len(blocks)} blocks of {blocks[0]:,}" if even else f"blocks {sum(blocks):,}"
    head = "tied head" if counts["tied_head"] else f"head {counts['head']:,}"
    rows = [("stage", "trains", "input", "masks", "steps", "tokens", "trainable", "memory")]
    for stage in made.stages:
        low, high = stage.mask_fractions
        rows.append(
            (
                stage.name,
                ", ".join(stage.trains) or "nothing",
                stage.source,
                f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}",
                f"{stage.steps:,}",
                f"{stage.tokens:,}",
                f"{stage.trainable_parameters:,}",
                size_text(stage.memory.total),
            )
        )
    worst = max(made.stages, key=lambda stage: stage.memory.total).memory
    totals = made.to_dict()["totals"]
    lines = [
        f"mode {made.mode}, vocabulary {made.vocab_size:,} ({made.vocab_source})"
        + (f", {made.n_rows:,} training rows" if made.n_rows is not None else ""),
        f"parameters {counts['total']:,}: embeddings {counts['embeddings']:,}, {each}, "
        f"final norm {counts['final_norm']:,}, {head}",
        "",
        format_table(rows),
        "",
        f"total: {totals['steps']:,} steps, {totals['tokens']:,} tokens",
        "memory at the largest stage (estimate): "
        + _parts(worst.total, weights=worst.weights, gradients=worst.gradients,
                 AdamW=worst.optimizer, activations=worst.activations, head=worst.head),
        "disk: "
        + _parts(made.disk.total, **{"activation cache": made.disk.activation_cache},
                 checkpoints=made.disk.checkpoints, backups=made.disk.backups,
                 model=made.disk.model),
    ]  # fmt: skip
    lines += [f"note: {note}" for note in made.notes]
    return "\n".join(lines)


def _parts(total: int, **parts: int) -> str:
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return f"{size_text(total)} ({listed})"


def size_text(size: float) -> str:
    """Bytes in powers of 1000: "13.9 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def info(options: argparse.Namespace) -> int:
    """``stackwise info``."""
    figures = machine_info()
    if options.json:
        print_json(figures)
        return 0
    for name, version in figures["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    cores, threads = figures["cpus"], figures["threads"]
    print(f"\n{figures['platform']}, {cores} CPUs, {threads} threads for torch")
    for device in figures["devices"]:
        print(f"{device['name']}: {device['description']}")
    if not figures["devices"]:
        print("no CUDA device: training runs on the CPU")
    print(figures["cuda_library"]["text"])
    print(f"STACKWISE_IMPL: {figures['preference'] or 'not set'}\n")
    rows = [("operation", "default", "because", "variants")]
    for operation, entry in figures["kernels"].items():
        variants = ", ".join(
            name if status == "ready" else f"{name} ({status})"
            for name, status in entry["variants"].items()
        )
        rows.append((operation, entry["default"], entry["because"], variants))
    print(format_table(rows))
    return 0


def machine_info() -> dict[str, Any]:
    """Versions, devices and kernel variants of this installation, as JSON types.

    ``kernels``: per operation its variants with their state, the default, the reason, and where
    the default depends on the case: ``prefers``, class of cases -> variant (else "torch").
    """
    import torch

    from stackwise import kernels
    from stackwise.kernels import _cuda

    preference = os.environ.get("STACKWISE_IMPL")
    library = _cuda.status()
    return {
        "versions": {
            "stackwise": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "cuda_library": {**library, "text": _cuda.describe(library)},
        "preference": preference,
        "kernels": {
            operation: {**_default(operation), "variants": variants}
            for operation, variants in kernels.available().items()
        },
    }


def _default(operation: str) -> dict[str, Any]:
    """What calls of ``operation`` take, and why."""
    from stackwise.kernels import dispatch, evidence

    asked = dispatch.preference(operation)
    if asked is not None:
        return {"default": asked[0], "because": asked[1], "prefers": {}}
    why = evidence.explain(operation)
    names = sorted({"torch", *why["prefers"].values()}, key=lambda name: name == "torch")
    return {
        "default": " or ".join(names),
        "because": why["text"],
        "prefers": why["prefers"],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": f"cuda:{index}",
        "description": f"{properties.name}, {size_text(properties.total_memory)}, sm {capability}",
    }


def bench(arguments: list[str]) -> int:
    """``stackwise bench ...``: hands over to the benchmarks that lie in a checkout."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "runner.py").is_file():
        print(
            "stackwise: error: the benchmarks are part of the source checkout and not of the "
            f"installed package (there is no {folder}): clone the repository and run "
            "`stackwise bench` or `make bench` in it",
            file=sys.stderr,
        )
        return 2
    code: int = _benchmarks_runner(folder).main(arguments)
    return code


def _benchmarks_runner(folder: Path) -> Any:
    """``benchmarks.runner`` of this checkout, whatever else on sys.path has that name."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("benchmarks.runner")


def tune(options: argparse.Namespace) -> int:
    """``stackwise tune``: proves and races the kernel variants, keeps the verdicts."""
    import torch

    from stackwise import tuning
    from stackwise.kernels import evidence

    if not torch.cuda.is_available():
        print(
            "stackwise: no CUDA device: nothing to tune; on a CPU every operation takes its torch "
            "variant",
            file=sys.stderr,
        )
        return 1
    machine = evidence.machine_of()
    if options.clear:
        file = evidence.cache_file(machine["gpu"])
        print(f"{file}: {'deleted' if file.exists() else 'there is none'}")
        file.unlink(missing_ok=True)
        return 0
    pairs = tuning.candidates(options.ops.split(",") if options.ops else None)
    start = time.monotonic()
    workers = min(8, os.cpu_count() or 1)
    with _progress(options.json) as progress:
        records = tuning.tune(
            tuning.Settings(pairs, "cuda:0", options.seconds, workers, progress=progress)
        )
    file = evidence.write_cache(machine, tuning.merged(evidence.read_cache(machine), records))
    seconds = time.monotonic() - start
    if options.json:
        print_json({"machine": machine, "seconds": seconds, "file": str(file), "verdicts": records})
    else:
        print(tune_text(records))
        print(f"{machine['gpu']}: {seconds:.0f} s; kept in {file}")
    return 0


def tune_text(records: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The verdicts for a terminal."""
    from stackwise.tuning import summary

    rows = [("operation", "variant", "verdict")]
    for op, variants in sorted(records.items()):
        rows += [(op, variant, summary(record)) for variant, record in sorted(variants.items())]
    table = format_table(rows)
    if any(verdict.startswith("not reached") for *_, verdict in rows):
        table += "\nnot reached: run it again, compiled kernels are kept; or give it more --seconds"
    return table


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr; nothing where another program reads."""
    from tqdm import tqdm

    with tqdm(disable=quiet or None, leave=False, unit="step") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what[:60])

        yield show
