"""Tensors come back bit for bit, whatever their dtype, strides and sharing."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from stackwise.runs.errors import RunError
from stackwise.runs.tensor_file import (
    DTYPE_NAMES,
    read_header,
    read_tensors,
    stored_bytes,
    write_tensors,
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_kinds() -> dict[str, torch.Tensor]:
    raw = torch.randint(0, 256, (6 * 8,), dtype=torch.uint8)
    tensors = {
        str(dtype): raw[: 6 * dtype.itemsize].view(dtype).reshape(2, 3)
        for dtype in DTYPE_NAMES
        if dtype != torch.bool
    }
    base = torch.randn(4, 6)
    return tensors | {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.25, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "transposed": base.t(),
        "every_second": base[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "overlap_1": base[:3],
        "overlap_2": base[1:],
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


def test_every_dtype_stride_and_overlap_round_trips_bit_for_bit(tmp_path):
    tensors = all_kinds()
    digest = write_tensors(tmp_path / "t", tensors)
    assert digest == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()
    loaded = read_tensors(tmp_path / "t")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor.detach()), name


def test_file_is_standard_safetensors_in_both_directions(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.ones(1, dtype=torch.int8)}
    write_tensors(tmp_path / "ours", tensors, {"note": "x"})
    save_file(tensors, tmp_path / "theirs")
    for loaded in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    weight = torch.randn(50, 8)
    tensors = {"embedding": weight, "head": weight, "copy": weight.clone()}
    write_tensors(tmp_path / "t", tensors)
    assert stored_bytes(tensors) == 2 * 50 * 8 * 4
    assert set(read_header(tmp_path / "t")[0]) == {"embedding", "copy"}
    loaded = read_tensors(tmp_path / "t")
    assert torch.equal(loaded["head"], weight)
    assert loaded["head"].data_ptr() == loaded["embedding"].data_ptr()
    assert loaded["copy"].data_ptr() != loaded["embedding"].data_ptr()


def test_loaded_tensors_can_be_changed_without_changing_the_file(tmp_path):
    write_tensors(tmp_path / "t", {"a": torch.zeros(4)})
    read_tensors(tmp_path / "t")["a"].add_(1)
    assert read_tensors(tmp_path / "t")["a"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(2).to_sparse(), "x has layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "x has layout .* on device meta"),
        (torch.zeros(2, dtype=torch.complex64), "x has dtype torch.complex64; accepted: float64"),
        ([1.0], "x is a list"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, tensor, message):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "t", {"x": tensor})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_a_run_error(tmp_path, keep):
    write_tensors(tmp_path / "t", {"a": torch.randn(10)})
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:keep])
    with pytest.raises(RunError, match="t is damaged"):
        read_tensors(tmp_path / "t")


def test_missing_file_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="nothing is missing"):
        read_tensors(tmp_path / "nothing")
