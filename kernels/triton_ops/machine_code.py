"""Compiles kernels for GPUs that are not there, and reads what the hardware would run.

Each module of kernels lists in ``machine_code_cases(arch)`` every launch configuration that its
plan may choose; :func:`inspect` compiles one and :func:`faults` judges it: no spills, no more
shared memory than a block may have, and the planned instructions present. Needs a process in which
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import ARCHITECTURES

MODULES = (
    "gated",
    "bias_gelu",
    "rope",
    "norms",
    "attention_cases",
    "linear_attention_cases",
    "linear_cross_entropy",
    "quantized_matmul",
    "reduction",
)

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# A Hopper matrix instruction whose left operand comes from registers.
REGISTER_A = r"HGMMA\S* R\d+, R\d+, gdesc"

# What a loaded or stored vector of 16 bytes looks like.
VECTOR_LOAD, VECTOR_STORE = r"LDG\.E\S*\.128", r"STG\.E\S*\.128"

TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One kernel in one launch configuration on one architecture (90 is sm_90, compiled as sm_90a).

    ``signature`` gives the Triton type of each runtime argument ("*bf16", "i32", "fp32", ...), in
    any order; ``constants`` the constexpr ones. Pointers, and the integers in ``aligned``, count
    as multiples of 16, as the launcher finds them for well-aligned tensors. ``expects`` are regular
    expressions that must each match an operation of the machine code, or, with a space in them, an
    operation with its operands.
    """

    kernel: Any
    arch: int
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    expects: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Kernel, types of its pointers in order, constants: "rope_kernel[bf16 PAIRS=32 ...]"."""
        types = [self.signature.get(name, "") for name in self.kernel.arg_names]
        pointers = [kind[1:] for kind in types if kind.startswith("*")]
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        return f"{self.kernel.fn.__name__.strip('_')}[{' '.join([*pointers, *constants])}]"

    @property
    def digest(self) -> str:
        """Changes with the source of the kernel and of what it calls, and with the launch."""
        sources = sorted(_sources(self.kernel).items())
        config = (
            self.arch,
            sorted(self.signature.items()),
            sorted(self.constants.items(), key=str),
        )
        rest = (self.num_warps, self.num_stages, self.aligned, sorted(self.options.items()))
        return hashlib.sha256(repr((sources, config, rest)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Report:
    """What the machine code of a :class:`Case` uses. ``spills`` counts local-memory instructions,
    ``shared`` is in bytes, ``stack`` in bytes per thread."""

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    stack: int
    shared: int
    instructions: int
    vector_loads: int
    vector_stores: int
    matrix_instructions: int
    tma_instructions: int
    missing: str
    digest: str
    triton_version: str


COLUMNS = tuple(Report.__dataclass_fields__)


def cases() -> Iterator[Case]:
    """Every configuration that any kernel may launch, on every architecture."""
    for name in MODULES:
        module = importlib.import_module(f".{name}", __package__)
        for arch in ARCHITECTURES:
            yield from module.machine_code_cases(arch)


def inspect(case: Case) -> Report:
    """Compiles ``case`` and counts."""
    compiled = _compile(case)
    usage, sass = _disassemble(compiled.asm["cubin"])
    operations = re.findall(
        r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?\s*([A-Z][A-Z0-9_]*[.A-Z0-9_]*)", sass
    )
    classes = Counter(operation.split(".")[0] for operation in operations)
    counted = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counted is None or not operations:
        raise RuntimeError(f"{case.name}: unreadable machine code: {usage[:200]!r}")

    def found(pattern: str) -> bool:
        return bool(re.search(pattern, sass)) if " " in pattern else count(pattern + r"\S*") > 0

    def count(pattern: str) -> int:
        return sum(1 for operation in operations if re.fullmatch(pattern, operation))

    return Report(
        kernel=case.name,
        arch=case.arch,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        registers=int(counted[1]),
        spills=classes["LDL"] + classes["STL"],
        stack=int(counted[2]),
        shared=compiled.metadata.shared,
        instructions=len(operations),
        vector_loads=count(VECTOR_LOAD + r"\S*"),
        vector_stores=count(VECTOR_STORE + r"\S*"),
        matrix_instructions=count(r"(UTC)?[HQIO]?G?MMA\S*"),
        tma_instructions=count(r"(UTMA(LDG|STG|REDG)|UBLKCP)\S*"),
        missing=" ".join(p for p in case.expects if not found(p)),
        digest=case.digest,
        triton_version=triton.__version__,
    )


def faults(report: Report) -> list[str]:
    """What is wrong with it, in words; empty when nothing is."""
    found = []
    if report.spills:
        found.append(f"{report.spills} spill instructions")
    if report.shared > SHARED_LIMIT[report.arch]:
        limit = SHARED_LIMIT[report.arch]
        found.append(f"{report.shared} bytes of shared memory, a block has {limit}")
    if report.missing:
        found.append(f"no instruction matches {report.missing}")
    return [f"{report.kernel} on sm_{report.arch}: {fault}" for fault in found]


def as_record(report: Report) -> dict[str, Any]:
    return asdict(report)


def _compile(case: Case) -> Any:
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = "constexpr" if name in case.constants else case.signature[name]
        signature[name] = kind
        if kind.startswith("*") or name in case.aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    # The default of 3.6 to 3.9, said aloud: 3.9 warns that it will change.
    options.setdefault("enable_fp_fusion", True)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [str(tools / tool), flag, file.name],
                capture_output=True,
                text=True,
                env=environment,
                check=True,
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        ]
    return texts[0], texts[1]


@cache
def _sources(kernel: Any) -> dict[str, str]:
    """Source of ``kernel`` and of the Triton functions it calls, by name."""
    found = {kernel.fn.__name__: kernel.src}
    for name in sorted(set(re.findall(r"[A-Za-z_]\w*", kernel.src))):
        value = kernel.fn.__globals__.get(name)
        if isinstance(value, triton.runtime.JITFunction) and value is not kernel:
            found |= _sources(value)
        elif isinstance(value, triton.language.constexpr):
            found[name] = repr(value.value)
    return found
