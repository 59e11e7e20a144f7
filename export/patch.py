"""Patches of activations that no weight can hold, as modules to be traced into a network's graph.

At one place, where(M, v, x) in the notation of `bakeout.editor.edit`. Few values are patched, so the graph stores where
they are, i, and what they are, c, and has them expanded,

    M = scatter(i, 1)    v = scatter(i, c)    over zeros

which a runtime does once, when it loads the graph. Between the two Linears of an FFN the patch is a part of the
activation (`bakeout.kernels.reference.masked_geglu`), elsewhere an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bakeout.editor.edit import PatchActivation
from bakeout.editor.errors import InputError
from bakeout.editor.sites import Site
from bakeout.kernels.ops import masked_geglu

# Where the UNet's tokens are those of the prompt and not of the picture.
_READS_TEXT = ("attn_key", "attn_value")


class PlacedPatch(Module):
    """A patch of a Linear's input or output, at its place in a network.

    Attributes:
        site: of the Linear.
        at: `input` or `output`.
        latents: the only height and width of latents that it is valid for; None if it is valid for any.
        tokens: the only number of tokens of a prompt that it is valid for; None if it is valid for any.
    """

    def __init__(self, patch: PatchActivation, site: Site) -> None:
        """Make the module. Raises InputError if the patch has no form in a graph."""
        super().__init__()
        _check_exportable(patch, site)
        self.site = site
        self.at = patch.at
        self.latents = patch.latents
        self.tokens = prompt_tokens(patch, site)
        self._shape = tuple(patch.mask.shape)

    def check_tokens(self, x: Tensor) -> None:
        """Raise InputError unless x [..., tokens, features] has as many tokens as the patch is for."""
        if len(self._shape) == 2 and x.shape[-2] != self._shape[0]:
            raise InputError(
                f"the Edit at {self.site.name} is for {self._shape[0]} tokens where the model has {x.shape[-2]}; "
                "calibrate it on this model, at the picture size that it is for"
            )


class SitePatch(PlacedPatch):
    """The patch of a Linear's input or output x [batch, tokens, d]: where(M, v, x).

    Where `is_in_geglu`, x is GEGLU of what the module is given: [batch, tokens, 2d].

    Attributes:
        indices: int64 [n], rising: the places in M, flattened, that are set.
        values: [n], v there.
    """

    def __init__(self, patch: PatchActivation, site: Site, dtype: torch.dtype = torch.float32) -> None:
        """Make the module; `dtype` is that of its values and arithmetic.

        Raises:
            InputError: the patch has no form in a graph, or a value is beyond what `dtype` holds.
        """
        super().__init__(patch, site)
        self.indices = Parameter(patch.mask.cpu().flatten().nonzero()[:, 0], requires_grad=False)
        self.values = constant(site, patch.value.cpu().flatten()[self.indices], dtype)
        self._function = masked_geglu if is_in_geglu(patch, site) else _where

    @property
    def name(self) -> tuple[str, ...]:
        """What its constants and nodes are named by."""
        return self.site.name, f"patch.{self.at}"

    def forward(self, x: Tensor) -> Tensor:
        """See the class. Raises InputError for another number of tokens than the patch is for."""
        self.check_tokens(x)
        zeros = torch.zeros(prod(self._shape), dtype=self.values.dtype)
        # Of floats as well: TensorRT scatters no truth values.
        mask = zeros.scatter(0, self.indices, 1.0).to(torch.bool).reshape(self._shape)
        value = zeros.scatter(0, self.indices, self.values).reshape(self._shape)
        return cast(Tensor, self._function(x, mask, value))


class _PatchedGeglu(Module):
    def __init__(self, proj: Module, patch: SitePatch) -> None:
        super().__init__()
        self.proj = proj
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.patch(self.proj(x)))


def put_patches(
    network: Module, patches: Iterable[PlacedPatch], in_geglu: Callable[[Module, Any], Module] = _PatchedGeglu
) -> None:
    """Patch the activations of `network` for good, at most once at each place. Its parameters keep their names.

    Args:
        network: to patch.
        patches: of its activations; called with what they patch, unless they are in a GEGLU.
        in_geglu: from a GEGLU's Linear and the patch in it, what takes the GEGLU's place; it has the Linear as `proj`.
    """
    for patch in patches:
        if is_in_geglu(patch, patch.site):
            # An FFN of diffusers is its activation, which has the first Linear, a dropout and the second Linear.
            activation = f"{patch.site.module.removesuffix('.2')}.0"
            network.set_submodule(activation, in_geglu(network.get_submodule(f"{activation}.proj"), patch))
        else:
            linear = network.get_submodule(patch.site.module)
            linear.add_module(f"patch_{patch.at}", patch)
            _HOOKS[patch.at](linear)


def is_in_geglu(patch: PatchActivation | PlacedPatch, site: Site) -> bool:
    """Whether a patch at `site` is a part of an FFN's GEGLU, and not an operation of its own."""
    return patch.at == "input" and site.kind == "ffn2"


def prompt_tokens(patch: PatchActivation, site: Site) -> int | None:
    """The only number of tokens of a prompt that a patch at `site` is valid for; None if it is valid for any."""
    return len(patch.mask) if patch.mask.ndim == 2 and _sees_prompts(site) else None


def constant(site: Site, value: Tensor, dtype: torch.dtype) -> Parameter:
    """A constant of an edit at `site`, rounded to `dtype`. Raises InputError where that cannot hold it."""
    rounded = value.detach().to("cpu", dtype).contiguous()
    if not rounded.isfinite().all():
        raise InputError(
            f"a value of the Edit at {site.name} is beyond what {dtype} holds; make the edit weaker or check its source"
        )
    return Parameter(rounded, requires_grad=False)


def _patch_input(linear: Any, args: tuple[Tensor]) -> Tensor:
    return cast(Tensor, linear.patch_input(*args))


def _patch_output(linear: Any, _args: object, output: Tensor) -> Tensor:
    return cast(Tensor, linear.patch_output(output))


_HOOKS = {
    "input": lambda linear: linear.register_forward_pre_hook(_patch_input),
    "output": lambda linear: linear.register_forward_hook(_patch_output),
}


def _where(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, x)


def _sees_prompts(site: Site) -> bool:
    return site.component.startswith("text_encoder") or site.kind in _READS_TEXT


def _check_exportable(patch: PatchActivation, site: Site) -> None:
    if patch.rows != "all":
        raise InputError(
            f"the patch at {site.name} leaves negative prompts as they are, for which an artifact would need an input "
            "that is its own off-switch; take rows = 'all'"
        )
    if patch.calls is not None:
        raise InputError(
            f"the patch at {site.name} acts in some calls of the UNet only, which no graph can count; leave out calls"
        )
    if patch.latents is not None and site.component != "unet":
        raise InputError(f"the patch at {site.name} is for one size of latents, which only the UNet has; leave it out")
    if patch.mask.ndim == 2 and patch.latents is None and not _sees_prompts(site):
        raise InputError(
            f"the patch at {site.name} is for {len(patch.mask)} tokens and does not say of which height and width; "
            "say its latents"
        )
