"""Edits of a UNet with random patches of the input of every FFN's second Linear, for what they cost."""

from __future__ import annotations

import torch

from bakeout.editor.edit import Edit, PatchActivation
from bakeout.editor.model import Model
from bakeout.editor.sites import Site


def patches(model: Model, share: float, side: int | None = None) -> Edit:
    """A random patch of the input of every FFN-2: of features, or with a `side` of pairs of token and feature."""
    generator = torch.Generator().manual_seed(0)
    levels = len(model.components["unet"].config["block_out_channels"])
    made = []
    for site in model.sites_of("ffn2"):
        shape = (site.d_in,) if side is None else (tokens(site, levels, side), site.d_in)
        mask = torch.rand(shape, generator=generator) < share
        value = 0.5 * torch.randn(shape, generator=generator)
        made.append(PatchActivation(site.name, "input", mask, value, None if side is None else (side, side)))
    return Edit(tuple(made))


def tokens(site: Site, levels: int, side: int) -> int:
    """How many tokens a site of a UNet with so many levels sees, for latents of `side` cells a side."""
    region, number = site.name.split(".")[1:3]
    level = levels - 1 if region == "mid" else int(number) if region == "down" else levels - 1 - int(number)
    return (side >> level) ** 2
