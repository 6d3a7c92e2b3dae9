"""Triton variants of the operations (Triton 3.6 to 3.9), registered as ``impl="triton"``.

Importing this package does not import Triton: :func:`registration.register` names the module of a
variant, which is imported when the variant first runs. None is a default anywhere yet, since none
has been measured on a GPU. A new operation: a module here with the kernels, the launch plan, the
``torch.library`` operations, the ``autograd.Function`` and ``machine_code_cases``; a ``register``
line below; its name in ``machine_code.MODULES``; tests in ``tests/triton/interpreted``.
"""

from .norm_plan import too_wide
from .registration import register

register("swiglu", "gated:swiglu")
register("geglu", "gated:geglu")
register("bias_gelu", "bias_gelu:bias_gelu")
register("rope", "rope:rope")
register("rms_norm", "norms:rms_norm", unsupported=too_wide)
register("layer_norm", "norms:layer_norm", unsupported=too_wide)
