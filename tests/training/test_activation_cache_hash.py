"""The hash of prefix weights changes with everything the prefix computes from."""

from __future__ import annotations

import torch
from torch import nn

from stackwise.training.activation_cache import parameters_hash


def test_parameters_hash_sees_names_dtypes_shapes_values_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    reference = parameters_hash(model)
    assert reference == parameters_hash(model.state_dict())
    assert len(reference) == 64
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = state["0.weight"]
    variants = [
        state | {"0.weight": weight.nextafter(torch.tensor(9.0))},
        state | {"0.weight": weight.reshape(2, 3)},
        state | {"0.bias": state["0.bias"].view(torch.int32)},
        state | {"1.running_mean": state["1.running_mean"] + 1},
        {("x" if name == "0.bias" else name): tensor for name, tensor in state.items()},
    ]
    hashes = {parameters_hash(variant) for variant in variants}
    assert len(hashes) == len(variants)
    assert reference not in hashes
    assert parameters_hash(dict(reversed(state.items()))) == reference


def test_parameters_hash_depends_on_the_order_and_split_of_parts():
    a, b = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    hashes = {
        parameters_hash(a, b),
        parameters_hash(b, a),
        parameters_hash(a),
        parameters_hash(parameters_hash(a), b),
        parameters_hash({"w": torch.ones(2)[:1]}, {"w": torch.ones(1)}),
    }
    assert len(hashes) == 5
    assert parameters_hash(a, b) == parameters_hash({"w": torch.ones(2)}, {"w": torch.zeros(2)})
