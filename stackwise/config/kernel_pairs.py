"""Which forms of kernel attention each kernel has; the table is in docs/kernel_attention.md."""

from __future__ import annotations

PAIRS = {
    "features": ("gaussian", "laplacian", "uniform", "linear"),
    "exact": ("gaussian", "laplacian"),
    "linear": ("gaussian", "linear"),
}


def pair_fault(form: str, kernel: str, distance: str) -> str | None:
    """Why a form of a kernel has no meaning, as "field: reason; accepted: ..."; None: it has one.

    ``distance`` is that of the laplacian kernel.
    """
    if kernel not in PAIRS["features"]:
        return f"kernel_type: got {kernel!r}; accepted: {', '.join(PAIRS['features'])}"
    if kernel not in PAIRS[form]:
        accepted = ", ".join(f for f in PAIRS if kernel in PAIRS[f])
        return f"kernel_form: got {form!r}, which the {kernel} kernel has not; accepted: {accepted}"
    if form == "exact" and kernel == "laplacian" and distance == "l1":
        return (
            "kernel_distance: got 'l1' with kernel_form: exact, whose distances are matrix "
            "products; accepted: euclidean, or kernel_form: features"
        )
    return None
