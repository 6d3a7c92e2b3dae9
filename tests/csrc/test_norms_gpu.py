"""rms_norm and layer_norm of csrc/ on a GPU: test_norms' comparisons, and what only it has."""

from __future__ import annotations

import pytest
import torch

from stackwise import kernels
from stackwise.kernels.cuda_ops import norms
from tests.csrc.compare import DTYPES, IDS, check_layer_norm, check_rms_norm, draw
from tests.csrc.test_norms import SHAPES, gradients, poisoned

pytestmark = pytest.mark.gpu

TRAINING = [(4096, 768), (4096, 1024), (2048, 4096), (2048, 8192), (512, 16384)]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", [*SHAPES, *TRAINING], ids=str)
def test_forward_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    make = {"dtype": dtype, "device": "cuda"}
    x, residual = 2 * draw(*shape, **make) + 1, draw(*shape, **make)
    weight, bias = draw(shape[1], **make), draw(shape[1], **make)
    check_layer_norm(x, weight, bias)
    check_rms_norm(x, weight)
    check_layer_norm(x, weight, bias, residual)
    check_rms_norm(x, weight, residual, weight_offset=1.0)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_types(low: torch.dtype) -> None:
    x, residual = draw(239, 768, dtype=low, device="cuda"), draw(239, 768, device="cuda")
    check_layer_norm(x, draw(768, device="cuda"), draw(768, device="cuda"))
    check_rms_norm(x, draw(768, device="cuda"), residual)


def test_strided_and_unaligned() -> None:
    columns = poisoned(21, 88).cuda()
    columns[::3, 8:72] = draw(7, 64, device="cuda")
    weight = draw(64, device="cuda")
    check_layer_norm(columns[::3, 8:72], weight, weight)
    check_rms_norm(draw(5 * 64 + 1, device="cuda")[1:].view(5, 64), weight)
    check_rms_norm(draw(64, 7, device="cuda").T, weight)


@pytest.mark.parametrize("shape", [(4099, 768), (1000, 8192), (37, 16384)])
def test_the_same_bits_every_time(shape: tuple[int, int]) -> None:
    x = draw(*shape, dtype=torch.bfloat16, device="cuda")
    weight, bias = draw(shape[1], device="cuda"), draw(shape[1], device="cuda")
    first = gradients(norms.layer_norm, x, weight, bias)
    for _ in range(5):
        for pair in zip(first, gradients(norms.layer_norm, x, weight, bias), strict=True):
            assert torch.equal(*pair)


def test_the_public_function_reaches_it_and_compiles() -> None:
    x, weight = draw(64, 768, device="cuda"), draw(768, device="cuda")
    out = kernels.rms_norm(x, weight, impl="cuda")
    torch.testing.assert_close(out, kernels.rms_norm(x, weight, impl="reference"))
    compiled = torch.compile(lambda x, w: kernels.rms_norm(x, w, impl="cuda"), fullgraph=True)
    assert torch.equal(compiled(x, weight), out)


def test_it_runs_on_the_current_stream() -> None:
    x, weight = draw(4096, 4096, device="cuda"), draw(4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        doubled = x * 2
        out = norms.rms_norm(doubled, weight)
    stream.synchronize()
    assert torch.equal(out, norms.rms_norm(x * 2, weight))


def test_more_elements_than_32_bits_count() -> None:
    rows, width = 270_000, 8192
    assert rows * width > 1 << 31
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-3:] = draw(3, width, dtype=torch.bfloat16, device="cuda")
    weight = draw(width, device="cuda")
    assert torch.equal(norms.rms_norm(x, weight)[-3:], norms.rms_norm(x[-3:].clone(), weight))
