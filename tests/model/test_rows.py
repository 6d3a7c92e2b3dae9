"""Asking for some rows gives what the full pass gives at these rows, gradients included."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.layout import Layout
from stackwise.model.rows import select_rows

KINDS = (
    "llama", "gpt2", "gqa", "mla", "low_rank", "kernel", "mlgka", "post_norm", "window",
)  # fmt: skip
ROWS = torch.tensor([0, 3, 4, 9, 23, 24, 40, 47])


def layouts() -> dict[str, Layout]:
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 20:] = False
    return {
        "dense": Layout.dense(2, 24),
        "packed": Layout.packed(2, 24, torch.tensor([0, 7, 12, 24, 25, 48])),
        "padded": Layout.from_attention_mask(mask),
    }


@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_full_pass(build_decoder, gradients, kind, mode, layout) -> None:
    model = build_decoder(kind, attention_mode=mode)
    model.set_attention_mode(mode)
    arrangement = layouts()[layout]
    ids = torch.randint(0, 37, (2, 24))
    weights = torch.randn(len(ROWS), 32)

    full = model.run_blocks(model.embed(ids, arrangement), arrangement).flatten(0, 1)[ROWS]
    (full * weights).mean().backward()
    expected = gradients(model)
    selected = model.run_blocks(model.embed(ids, arrangement), arrangement, rows=ROWS)
    (selected * weights).mean().backward()
    result = gradients(model)

    assert selected.shape == (8, 32)
    assert (selected - full).abs().max() <= 1e-6 * max(1.0, full.abs().max())
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (result[name] - value).abs().max() <= 1e-6, name


def test_bidirectional_rows_compute_only_their_queries(build_decoder) -> None:
    model = build_decoder("llama", n_layers=1)
    seen = {}
    attention = model.blocks[0].attention
    for name in ("q_proj", "k_proj", "out_proj"):
        getattr(attention, name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0].shape[:-1].numel())
        )
    model.blocks[0].feed_forward.register_forward_hook(
        lambda _, inputs, __: seen.__setitem__("feed_forward", inputs[0].shape[0])
    )
    model(torch.randint(0, 37, (2, 24)), rows=ROWS)
    assert seen == {"q_proj": 8, "k_proj": 48, "out_proj": 8, "feed_forward": 8}


def test_logits_of_rows_equal_the_full_logits(build_decoder) -> None:
    model = build_decoder("gpt2")
    ids = torch.randint(0, 37, (2, 24))
    full = model(ids).logits.flatten(0, 1)[ROWS]
    assert (model(ids, rows=ROWS).logits - full).abs().max() <= 1e-6


def test_no_rows_give_an_empty_result(build_decoder) -> None:
    model = build_decoder("llama")
    none = torch.empty(0, dtype=torch.int64)
    output = model(torch.randint(0, 37, (2, 24)), rows=none)
    assert output.logits.shape == (0, 37)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([3, 3]),
        torch.tensor([4, 2]),
        torch.tensor([0, 48]),
        torch.tensor([-1, 2]),
        torch.tensor([[1, 2]]),
        torch.tensor([1, 2], dtype=torch.int32),
    ],
    ids=["repeated", "descending", "too large", "negative", "two-dimensional", "int32"],
)
def test_wrong_rows_are_refused(build_decoder, rows) -> None:
    model = build_decoder("llama")
    with pytest.raises(ValueError, match=r"rows: got .* accepted: ascending unique int64"):
        model(torch.randint(0, 37, (2, 24)), rows=rows)


def test_rows_without_blocks_select_the_input(build_decoder) -> None:
    model = build_decoder("llama")
    hidden = torch.randn(2, 24, 32)
    selected = model.run_blocks(hidden, Layout.dense(2, 24), 1, 1, rows=ROWS)
    assert torch.equal(selected, hidden.flatten(0, 1)[ROWS])


def test_select_rows_gradients_in_float64() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 4, 9])
    assert torch.autograd.gradcheck(lambda x: select_rows(x, rows), (x,))
    assert torch.autograd.gradgradcheck(lambda x: select_rows(x, rows).square(), (x,))
