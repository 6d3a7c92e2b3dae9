"""Kernel attention of a decoder: a type of kernel in one of three forms.

            features                          exact                    linear
gaussian    softmax over cos(W x / σ)         exp(-|q-k|² / (2σ²))     positive features of it
laplacian   the same, other spectrum          exp(-|q-k| / σ)          -
uniform     the same, other spectrum          -                        -
linear      softmax over q·k                  -                        φ(q)·φ(k), elu + 1, relu, exp

"features" is the published form ("random kitchen sinks"), the softmax of φ(q)·φ(k)/sqrt(m) with
φ(x) = cos(W x/σ); "exact" divides by the sum of the kernel's weights; "linear" never builds the
L x L matrix. A dash is a pair without a meaning: the kernel has no positive weights (uniform), no
positive features (laplacian), or is its own exact form (linear).

The bandwidth σ is a number or trains, one value per key/value head that its queries share. The
features W (m, head_dim) are drawn per layer and saved with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise import kernels
from stackwise.config import ModelConfig
from stackwise.config.kernel_pairs import pair_fault


@dataclass(frozen=True)
class KernelForm:
    """What a kernel-attention layer computes; tensors are (..., heads, dim).

    ``spectrum`` is the argument of ``sample_features``, None without random features.
    """

    form: str
    kernel: str
    spectrum: str | None
    count: int
    bandwidth: float
    bandwidth_trains: bool
    feature_map: str

    @property
    def folds_bandwidth(self) -> bool:
        """Whether the fixed bandwidth is part of the saved features: W / σ."""
        return self.form == "features" and not self.bandwidth_trains

    def draw_initial(self, dim: int) -> Tensor | None:
        """W (m, dim) from a seed of torch's default CPU generator; None without features."""
        if self.spectrum is None:
            return None
        return self.draw(dim, int(torch.randint(2**31 - 1, (1,), device="cpu")))

    def draw(self, dim: int, seed: int) -> Tensor:
        """W (m, dim): independent rows in the published form, orthogonal ones in the linear."""
        assert self.spectrum is not None
        with torch.device("cpu"):
            drawn = kernels.sample_features(
                self.spectrum, dim, self.count, orthogonal=self.form == "linear", seed=seed
            )
        return drawn / self.bandwidth if self.folds_bandwidth else drawn

    def before_cache(
        self, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, bandwidth: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention, and a cache of keys, takes instead of q, k, v."""
        if bandwidth is not None and self.form != "exact":
            q, k = _divide(q, bandwidth), _divide(k, bandwidth)
        if self.form != "features" or features is None:
            return q, k, v
        q, k = map_to_cosines(q, features), map_to_cosines(k, features)
        return q, k, v.to(q.dtype)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        features: Tensor | None,
        bandwidth: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The attention operation of the form, with the ``arguments`` of ``kernels.attention``."""
        if self.form == "features":
            return kernels.attention(q, k, v, **arguments)
        if self.form == "exact":
            width = self.bandwidth if bandwidth is None else bandwidth
            return kernels.kernel_attention(
                q, k, v, kernel=self.kernel, bandwidth=width, **arguments
            )
        arguments = {name: value for name, value in arguments.items() if name != "window"}
        if self.kernel == "linear":
            return kernels.linear_attention(q, k, v, feature_map=self.feature_map, **arguments)
        # exp(-|q - k|²/2) is exp(q·k), which the features stand for, under a bias on the keys.
        inverse = self.bandwidth**-2 if bandwidth is None else 1.0
        bias = -0.5 * inverse * k.float().square().sum(-1).transpose(-1, -2)
        if arguments["key_bias"] is not None:
            bias = bias + arguments["key_bias"]
        arguments = arguments | {"key_bias": bias}
        return kernels.linear_attention(q, k, v, features=features, scale=inverse, **arguments)


def _divide(x: Tensor, bandwidth: Tensor) -> Tensor:
    """x (..., H, D) over the bandwidths (Hkv,) of its heads."""
    per_head = bandwidth.repeat_interleave(x.shape[-2] // len(bandwidth))
    return (x / per_head[:, None]).to(x.dtype)


def map_to_cosines(x: Tensor, features: Tensor) -> Tensor:
    """cos(W x) in float32 at least: bfloat16 phases would leave two digits of the cosine."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return kernels.random_features(x, features.to(x.dtype), kind="cos")


def kernel_form(config: ModelConfig) -> KernelForm | None:
    """The form of a kernel-attention configuration; None for other types of attention.

    ValueError for a pair without a meaning.
    """
    if config.attention_type != "kernel":
        return None
    fault = pair_fault(config.kernel_form, config.kernel_type, config.kernel_distance)
    if fault is not None:
        raise ValueError(fault)
    spectrum: str | None = config.kernel_type
    if config.kernel_form == "exact" or config.kernel_type == "linear":
        spectrum = None
    elif config.kernel_type == "laplacian" and config.kernel_distance == "l1":
        spectrum = "laplacian_l1"
    return KernelForm(
        form=config.kernel_form,
        kernel=config.kernel_type,
        spectrum=spectrum,
        count=config.kernel_dim,
        bandwidth=config.kernel_bandwidth,
        bandwidth_trains=config.kernel_bandwidth_trainable and config.kernel_type != "linear",
        feature_map=config.kernel_feature_map,
    )
