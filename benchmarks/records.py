"""One measured figure as a row: the columns, where it was measured, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import stackwise

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure with its 20%, 50% and 80% quantiles; the columns of every file in results/."""

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str
    metric_name: str
    metric_unit: str
    x_name: str
    x_label: str
    x_value: float
    y_value_50: float
    y_value_20: float
    y_value_80: float
    extra_benchmark_config_str: str
    gpu_name: str
    timestamp: str
    stackwise_version: str
    torch_version: str
    triton_version: str
    git_sha: str


COLUMNS = [field.name for field in dataclasses.fields(Row)]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20%, 50% and 80% quantiles; those of one value are the value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def make_row(
    name: str,
    provider: str,
    mode: str,
    values: Sequence[float],
    *,
    metric: tuple[str, str],
    x: tuple[str, str, float],
    extra: dict[str, Any],
) -> Row:
    """A row from repeated measurements; ``metric`` is (name, unit), ``x`` (name, label, value)."""
    low, middle, high = quantiles(values)
    return Row(
        kernel_name=name,
        kernel_provider=provider,
        kernel_operation_mode=mode,
        metric_name=metric[0],
        metric_unit=metric[1],
        x_name=x[0],
        x_label=x[1],
        x_value=x[2],
        y_value_50=middle,
        y_value_20=low,
        y_value_80=high,
        extra_benchmark_config_str=json.dumps(extra, sort_keys=True),
        gpu_name=device_name(),
        timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        stackwise_version=stackwise.__version__,
        torch_version=torch.__version__,
        triton_version=_triton_version(),
        git_sha=_git_sha(),
    )


@functools.cache
def device_name() -> str:
    """The GPU's name, or the CPU's with its thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"CPU {name}, {threads} thread{'s' * (threads > 1)}"


def results_file(bench: str) -> pathlib.Path:
    """results/<device>/<bench>.csv."""
    device = device_name().lower() if torch.cuda.is_available() else "cpu"
    return RESULTS / device.replace(" ", "-") / f"{bench.replace('-', '_')}.csv"


def write_csv(rows: Iterable[Row], file: pathlib.Path) -> None:
    """Replaces ``file`` by ``rows``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def append_csv(rows: Iterable[Row], file: pathlib.Path) -> None:
    """Adds ``rows`` to ``file`` in one write that a kill of this process cannot undo."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    if not file.exists():
        writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.getvalue().encode())
    finally:
        os.close(handle)


def read_csv(file: pathlib.Path) -> list[Row]:
    """The rows of ``file``, none without it; a last line that a kill cut off is left out."""
    if not file.exists():
        return []
    text = file.read_bytes().decode(errors="replace")
    whole = text[: text.rfind("\n") + 1]
    numbers = {field.name for field in dataclasses.fields(Row) if field.type == "float"}
    return [
        Row(**{name: float(v) if name in numbers else v for name, v in record.items()})
        for record in csv.DictReader(io.StringIO(whole, newline=""))
    ]


def to_json(row: Row) -> str:
    """The row as one line of JSON; a figure that is not finite becomes null."""
    values = dataclasses.asdict(row)
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v
              for k, v in values.items()}  # fmt: skip
    return json.dumps(finite)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


@functools.cache
def _git_sha() -> str:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
