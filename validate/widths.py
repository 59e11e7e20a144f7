"""Which hidden units of FFNs a target may be without, from the Edit alone.

A unit that a patch makes constant at every token, in every row and in every call is in nobody's output once FFN-2's
column for it is zero and its bias has what that column made of the constant. So FFN-2 may lack the column, and FFN-1
the two rows that computed the unit: its own, and that of its gate, which lie in two halves. Whatever acts on FFN-1's
output is as wide as that, and then nothing may go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput
from bakeout.editor.merge import merge
from bakeout.editor.model import Model


@dataclass(frozen=True)
class Entries:
    """Of a parameter, what a target has: `places`, int64 [n], along `dim`."""

    dim: int
    places: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """What the target has of the whole parameter."""
        return whole.index_select(self.dim, self.places)


def units_of(edit: Edit, base: Model, multiple: int) -> dict[str, Tensor]:
    """Of the FFNs that must be narrower than the base's, by the site of FFN-2, the hidden units that must be there.

    Args:
        edit: what was baked.
        base: the model that was edited.
        multiple: the width is the least multiple of it, above zero, that has all units that are not constant; of those
            that are, the first ones fill it up. 0 is for a target with all units.

    Returns:
        int64 [n], rising.
    """
    operations = merge([edit]).operations
    at_input = [it for it in operations if isinstance(it, PatchActivation) and it.at == "input"]
    # What is neither of a weight nor at an input is at an output.
    wide = {it.site for it in operations if it not in at_input and not isinstance(it, PatchWeightInput)}
    found = {}
    for patch in at_input:
        alone = sum(it.site == patch.site for it in at_input) == 1
        everywhere = patch.mask.ndim == 1 and patch.rows == "all" and patch.calls is None
        ffn1 = patch.site.removesuffix("ffn2") + "ffn1"
        if not multiple or base.site(patch.site).kind != "ffn2" or not alone or not everywhere or ffn1 in wide:
            continue
        count, needed = len(patch.mask), int((~patch.mask).sum())
        width = next((size for size in range(multiple, count, multiple) if size >= needed), count)
        if width < count:
            found[patch.site] = patch.mask.int().argsort(stable=True)[:width].sort().values
    return found


def entries_of(units: Mapping[str, Tensor], base: Model) -> dict[tuple[str, str], Entries]:
    """What a target with these units, as of `units_of`, has of parameters, by component and name in memory.

    Of others it has the whole.
    """
    entries = {}
    for name, own in units.items():
        site = base.site(name)
        halves = Entries(0, torch.cat([own, site.d_in + own]))
        ffn1 = f"{site.module.removesuffix('2')}0.proj"
        entries[site.component, f"{ffn1}.weight"] = entries[site.component, f"{ffn1}.bias"] = halves
        entries[site.component, f"{site.module}.weight"] = Entries(1, own)
    return entries
