"""Who sees whom: causal, bidirectional, windowed, padded; and switching between them."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.block import MLGKALayer

KINDS = ("llama", "gpt2", "gqa", "mla", "low_rank", "kernel", "mlgka")


def influence(model, length: int = 9, **arguments: object) -> torch.Tensor:
    """bool (L, L): whether token j changes the output at i, by gradient."""
    hidden = []
    handle = model.embeddings.register_forward_hook(lambda _, __, out: hidden.append(out))
    ids = torch.randint(0, 37, (1, length))
    output = model(ids, **arguments).hidden
    handle.remove()
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        (grad,) = torch.autograd.grad(output[0, i].sum(), hidden[0], retain_graph=True)
        seen[i] = grad[0].abs().sum(-1) > 0
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_switching_the_mode_switches_every_block(build_decoder, kind) -> None:
    model = build_decoder(kind)
    everything = torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(influence(model), everything)
    model.set_attention_mode("causal")
    assert model.attention_mode == "causal"
    assert torch.equal(influence(model), everything.tril())
    model.set_attention_mode("bidirectional")
    assert torch.equal(influence(model), everything)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_mask_hides_padding_and_keeps_causality(build_decoder, kind) -> None:
    model = build_decoder(kind)
    mask = torch.ones(1, 9)
    mask[0, 6:] = 0
    everything = torch.ones(6, 9, dtype=torch.bool)
    everything[:, 6:] = False
    assert torch.equal(influence(model, attention_mask=mask)[:6], everything)
    model.set_attention_mode("causal")
    assert torch.equal(influence(model, attention_mask=mask)[:6], everything.tril())


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_padded_rows_equal_shorter_rows(build_decoder, mode) -> None:
    model = build_decoder("llama", attention_mode=mode)
    ids = torch.randint(0, 37, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    padded = model(ids, attention_mask=mask).logits
    assert (padded[1, :5] - model(ids[1:, :5]).logits[0]).abs().max() <= 1e-6
    assert (padded[0] - model(ids[:1]).logits[0]).abs().max() <= 1e-6


def test_fully_padded_row_has_finite_values_and_gradients(build_decoder, gradients) -> None:
    model = build_decoder("llama", attention_mode="causal")
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    output = model(torch.randint(0, 37, (2, 6)), attention_mask=mask)
    output.logits.square().mean().backward()
    assert torch.isfinite(output.logits).all()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_window_reaches_as_far_as_it_says(build_decoder) -> None:
    model = build_decoder("window", n_layers=1)
    distance = torch.arange(9)[:, None] - torch.arange(9)[None]
    assert torch.equal(influence(model), distance.abs() <= 3)
    model.set_attention_mode("causal")
    assert torch.equal(influence(model), (distance >= 0) & (distance < 3))


def test_a_mask_of_the_wrong_shape_is_refused(build_decoder) -> None:
    model = build_decoder("llama")
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 5\)"):
        model(torch.zeros(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 5))


def test_unknown_mode_is_refused(build_decoder) -> None:
    with pytest.raises(ValueError, match="got 'prefix'; accepted: bidirectional, causal"):
        build_decoder("llama").set_attention_mode("prefix")


class TestMLGKALayer:
    def layer(self, **arguments: object) -> MLGKALayer:
        torch.manual_seed(0)
        return MLGKALayer(32, 48, 4, **arguments)  # type: ignore[arg-type]

    @pytest.mark.parametrize("kernel_type", ["gaussian", "laplacian", "uniform", "linear"])
    def test_mode_decides_what_a_token_sees(self, kernel_type) -> None:
        layer = self.layer(kernel_type=kernel_type, n_kv_heads=2, kernel_dim=16)
        x = torch.randn(2, 7, 32)
        later = x.clone()
        later[:, 5] += 1.0
        assert (layer(x) - layer(later))[:, 0].abs().max() > 1e-7
        layer.set_attention_mode("causal")
        assert torch.equal(layer(x)[:, :5], layer(later)[:, :5])
        assert layer(x).shape == x.shape

    def test_up_projection_is_frozen_by_default(self) -> None:
        layer = self.layer()
        layer(torch.randn(1, 5, 32)).sum().backward()
        assert layer.feed_forward.up_proj.weight.grad is None
        assert layer.feed_forward.gate_proj.weight.grad.abs().max() > 0
        trained = self.layer(freeze_up_proj=False)
        trained(torch.randn(1, 5, 32)).sum().backward()
        assert trained.feed_forward.up_proj.weight.grad.abs().max() > 0

    def test_packed_documents_equal_documents_alone(self) -> None:
        layer = self.layer(use_rope=True)
        x = torch.randn(1, 10, 32)
        packed = layer(x, cu_seqlens=torch.tensor([0, 4, 10]))
        assert (packed[:, :4] - layer(x[:, :4])).abs().max() <= 1e-6
        assert (packed[:, 4:] - layer(x[:, 4:])).abs().max() <= 1e-6

    def test_rope_makes_order_matter(self) -> None:
        x = torch.randn(1, 8, 32)
        flipped = x.flip(1)
        without, with_rope = self.layer(), self.layer(use_rope=True)
        assert (without(flipped).flip(1) - without(x)).abs().max() <= 1e-6
        assert (with_rope(flipped).flip(1) - with_rope(x)).abs().max() > 1e-6

    def test_wrong_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="n_heads"):
            MLGKALayer(30, 48, 4)
        with pytest.raises(ValueError, match="n_kv_heads: got 3"):
            MLGKALayer(32, 48, 4, n_kv_heads=3)
        with pytest.raises(ValueError, match="kernel_type: got 'cubic'"):
            MLGKALayer(32, 48, 4, kernel_type="cubic")
        with pytest.raises(ValueError, match="attention_mode: got 'left'"):
            MLGKALayer(32, 48, 4, attention_mode="left")
