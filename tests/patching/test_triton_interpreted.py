"""A patched model and the SDPA kernels on the Triton variants, in Triton's interpreter.

The interpreter is chosen before Triton is imported, so this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import importlib.util
import torch
import torch.nn.functional as F

def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

load("interpreter", "tests/triton/interpreter.py").repair()
tiny = load("tiny", "tests/patching/conftest.py")
from stackwise import patch
from stackwise.patching import sdpa

def step(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}

for kind, case in (("gemma2", "packed"), ("llama", "right")):
    model = tiny.build(kind, head_dim=16, num_hidden_layers=1).train()
    batch = tiny.BATCHES[case]() | {"use_cache": False}
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    batch["labels"] = batch["input_ids"].masked_fill(~real, -100)
    theirs = step(model, batch)
    with patch(model, impl="triton"):
        error, name = tiny.largest_error(step(model, batch), theirs)
    assert error <= 2e-5, (kind, name, error)

q, k, v = inputs = [torch.randn(1, 2, 37, 32, requires_grad=True) for _ in range(3)]
expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
upstream = torch.randn_like(expected)
grads = torch.autograd.grad(expected, inputs, upstream)
with torch.no_grad():
    out, lse, *rest = sdpa.forward_kernel("triton")(q, k, v, 0.0, True, False)
    ours = sdpa.backward_kernel("triton")(
        upstream, q, k, v, out, lse, None, None, 37, 37, 0.0, True, *rest[4:6]
    )
for mine, truth in zip((out, *ours), (expected, *grads)):
    assert (mine - truth).abs().max() <= 1e-5
print("equal")
"""


def test_triton_variants_in_a_model_and_under_sdpa(repository: Path) -> None:
    paths = [str(repository), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=repository, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"
