"""Leave the hidden units that an Edit makes constant out of compiled networks.

Hidden unit j of an FFN of width h is h_j = a_j · gelu(g_j), where row j of FFN-1 gives a_j and row h + j gives g_j, and
only column j of FFN-2 reads it. Where an Edit patches it, folding puts what that column makes of the constant into the
bias and leaves a column of zeros (`bakeout.export.lower`; b' = b + W (M ⊙ x̄), W' = W · diag(1 - M)). So the output
depends on neither a_j nor g_j: the column and both rows go, and the function is the same, exactly.

Only patches are looked at. A pruning (ConceptPrune) chooses in each row of the weight for itself, and hardly ever a
whole column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Linear, Module

from bakeout.editor.edit import Edit, Operation, PatchActivation, ShiftActivation, SteerLatents, check_fits
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.editor.sites import Site


@dataclass(frozen=True)
class Cut:
    """What stays of a parameter.

    Attributes:
        dim: the dimension of hidden units.
        units: int64 [n], rising, the entries that stay along it.
    """

    dim: int
    units: Tensor

    def of(self, values: Tensor) -> Tensor:
        """`values` without what goes."""
        return values.index_select(self.dim, self.units)


def kept_units(edit: Edit, sites: Mapping[str, Site], multiple: int) -> dict[str, Tensor]:
    """Which hidden units stay: every one that is not constant, and of the others the first that fill up the width.

    Args:
        edit: whose constants are folded into the weights; several operations of a sort at one site count as `merge`
            combines them.
        sites: the model's sites by name, all of them.
        multiple: of which a smaller width is one, never zero of them; 0 leaves every width as it is.

    Returns:
        Name of an `ffn2` site → int64 [n], rising, n below its d_in; only sites where units go.

    Raises:
        InputError: the Edit is of another model.
    """
    if multiple == 0:
        return {}
    by_site: dict[str, list[Operation]] = {}
    for operation in merge([edit]).operations:
        if operation.site not in sites:
            raise InputError(
                f"this Edit was made for another model: this one has no site {operation.site}; use the model it is for"
            )
        check_fits(operation, sites[operation.site])
        by_site.setdefault(operation.site, []).append(operation)
    kept = {}
    for name, operations in by_site.items():
        constant = _constant_units(sites[name], operations, by_site.get(_ffn1(sites[name]), []))
        if constant is None:
            continue
        varying = len(constant) - int(constant.sum())
        width = max(-(-varying // multiple), 1) * multiple
        if width < len(constant):
            # Constant units that stay are columns of zeros, as all of them are in the diffusers folder.
            stays = ~constant
            stays[constant.nonzero().flatten()[: width - varying]] = True
            kept[name] = stays.nonzero().flatten()
    return kept


def cuts_of(kept: Mapping[str, Tensor], model: Model) -> dict[str, dict[str, Cut]]:
    """What `kept_units` makes of a model's parameters: component → parameter → what stays of it.

    Raises:
        ValueError: a site is no `ffn2`, or the units are no rising numbers of its hidden units.
    """
    cuts: dict[str, dict[str, Cut]] = {}
    for name, units in kept.items():
        ffn2 = model.site(name)
        if ffn2.kind != "ffn2":
            raise ValueError(f"{name} is no ffn2, so it has no hidden units that could go")
        rising = units.dtype == torch.int64 and units.ndim == 1 and bool((units.diff() > 0).all())
        if not rising or len(units) == 0 or units[0] < 0 or units[-1] >= ffn2.d_in:
            raise ValueError(f"the units that stay at {name} are not rising numbers below {ffn2.d_in}")
        ffn1 = model.site(_ffn1(ffn2))
        both = torch.cat([units, units + ffn2.d_in])
        found = {
            f"{ffn1.module}.weight": Cut(0, both), f"{ffn1.module}.bias": Cut(0, both),
            f"{ffn2.module}.weight": Cut(1, units),
        }  # fmt: skip
        locations = model.components[ffn2.component].locations
        cuts.setdefault(ffn2.component, {}).update({name: it for name, it in found.items() if name in locations})
    return cuts


def narrow(network: Module, cuts: Mapping[str, Cut]) -> None:
    """Put Linears without weights, of the widths that `cuts` leaves, into the place of those in `network`."""
    for parameter, cut in cuts.items():
        path, _, name = parameter.rpartition(".")
        if name == "weight":
            old = network.get_submodule(path)
            shape = list(old.get_parameter(name).shape)
            shape[cut.dim] = len(cut.units)
            network.set_submodule(path, Linear(shape[1], shape[0], bias=old.bias is not None, device="meta"))


def _ffn1(ffn2: Site) -> str:
    return f"{ffn2.name.removesuffix('ffn2')}ffn1"


def _constant_units(site: Site, operations: Sequence[Operation], before: Sequence[Operation]) -> Tensor | None:
    """Which hidden units are constant at every token, in every row and call, bool [d_in]; None where none may go.

    `before` are the operations at FFN-1. What acts on its output is as wide as it is, so then it stays that wide.
    """
    patches = [it for it in operations if isinstance(it, PatchActivation) and it.at == "input"]
    if site.kind != "ffn2" or site.bias is None or len(patches) != 1 or any(map(_acts_on_output, before)):
        return None
    patch = patches[0]
    everywhere = patch.mask.ndim == 1 and patch.rows == "all" and patch.calls is None
    return patch.mask if everywhere else None


def _acts_on_output(operation: Operation) -> bool:
    at_output = isinstance(operation, PatchActivation) and operation.at == "output"
    return at_output or isinstance(operation, ShiftActivation | SteerLatents)
