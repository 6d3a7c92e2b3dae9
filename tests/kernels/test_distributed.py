"""Two processes on a CPU: DistributedDataParallel and FSDP2 around a decoder of our operations end
with the parameters that one process gets from the whole batch."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stackwise.config import ModelConfig
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config

PROCESSES, STEPS = 2, 3
CASES = tuple(itertools.product(("ddp", "fsdp2"), ("gpt2", "llama")))
# A sum over the batch in two halves rounds otherwise than in one; AdamW's epsilon keeps a gradient
# that is 0 but for rounding (key biases) from becoming a step.
TOLERANCE = 2e-6

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


class Loss(nn.Module):
    """Mean masked-row loss as a module, so that wrappers see one forward call."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        config = ModelConfig(
            architecture=architecture, vocab_size=37, d_model=32, n_layers=2, n_heads=4, d_ff=48
        )
        torch.manual_seed(0)
        self.decoder = Decoder(resolve_model_config(config, seq_len=16))

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        hidden = self.decoder(ids).hidden
        return self.decoder.loss(hidden, target, reduction="mean")


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(37, (4, 16), generator=generator)
    return ids, ids.flip(1)


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    for step in range(STEPS):
        ids, target = batch(step)
        model(ids[rows], target[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    for wrapper, architecture in CASES:
        trained = train_wrapped(rank, wrapper, architecture)
        if rank == 0:
            torch.save(trained, f"{folder}/{wrapper}-{architecture}.pt")
    dist.destroy_process_group()


def train_wrapped(rank: int, wrapper: str, architecture: str) -> dict[str, Tensor]:
    model = Loss(architecture)
    size = 4 // PROCESSES
    rows = slice(rank * size, (rank + 1) * size)
    if wrapper == "ddp":
        train(nn.parallel.DistributedDataParallel(model), rows)
        return {name: p.detach() for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.decoder.blocks:
        fully_shard(block, mesh=mesh)
    # The loss uses the head's weight outside of the decoder's forward: one root unit holds it.
    fully_shard(model, mesh=mesh)
    train(model, rows)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of parameters for each of CASES, all from one pair of processes."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = (free_port(), str(folder))
    mp.start_processes(work, arguments, nprocs=PROCESSES, start_method="spawn")
    return folder


@pytest.mark.parametrize(("wrapper", "architecture"), CASES)
def test_two_processes_train_like_one(wrapper: str, architecture: str, trained: Path) -> None:
    found = torch.load(trained / f"{wrapper}-{architecture}.pt", weights_only=True)
    alone = Loss(architecture)
    train(alone, slice(None))
    expected = {name: p.detach() for name, p in alone.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        assert error <= TOLERANCE, f"{name}: off by {error:.3g}"
