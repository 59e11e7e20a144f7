"""Each hidden unit of the UNet's FFNs is meant for one value of one attribute, or for the empty prompt.

Trained without this, so small a network spreads every concept over all units of all layers, and no method that looks
for the units of one concept can take it out and leave the others in (docs/conceptprune.md says how that went). The idea
is gradient routing (Cloud et al., 2024, arXiv 2410.04332): while training, what a picture teaches reaches the units of
the values that its caption mentions, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bakeout.builtin.shapes.scenes import VALUES, mentioned

GROUPS = (*VALUES, "")


def group_of(unit: Tensor) -> Tensor:
    """The group, by its place in GROUPS, of hidden units by their numbers; int64, of the same shape."""
    return unit % len(GROUPS)


def open_groups(captions: Sequence[str]) -> Tensor:
    """Which groups each caption speaks to, bool [captions, groups]; the last group is the empty caption's."""
    named = [mentioned(caption) if caption else {""} for caption in captions]
    return torch.tensor([[group in names for group in GROUPS] for names in named])


@contextmanager
def routed(unet: Any, groups: Tensor, enforced: Tensor) -> Iterator[list[Tensor]]:
    """Inside, rows where `enforced` (bool [batch]) run through the units of their `groups` (bool [batch, groups]) only.

    Yields a list that gets, for each FFN of a forward pass, the mean over its units of the share of their activity
    (mean |h|) in rows that are not theirs, before anything is cut off; a scalar.
    """
    spilled: list[Tensor] = []

    def cut(h: Tensor) -> Tensor:
        own = groups[:, group_of(torch.arange(h.shape[-1]))]
        activity = h.abs().mean(1)
        spilled.append(((activity * ~own).sum(0) / (activity.sum(0) + 1e-6)).mean())
        return h * (own | ~enforced[:, None])[:, None]

    with _changed(unet, cut):
        yield spilled


@contextmanager
def silenced(unet: Any, group: Tensor) -> Iterator[None]:
    """Inside, row i runs without the units of group `group[i]`; int64 [batch]."""
    with _changed(unet, lambda h: h * (group_of(torch.arange(h.shape[-1])) != group[:, None])[:, None]):
        yield


@contextmanager
def _changed(unet: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `change` is applied to the hidden activations of every FFN, [batch, tokens, d]."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, hidden: change(hidden))
        for name, module in unet.named_modules()
        if name.endswith("ff.net.0")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
