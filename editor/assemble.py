"""Match what a model's configuration expects with what its files store, and make the `Component` of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bakeout.editor.architecture import CLASSES, SUPPORTED, describe
from bakeout.editor.checkpoint_header import StoredTensor
from bakeout.editor.errors import InputError
from bakeout.editor.ldm_names import Location
from bakeout.editor.model import Component
from bakeout.editor.sites import Site, find_sites

FLOATS = ("F16", "BF16", "F32", "F64")
# Stored by older versions of the libraries, or beside a text encoder by its training; not used to draw.
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?)")

Shapes = Mapping[str, tuple[int, ...]]
Locate = Callable[[str, Shapes], Iterable[Location]]


def make_component(
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    locate: Locate,
    where: str,
    unused: re.Pattern[str] = UNUSED,
    cure: str = "get both from one model",
) -> tuple[Component, dict[str, Any], tuple[Site, ...]]:
    """A component with every parameter found, its configuration with defaults filled in, and its sites.

    `locate` gives the places where a parameter (by its name in memory, with all shapes) may lie. `where` names the
    configuration in messages, `unused` what may lie there without a use, `cure` what helps if the sizes differ. Raises
    InputError for a tensor that is missing, left over, or of another shape or dtype.
    """
    if class_name not in CLASSES[name]:
        raise InputError(f"{where} makes {name} a {class_name!a:.100}, not a {' or '.join(CLASSES[name])}; {SUPPORTED}")
    shapes, effective = describe(class_name, config, where, len(tensors))
    locations = {parameter: _find(parameter, shapes, tensors, locate, where, cure) for parameter in shapes}
    used = {location.tensor for location in locations.values()}
    for left in sorted(tensors.keys() - used):
        if not unused.fullmatch(left):
            raise InputError(f"{tensors[left].file} holds tensor {left!a:.200}, which {where} has no place for; {cure}")
    component = Component(name, class_name, config, tensors, locations)
    return component, effective, find_sites(name, shapes, locations)


def _find(
    parameter: str, shapes: Shapes, tensors: Mapping[str, StoredTensor], locate: Locate, where: str, cure: str
) -> Location:
    places = list(locate(parameter, shapes))
    for location in places:
        if stored := tensors.get(location.tensor):
            _check(stored, location.stored_shapes(shapes[parameter]), where, cure)
            return location
    raise InputError(f"tensor {places[0].tensor!a:.200} is missing, though {where} needs it; download the model again")


def _check(stored: StoredTensor, allowed: tuple[tuple[int, ...], ...], where: str, cure: str) -> None:
    if stored.shape not in allowed:
        raise InputError(
            f"{stored.file} stores tensor {stored.name!a:.200} with shape {list(stored.shape)} where {where} needs "
            f"{list(allowed[0])}; {cure}"
        )
    if stored.dtype not in FLOATS:
        raise InputError(
            f"{stored.file} stores tensor {stored.name!a:.200} as {stored.dtype}, but only {', '.join(FLOATS)} can be "
            "edited; take the float16 version of the model"
        )
