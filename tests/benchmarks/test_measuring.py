"""Clocks, interleaving, quantiles and the memory count."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from benchmarks import memory, records, roofline, timing
from benchmarks.cases import Case, Options, Provider, Work

CPU = torch.device("cpu")
MEGA = 1 << 20


def case(rows: int = 64) -> Case:
    return Case(
        series="plain",
        x=("rows", "rows", rows),
        dtype=torch.float32,
        shape={},
        make=lambda device: {"x": torch.linspace(-1, 1, rows * 8).view(rows, 8)},
        wanted=("x",),
        work=Work(1, 1),
    )


def test_every_round_takes_one_sample_of_each_in_changing_order() -> None:
    calls: list[str] = []

    def sampler(name: str):
        def take() -> timing.Sample:
            calls.append(name)
            return {"speed": float(len(calls))}

        return take

    names = ["a", "b", "c"]
    samples = timing.interleave({n: sampler(n) for n in names}, seconds=0.0, least=6, most=99)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(turn) == names for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert all(len(taken) == 6 for taken in samples.values())


def test_rounds_go_on_while_there_is_time_up_to_the_most() -> None:
    def sleepy() -> timing.Sample:
        time.sleep(0.01)
        return {"speed": 1.0}

    assert len(timing.interleave({"a": sleepy}, seconds=60, least=2, most=5)["a"]) == 5
    assert 2 <= len(timing.interleave({"a": sleepy}, seconds=0.03, least=2, most=500)["a"]) < 50


def test_the_cpu_clock_times_the_call_and_not_its_preparation() -> None:
    def prepare():
        time.sleep(0.05)
        return lambda: time.sleep(0.02)

    sample = timing.CpuClock(flush=False).sample(prepare)
    assert sample["speed"] >= 20
    assert sample["cpu"] < 15, "sleeping is no work"

    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    sample = timing.CpuClock(flush=False).sample(lambda: busy)
    assert 20 <= sample["cpu"] < 40
    assert sample["speed"] >= sample["cpu"] - 1


@pytest.mark.parametrize(
    ("mode", "forward", "backward"), [("forward", 1, 0), ("backward", 0, 1), ("full", 1, 1)]
)
def test_modes_call_what_they_say(mode: str, forward: int, backward: int) -> None:
    counts = {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            counts["forward"] += 1
            return 2 * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            counts["backward"] += 1
            return 2 * grad

    work = timing.Workload(Provider("p", lambda x: Counted.apply(x)), case(), case().make(CPU))
    call = work.prepare(mode)
    before = dict(counts)
    call()
    assert counts["forward"] - before["forward"] == forward
    assert counts["backward"] - before["backward"] == backward


def test_a_provider_that_overwrites_sees_its_inputs_again() -> None:
    seen: list[Tensor] = []

    def in_place(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        out = x * 2
        x.data.zero_()
        return out

    shared = case().make(CPU)
    work = timing.Workload(Provider("p", in_place, overwrites=True), case(), shared)
    for _ in range(2):
        work.prepare("full")()
    assert all(torch.equal(x, case().make(CPU)["x"]) for x in seen)
    assert torch.equal(shared["x"], case().make(CPU)["x"]), "others read the shared tensors"


def test_memory_is_the_peak_of_a_known_function() -> None:
    x = torch.ones(MEGA)  # 4 MiB

    def two_and_a_short_third() -> Tensor:
        first = x * 2
        second = first + 1
        third = second[: MEGA // 2].clone()
        del third
        return second

    assert memory.peak_bytes(lambda: two_and_a_short_third, CPU) == int(2.5 * 4 * MEGA)
    assert memory.peak_bytes(lambda: x.neg_, CPU) == 0, "inputs do not count"


def test_memory_counts_buffers_that_operations_keep_between_calls() -> None:
    from stackwise.kernels.workspace import scratch

    def kept() -> None:
        scratch().take("benchmark test", (MEGA,), torch.empty(0), torch.float32)

    kept()
    assert memory.peak_bytes(lambda: kept, CPU) == 4 * MEGA


def test_memory_reports_what_the_call_raises() -> None:
    def fails() -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        memory.peak_bytes(lambda: fails, CPU)


def test_quantiles() -> None:
    assert records.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert records.quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_the_roofline_is_measured_in_the_units_it_says() -> None:
    class Fixed(timing.CpuClock):
        def sample(self, prepare):
            prepare()()
            return {"speed": 2.0}

    roof = roofline.measure(CPU, Fixed(flush=False), quick=True)
    assert roof.bytes_per_ms == 2 * (1 << 22) / 2.0
    assert roof.flops_per_ms == 2 * 256**3 / 2.0
    copy, product = roof.rows("op")
    assert copy.y_value_50 == pytest.approx((1 << 22) / 1e-3 / 1e9)
    assert product.y_value_50 == pytest.approx(256**3 / 1e-3 / 1e12)


def test_work_of_a_mode_adds_up() -> None:
    work = Work(2, 3, 5, 7)
    assert [work.of(mode) for mode in ("forward", "backward", "full")] == [(2, 5), (3, 7), (5, 12)]


def test_options_choose_the_device_that_is_there() -> None:
    assert Options().device.type == ("cuda" if torch.cuda.is_available() else "cpu")
