"""The places of a model that an edit may act on, found by structure, with names of our own.

The libraries rename parameters between versions and formats; recipes, edits and artifacts must not change with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bakeout.editor.ldm_names import Location

KINDS = ("ffn1", "ffn2", "attn_key", "attn_value", "attn_out", "text_ffn2", "text_layer")


@dataclass(frozen=True)
class Site:
    """A Linear layer, or for `text_layer` the residual output of an encoder layer.

    `module` is its path in the component as loaded here; `weight` and `bias` are the tensors' names on disk (None where
    there is none). The weight is stored [d_out, d_in]; a site maps the last dimension from d_in to d_out.
    """

    name: str
    kind: str
    component: str
    module: str
    weight: str | None
    bias: str | None
    d_in: int
    d_out: int


_UNET = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\.attentions\.(?P<attn>\d+)"
    r"\.transformer_blocks\.(?P<depth>\d+)\."
    r"(?P<inner>attn2\.to_k|attn2\.to_v|attn2\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)\.weight"
)
_UNET_KINDS = {
    "attn2.to_k": "attn_key",
    "attn2.to_v": "attn_value",
    "attn2.to_out.0": "attn_out",
    "ff.net.0.proj": "ffn1",
    "ff.net.2": "ffn2",
}
_TEXT_FFN2 = re.compile(r"(?P<layer>(?:text_model\.)?encoder\.layers\.(?P<index>\d+))\.mlp\.fc2\.weight")


def find_sites(
    component: str, shapes: Mapping[str, tuple[int, ...]], locations: Mapping[str, Location]
) -> tuple[Site, ...]:
    """The sites of a component in the order in which they run.

    `shapes` and `locations` say of each parameter, by its name in memory, its shape and where on disk it lies.
    """
    find = _unet_site if component == "unet" else _text_sites
    found = [entry for name in shapes for entry in find(component, name, shapes, locations)]
    return tuple(site for _, site in sorted(found, key=lambda entry: entry[0]))


_Ordered = tuple[tuple[int, ...], Site]


def _unet_site(
    component: str, name: str, shapes: Mapping[str, tuple[int, ...]], locations: Mapping[str, Location]
) -> list[_Ordered]:
    match = _UNET.fullmatch(name)
    if match is None:
        return []
    kind = _UNET_KINDS[match["inner"]]
    side = match["side"] or "mid"
    region = f"{side}.{match['block']}" if match["block"] else side
    site_name = f"{component}.{region}.attn.{match['attn']}.block.{match['depth']}.{kind}"
    order = (
        ("down", "mid", "up").index(side), int(match["block"] or 0), int(match["attn"]), int(match["depth"]),
        list(_UNET_KINDS.values()).index(kind),
    )  # fmt: skip
    return [(order, _linear(site_name, kind, component, name.removesuffix(".weight"), shapes, locations))]


def _text_sites(
    component: str, name: str, shapes: Mapping[str, tuple[int, ...]], locations: Mapping[str, Location]
) -> list[_Ordered]:
    match = _TEXT_FFN2.fullmatch(name)
    if match is None:
        return []
    index, layer = int(match["index"]), match["layer"]
    linear = _linear(
        f"{component}.layer.{index}.ffn2", "text_ffn2", component, name.removesuffix(".weight"), shapes, locations
    )
    width = linear.d_out
    output = Site(f"{component}.layer.{index}", "text_layer", component, layer, None, None, width, width)
    return [((index, 0), linear), ((index, 1), output)]


def _linear(
    name: str, kind: str, component: str, module: str,
    shapes: Mapping[str, tuple[int, ...]], locations: Mapping[str, Location],
) -> Site:  # fmt: skip
    d_out, d_in = shapes[f"{module}.weight"]
    bias = locations.get(f"{module}.bias")
    weight = locations[f"{module}.weight"]
    return Site(name, kind, component, module, weight.tensor, bias.tensor if bias else None, d_in, d_out)
