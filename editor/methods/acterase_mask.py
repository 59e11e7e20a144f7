"""The mathematics of ActErase: how important what a layer takes in is, and what is patched (Eq. 4-5)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bakeout.editor.methods.selection import count_of, largest

Importance = Literal["column", "row", "edge"]
TauMode = Literal["fraction", "absolute"]
TauScope = Literal["layer", "token"]
Compare = Literal["source", "target"]


def importance(x: Tensor, weight: Tensor, kind: Importance = "column", signed: bool = False) -> Tensor:
    """How much of a Linear's inputs, outputs or weights goes on (Eq. 4).

        column_nj = |x_nj| sum_i |W_ij|,  row_ni = sum_j |W_ij| |x_nj|,  edge_ij = |W_ij| |x_j|

    with W_ij in place of |W_ij| if `signed`. All are linear in |x|, so a mean of |x| gives the mean of importances.

    Args:
        x: floating point [..., d_in]; [d_in] for `edge`.
        weight: floating point [d_out, d_in], W.
        kind: see above.
        signed: see above.

    Returns:
        [..., d_in] for `column`, [..., d_out] for `row`, [d_out, d_in] for `edge`; in fp32 (fp64 where one is fp64).
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    magnitude = x.to(wide).abs()
    factor = weight.to(wide) if signed else weight.to(wide).abs()
    if kind == "column":
        return magnitude * factor.sum(0)
    if kind == "row":
        return magnitude @ factor.T
    if x.ndim != 1:
        raise ValueError(f"x is {list(x.shape)}: weights have one input each, [d_in]")
    return factor * magnitude


def patch_mask(
    source_importance: Tensor,
    target_importance: Tensor,
    tau: float,
    tau_mode: TauMode = "fraction",
    tau_scope: TauScope = "layer",
    compare: Compare = "source",
) -> Tensor:
    """What is patched (Eq. 5): what passes τ and is less important without the concept than with it, strictly.

    By `tau_mode`, `fraction`: the floor(τ · n) largest importances pass, n being all of the layer or, by `tau_scope`,
    the features of each token; of equal ones that of the lower index counts as the larger, on any device. `absolute`:
    importances of at least τ pass.

    Args:
        source_importance: floating point [tokens, d], or [d] or [d_out, d_in] for all tokens: I_s.
        target_importance: as the other: I_t.
        tau: τ; a fraction is above 0, at most 1, and counts as the decimal that it prints as.
        tau_mode: see above.
        tau_scope: see above.
        compare: whether I_s or I_t must pass τ.

    Returns:
        bool, of the importances' shape.

    Raises:
        InputError: floor(τ · n) is 0.
    """
    judged = source_importance if compare == "source" else target_importance
    if tau_mode == "absolute":
        passing = judged >= tau
    else:
        rows = judged.reshape(1, -1) if tau_scope == "layer" else judged.reshape(-1, judged.shape[-1])
        passing = largest(rows, passing_count(tau, rows.shape[1], "this layer")).reshape(judged.shape)
    return passing & (source_importance < target_importance)


def passing_count(tau: float, of: int, layer: str) -> int:
    """floor(τ · n), of a layer that an error names."""
    return count_of(tau, of, "tau", f"{of} importances of {layer}")
