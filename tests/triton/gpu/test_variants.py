"""Every Triton and CUDA variant on a GPU: the oracle's cases, in a process that may crash; and what
only a GPU shows: offsets beyond 2³¹ elements, streams, graphs, compilation.

Run with ``pytest --run-gpu``. In Triton's interpreter the same kernels are tested on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from stackwise import kernels, tuning
from stackwise.kernels import dispatch, oracle, oracle_cases

pytestmark = pytest.mark.gpu

DTYPES = ("bf16", "fp16", "fp32")
PAIRS = tuning.candidates()
ELEMENTWISE = ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "bias_gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "variant"), PAIRS)
def test_follows_its_reference_and_repeats_its_bits(op: str, variant: str, dtype: str) -> None:
    settings = tuning.Settings([(op, variant)], "cuda:0", 300.0, 4, [dtype])
    record = tuning.prove(settings, 300.0)[op, variant]
    assert record["status"] in ("validated", "covers no case here"), record


def arguments(op: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
    """Those of the operation's first raced case."""
    return oracle_cases.races(op)[0].build(oracle.Maker("cuda", dtype))


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_offsets_beyond_2_to_the_31_elements(op: str) -> None:
    rows, width = (1 << 31) // 4096 + 3, 4096
    size = 2 * rows * width
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip(f"needs {6 * size >> 30} GiB of free GPU memory")
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    vector = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    last = slice(-3, None)
    if op == "rope":
        table = torch.randn(rows, 64, device="cuda")
        x, small = x.view(rows, 64, 64), x[last].view(3, 64, 64)
        whole = kernels.rope(x, x[:, :1], table, table, impl="triton")[0][last]
        alone = kernels.rope(small, small[:, :1], table[last], table[last], impl="triton")[0]
    else:
        others = {
            "swiglu": lambda y: (y, y),
            "geglu": lambda y: (y, y),
            "bias_gelu": lambda y: (y, vector),
            "rms_norm": lambda y: (y, vector),
            "layer_norm": lambda y: (y, vector, vector),
        }[op]
        function = getattr(kernels, op)
        whole = function(*others(x), impl="triton")[last]
        alone = function(*others(x[last]), impl="triton")
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_in_a_cuda_graph_and_on_another_stream(op: str) -> None:
    made, function = arguments(op), getattr(kernels, op)

    def first(result: object) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]

    expected = first(function(**made, impl="triton"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = first(function(**made, impl="triton"))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(elsewhere, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = first(function(**made, impl="triton"))
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_compiled_by_inductor_as_one_graph(op: str) -> None:
    made, function = arguments(op), getattr(kernels, op)
    compiled = torch.compile(lambda **inputs: function(**inputs, impl="triton"), fullgraph=True)
    for ours, eager in zip(
        oracle._outputs(compiled(**made)),
        oracle._outputs(function(**made, impl="triton")),
        strict=True,
    ):
        assert torch.equal(ours, eager)


def test_a_default_by_evidence_is_the_variant_it_names() -> None:
    from stackwise.kernels import evidence

    table = evidence.table(0)
    for op, classes in table.preferred.items():
        for case in oracle_cases.races(op):
            for dtype in case.dtypes:
                made = case.build(oracle.Maker("cuda", oracle.DTYPES[dtype]))
                bound = oracle._bound_arguments(op, made)
                name = classes.get(oracle.case_class(op, (), bound) or "", "torch")
                first, *rest = bound.values()
                keywords = dict(zip(list(bound)[1:], rest, strict=True))
                taken = dispatch.select(op, None, first, **keywords)
                assert taken is dispatch.variant(op, name).function, (op, case.label)
