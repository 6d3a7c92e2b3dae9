"""Loads the library built from csrc/ and binds its functions.

The library is optional: without nvcc at installation time there is none, and every operation keeps
its other variants. ``python -m stackwise.kernels._cuda`` prints its state.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ABI_VERSION = 2  # SW_ABI_VERSION in csrc/abi.h
LIBRARY = Path(__file__).resolve().parent / "libstackwise_cuda.so"


class Record:
    """The one argument of a function that launches kernels: a C struct of csrc/, packed.

    Pointers that the kernels read come first, then those they write, then the numbers in the format
    of :mod:`struct`, the stream last. ``pack(...)`` takes one value for each, 0 for no pointer. One
    packed struct costs a quarter of the host time of 16 ctypes arguments.
    """

    def __init__(self, reads: str, writes: str, numbers: str) -> None:
        self.reads = tuple(reads.split())
        self.writes = tuple(writes.split())
        layout = struct.Struct(f"{len(self.reads) + len(self.writes)}Q{numbers}Q")
        self.pack, self.unpack, self.size = layout.pack, layout.unpack, layout.size


# SwNormForward and SwNormBackward in csrc/norms_host.h.
NORM_FORWARD = Record("x residual weight bias", "y summed stats", "4q2f2i")
NORM_BACKWARD = Record("dy dsummed s weight stats", "ds partial dweight dbias", "5qf3i")
RECORDS = {"sw_norm_forward": NORM_FORWARD, "sw_norm_backward": NORM_BACKWARD}

_pointer, _int, _int64, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sw_build_archs": (_text, []),
    "sw_error_string": (_text, [_int]),
    "sw_measure_copy": (_int, [_pointer, _pointer, _int64, _pointer]),
    **{name: (_int, [ctypes.c_char_p]) for name in RECORDS},
}


class CudaLibraryError(RuntimeError):
    """The library is missing, cannot be loaded or is of another version; or a launch failed."""


def load(path: Path | None = None) -> ctypes.CDLL:
    """The library at ``path`` (default: beside this file), loaded once, its functions typed.

    Raises :class:`CudaLibraryError` with the reason and the remedy. Needs no GPU.
    """
    return _load(path or LIBRARY)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    remedy = "run `STACKWISE_CUDA=1 pip install -e .` (or `make build-cuda`), which needs nvcc"
    if not path.is_file():
        raise CudaLibraryError(f"{path.name} was not built with this installation; {remedy}")
    try:
        library = ctypes.CDLL(str(path))
        abi = int(library.sw_abi_version())
    except (OSError, AttributeError) as error:
        raise CudaLibraryError(f"{path} cannot be loaded ({error}); {remedy}") from error
    if abi != ABI_VERSION:
        raise CudaLibraryError(
            f"{path} has interface version {abi}, this package needs {ABI_VERSION}; {remedy}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def status(path: Path | None = None) -> dict[str, Any]:
    """State of the library for ``stackwise info``.

    ``built``: it is there and fits; ``path``; ``abi``: its interface version; ``archs``: what it
    was compiled for, such as ``["80", "90a", "100a"]``; ``reason``: why it is not usable, or None.
    """
    path = path or LIBRARY
    try:
        library = load(path)
    except CudaLibraryError as error:
        return {"built": False, "path": None, "abi": None, "archs": [], "reason": str(error)}
    archs = library.sw_build_archs().decode().split(";")
    return {"built": True, "path": str(path), "abi": ABI_VERSION, "archs": archs, "reason": None}


def check(code: int) -> None:
    """Raises :class:`CudaLibraryError` with CUDA's own text when ``code`` is not 0."""
    if code != 0:
        text = load().sw_error_string(code).decode()
        raise CudaLibraryError(f"CUDA error {code}: {text}")


def measure_copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Copies ``src`` into ``dst`` with the kernel that benchmarks take the bandwidth from.

    Two contiguous CUDA tensors of any dtype on one device, of the same number of bytes, not
    overlapping, each starting at a multiple of 16 bytes. Runs on the current stream; moves twice
    the bytes of ``src``.
    """
    import torch

    size = src.numel() * src.element_size()
    for name, tensor in (("dst", dst), ("src", src)):
        if tensor.device.type != "cuda" or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: got a tensor on {tensor.device}, contiguous={tensor.is_contiguous()}; "
                "accepted: contiguous CUDA tensors"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name}: starts at {tensor.data_ptr():#x}; accepted: 16-byte aligned")
    if dst.device != src.device or dst.numel() * dst.element_size() != size:
        raise ValueError(
            f"dst: got {dst.numel() * dst.element_size()} bytes on {dst.device}; "
            f"accepted: those of src, {size} bytes on {src.device}"
        )
    with torch.cuda.device(src.device):
        stream = torch._C._cuda_getCurrentRawStream(src.device.index)
        check(load().sw_measure_copy(dst.data_ptr(), src.data_ptr(), size, stream))


def describe(state: dict[str, Any]) -> str:
    """One line for people out of :func:`status`."""
    if not state["built"]:
        return f"CUDA kernels: not available: {state['reason']}"
    return f"CUDA kernels: {', '.join(f'sm_{arch}' for arch in state['archs'])} ({state['path']})"


if __name__ == "__main__":
    print(describe(status()))
