"""``patch``: losses, logits and gradients of the unpatched model, and back again."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stackwise
from stackwise.patching import patch

from .conftest import KINDS, largest_error, padded, tokens

FAMILIES = [kind for kind in KINDS if kind != "gpt_oss"]


def labelled(case: str = "left") -> dict[str, Any]:
    """Tokens after padding have no label: what padding predicts is nobody's business."""
    batch = padded([6, 0], [0, 0]) if case == "left" else padded([0, 0], [4, 0])
    mask = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return batch | {"labels": labels, "use_cache": False}


def loss_and_gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return results | {"loss": loss.detach()}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("case", ["left", "right"])
def test_training_step_equals_unpatched(kind: str, case: str, tiny: Callable[..., Any]) -> None:
    model = tiny(kind).train()
    batch = labelled(case)
    keys = list(model.state_dict())
    theirs = loss_and_gradients(model, batch)
    handle = patch(model)
    ours = loss_and_gradients(model, batch)
    assert list(model.state_dict()) == keys
    assert model(**batch).logits is None
    handle.revert()
    error, name = largest_error(ours, theirs)
    assert error <= 2e-5, (name, error)
    again = loss_and_gradients(model, batch)
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_part_is_replaced_and_given_back(kind: str, tiny: Callable[..., Any]) -> None:
    model = tiny(kind)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    norms = sum("Norm" in type(module).__name__ for module in model.modules())
    with patch(model, impl="reference") as handle:
        replaced = handle.replaced
        changed = [m for m in model.modules() if "forward" in vars(m)]
        assert len(changed) == sum(replaced.values()) - replaced["attention"]
        assert model.config._attn_implementation == "stackwise"
    assert replaced["attention"] == 2
    assert replaced["rope"] == (0 if kind == "gpt2" else 2)
    assert replaced["layer_norm"] == (norms if kind == "gpt2" else 0)
    assert replaced["rms_norm"] == (0 if kind == "gpt2" else norms)
    assert replaced["swiglu"] == 2
    assert replaced["linear_cross_entropy"] == 1
    assert model.config._attn_implementation == "eager"
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "option", ["rope", "rms_norm", "layer_norm", "swiglu", "linear_cross_entropy", "attention"]
)
def test_each_operation_runs_and_is_alone(
    option: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackwise import kernels
    from stackwise.kernels import dispatch

    called: set[str] = set()
    select = dispatch.select

    def recording(op: str, *args: Any, **kwargs: Any) -> Any:
        called.add(op)
        return select(op, *args, **kwargs)

    monkeypatch.setattr(dispatch, "select", recording)
    options = ["rope", "rms_norm", "layer_norm", "swiglu", "linear_cross_entropy", "attention"]
    kind = "gpt2" if option == "layer_norm" else "llama"
    model = tiny(kind).train()
    theirs = loss_and_gradients(model, labelled())
    with patch(model, **{name: name == option for name in options}):
        ours = loss_and_gradients(model, labelled())
    assert called == {option}
    assert hasattr(kernels, option)
    error, name = largest_error(ours, theirs)
    assert error <= 2e-5, (name, error)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "deepseek_v3"])
def test_loss_arguments(kind: str, tiny: Callable[..., Any]) -> None:
    """num_items_in_batch (number, tensor), ignore_index and shift_labels as in Transformers."""
    model = tiny(kind).train()
    batch = labelled()
    other = batch["labels"].masked_fill(batch["labels"] == -100, 7)
    shifted = torch.roll(batch["labels"], -1, dims=1)
    for extra in (
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(13)},
        {"labels": other, "ignore_index": 7},
        {"shift_labels": shifted},
    ):
        theirs = loss_and_gradients(model, batch | extra)
        with patch(model):
            ours = loss_and_gradients(model, batch | extra)
        error, name = largest_error(ours, theirs)
        assert error <= 2e-5, (extra.keys(), name, error)


def test_when_logits_are_skipped(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    batch = labelled("right")
    expected = model(**batch)
    real = batch["attention_mask"].bool()
    with patch(model):
        evaluated = model(**batch)
        assert (evaluated.logits - expected.logits)[real].abs().max() <= 1e-5
        assert (evaluated.loss - expected.loss).abs() <= 1e-5
        skipped = model(**batch, skip_logits=True)
        assert skipped.logits is None
        assert (skipped.loss - expected.loss).abs() <= 1e-5
        model.train()
        assert model(**batch).logits is None
        assert model(**batch, skip_logits=False).logits is not None
        assert model(batch["input_ids"]).logits is not None
        pair = model(**batch, return_dict=False)
        assert (pair[0] - expected.loss).abs() <= 1e-5
        hidden = model(**batch, output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        for inputs in ({"input_ids": batch["input_ids"]}, batch | {"logits_to_keep": 3}):
            with pytest.raises(ValueError, match="skip_logits: got True; accepted: with labels"):
                model(**inputs, skip_logits=True)
        parameters = inspect.signature(model.forward).parameters
        assert "labels" in parameters
        assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_generate_of_a_patched_model(tiny: Callable[..., Any]) -> None:
    for kind in ("qwen3", "deepseek_v3"):
        model = tiny(kind)
        expected = model.generate(tokens(), max_new_tokens=8, do_sample=False)
        with patch(model):
            assert torch.equal(
                model.generate(tokens(), max_new_tokens=8, do_sample=False), expected
            )


def test_a_copy_of_a_patched_model_is_a_model_of_its_own(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").train()
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert model(**labelled()).loss != twin(**labelled()).loss
    assert twin.forward.__self__ is twin


def test_other_models_do_not_notice(tiny: Callable[..., Any]) -> None:
    model, other = tiny("llama"), tiny("llama")
    expected = other(**labelled()).logits
    patch(model)
    assert not any("forward" in vars(m) for m in other.modules())
    assert other.config._attn_implementation == "eager"
    assert torch.equal(other(**labelled()).logits, expected)


def test_model_without_a_head(tiny: Callable[..., Any]) -> None:
    model = tiny("mistral").model
    expected = model(tokens()).last_hidden_state
    with patch(model) as handle:
        assert handle.replaced["linear_cross_entropy"] == 0
        assert (model(tokens()).last_hidden_state - expected).abs().max() <= 1e-5


def test_bfloat16_step(tiny: Callable[..., Any]) -> None:
    """Gradients as close to float32 as those of the unpatched model."""
    model = tiny("llama").to(torch.bfloat16).train()
    exact = loss_and_gradients(copy.deepcopy(model).float(), labelled())
    theirs = loss_and_gradients(model, labelled())
    with patch(model):
        ours = loss_and_gradients(model, labelled())
    for name, truth in exact.items():
        bound = 2 * (theirs[name].float() - truth).norm() + 2**-8 * truth.norm()
        assert (ours[name].float() - truth).norm() <= bound, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_step(kind: str, tiny: Callable[..., Any]) -> None:
    model = tiny(kind).train()
    exact = loss_and_gradients(model, labelled())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = loss_and_gradients(model, labelled())
        patch(model)
        ours = loss_and_gradients(model, labelled())
    for name, truth in exact.items():
        bound = 2 * (theirs[name] - truth).norm() + 2**-8 * truth.norm()
        assert (ours[name] - truth).norm() <= bound, name


class ModulesToSaveWrapper(nn.Module):
    """PEFT's layer of this name, as far as it is used here."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})
        self.active_adapter = ["default"]
        self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        disabled = self.disable_adapters
        return (self.original_module if disabled else self.modules_to_save["default"])(x)


class BaseTunerLayer:
    """PEFT's base of layers with an adapter."""


class LoraLinear(nn.Linear, BaseTunerLayer):
    pass


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model


def test_head_that_peft_saves(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").train()
    model.lm_head = ModulesToSaveWrapper(model.lm_head)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    for disabled in (False, True):
        model.lm_head.disable_adapters = disabled
        theirs = loss_and_gradients(model, labelled())
        handle = patch(PeftModel(model))
        ours = loss_and_gradients(model, labelled())
        handle.revert()
        assert ("lm_head.original_module.weight" in ours) == disabled
        error, name = largest_error(ours, theirs)
        assert error <= 2e-5, (name, error)


def test_refused_models_stay_as_they_are(tiny: Callable[..., Any]) -> None:
    def refused(model: nn.Module, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            patch(model, **options)
        assert not any("forward" in vars(module) for module in model.modules())

    refused(nn.Linear(2, 2), r"model: got Linear; accepted: .*llama.*gpt2")
    refused(tiny("gpt_oss"), "model: got model_type 'gpt_oss'; accepted")
    refused(tiny("llama"), "impl: got 'fast'", impl="fast")
    refused(tiny("llama", hidden_act="relu"), "swiglu: got a model with the activation 'relu'")
    model = tiny("llama")
    model.lm_head = LoraLinear(32, 61, bias=False)
    refused(model, "linear_cross_entropy: got LoraLinear as lm_head")
    model = tiny("llama")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    refused(model, "loss function of its own")
    patch(model, linear_cross_entropy=False).revert()
    model = tiny("llama")
    for layer in model.model.layers:
        layer.input_layernorm = nn.RMSNorm(32)
        layer.post_attention_layernorm = nn.RMSNorm(32)
    model.model.norm = nn.RMSNorm(32)
    refused(model, "rms_norm: got a model without a module of the class LlamaRMSNorm")


def test_twice_and_out_of_order(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    handle = patch(model)
    with pytest.raises(ValueError, match=r"has a forward of its own already \(patched before\?\)"):
        patch(model)
    norm = model.model.norm
    ours = norm.forward
    norm.forward = lambda x: x
    with pytest.raises(RuntimeError, match="LlamaRMSNorm was replaced again after patching"):
        handle.revert()
    norm.forward = ours
    handle.revert()
    handle.revert()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_wrapper_of_a_trainer_outlives_the_patch(tiny: Callable[..., Any]) -> None:
    """Mixed precision of accelerate takes the function of the forward and binds its own."""
    model = tiny("llama").train()
    expected = model(**labelled())
    handle = patch(model)
    inner = model.forward.__func__
    model.forward = types.MethodType(lambda self, **inputs: inner(self, **inputs), model)
    assert model(**labelled()).logits is None
    handle.revert()
    after = model(**labelled())
    assert torch.equal(after.logits, expected.logits)
    assert torch.equal(after.loss, expected.loss)


def test_public_name() -> None:
    assert stackwise.patch is patch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_step(kind: str, tiny: Callable[..., Any]) -> None:
    """Traced from the patched forwards: the rotation that the layers' file defines must not run."""
    import transformers.models.llama.modeling_llama as file

    model = tiny(kind).train()
    theirs = loss_and_gradients(model, labelled("right"))
    patch(model)
    torch._dynamo.reset()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the original rotation ran")

    original, file.apply_rotary_pos_emb = file.apply_rotary_pos_emb, never
    try:
        ours = loss_and_gradients(torch.compile(model, backend="aot_eager"), labelled("right"))
    finally:
        file.apply_rotary_pos_emb = original
    ours = {name.removeprefix("_orig_mod."): value for name, value in ours.items()}
    error, name = largest_error(ours, theirs)
    assert error <= 2e-5, (name, error)
