"""Draw with an artifact in PyTorch: diffusers' own pipelines around the base model, with the edit in its modules.

What folds lies in the weights. Of the rest, a patch in an FFN's GEGLU is one operator with the Linear before it, by a
fused kernel; other patches are a `where`; and operations on a text encoder are those of its graph (`steer.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import Linear, Module, ModuleList

from bakeout.editor.edit import Edit, PatchActivation, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.pipeline import load_pipeline
from bakeout.editor.sites import Site
from bakeout.export.base import check_base, source_of
from bakeout.export.hidden_states import guard
from bakeout.export.lower import left_to_graph, lower_onto
from bakeout.export.manifest import first_states, latents_of
from bakeout.export.one_size import hold_to
from bakeout.export.patch import PlacedPatch, constant, is_in_geglu, put_patches
from bakeout.export.steer import SiteEdit, blank_tokens, placed_in, prompt_length, steering
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.ops import KERNELS, masked_geglu, masked_geglu_linear
from bakeout.kernels.packing import pack_mask

if TYPE_CHECKING:
    from bakeout.export.artifact import Artifact

# Of the tensors on which a kernel is tried: of one token, and wide enough for any alignment.
_TRIED_WIDTH = 64
# A text encoder is edited by hooks that hold the tokens of a call, so calls in other threads wait.
_STEERING = Lock()


class DensePatch(PlacedPatch):
    """The patch of a Linear's input or output x [..., tokens, d]: where(M, v, x).

    Attributes:
        mask: M, bool [tokens, d] or [d]; where `is_in_geglu`, packed: uint8 [tokens, ⌈d / 8⌉] or [⌈d / 8⌉].
        value: v, [tokens, d] or [d]; zero where M is not set.
    """

    mask: Tensor
    value: Tensor

    def __init__(self, patch: PatchActivation, site: Site, like: Tensor) -> None:
        """Make the module, in the dtype and on the device of `like`.

        Raises:
            InputError: the patch has no form in a graph, or a value is beyond what the dtype holds.
        """
        super().__init__(patch, site)
        mask = patch.mask.cpu()
        value = constant(site, patch.value.cpu().where(mask, 0.0), like.dtype).detach()
        packed = pack_mask(mask) if is_in_geglu(patch, site) else mask
        self.register_buffer("mask", packed.to(like.device), persistent=False)
        self.register_buffer("value", value.to(like.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class. Raises InputError for another number of tokens than the patch is for."""
        self.check_tokens(x)
        return torch.where(self.mask, self.value, x)


class FusedGeglu(Module):
    """An FFN's first Linear and its GEGLU with a patch: from x [..., tokens, d] to [..., tokens, h].

    `bakeout::masked_geglu_linear` where the kernel has it, else `bakeout::masked_geglu` of the Linear.

    Attributes:
        proj: the Linear, from d to 2h.
        patch: of what GEGLU gives.
        kernel: of `bakeout.kernels.ops.KERNELS`.
    """

    def __init__(self, proj: Module, patch: DensePatch, kernel: str) -> None:
        super().__init__()
        self.proj = proj
        self.patch = patch
        self.kernel = kernel
        self._has_linear = kernel in KERNELS["masked_geglu_linear"]

    def forward(self, x: Tensor) -> Tensor:
        """See the class. Raises InputError for another number of tokens than the patch is for."""
        self.patch.check_tokens(x)
        mask, value, proj = self.patch.mask, self.patch.value, self.proj
        if self._has_linear and _is_bare(proj):
            return cast(Tensor, masked_geglu_linear(x, proj.weight, proj.bias, mask, value, self.kernel))
        return cast(Tensor, masked_geglu(proj(x), mask, value, self.kernel))


def _is_bare(module: Module) -> bool:
    """Whether a Linear is its weight and bias and nothing else: no adapter, no hook, no weights that are elsewhere."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is Linear and not hooked


class _WideSiteEdit(SiteEdit):
    """Computes in its own dtype, which is wider than the encoder's where that is of 16 bits.

    There near latents would be equal, and others would be the k largest.
    """

    def forward(self, y: Tensor, input_ids: Tensor) -> Tensor:
        own = next(it.dtype for it in self.parameters() if it.is_floating_point())
        return super().forward(y.to(own), input_ids).to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        def moved(it: Tensor) -> Tensor:
            to = fn(it)
            return it.to(to.device, torch.promote_types(it.dtype, to.dtype))

        # Whoever makes the encoder narrower later does not make this narrower.
        return cast(Module, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]


class _Edited(Module):
    """What the class of an edited network is in front of; a compiled network is called behind it."""

    _prompt_length: int | None
    _latents: tuple[int, int] | None

    def save_pretrained(self, *_args: object, **_settings: object) -> None:
        raise InputError(
            "what was edited here lies in modules that no weight file holds, and would be lost: ship the artifact"
        )

    def _check_length(self, tokens: Tensor) -> None:
        if self._prompt_length is not None and tokens.shape[1] != self._prompt_length:
            raise InputError(
                f"this model takes prompts of {self._prompt_length} tokens only, not {tokens.shape[1]}; pad or cut them"
            )


class _EditedTextEncoder(_Edited):
    site_edits: ModuleList

    def __call__(self, input_ids: Tensor | None = None, *args: Any, **settings: Any) -> Any:
        if input_ids is None:
            raise InputError("the edit of this text encoder depends on its tokens; give it input_ids")
        self._check_length(input_ids)
        with _STEERING, steering(self, cast(Sequence[SiteEdit], self.site_edits), input_ids):
            return super().__call__(input_ids, *args, **settings)


class _EditedUNet(_Edited):
    def __call__(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *args: Any, **settings: Any
    ) -> Any:
        size = tuple(sample.shape[-2:])
        if self._latents is not None and size != self._latents:
            own, given = ("x".join(map(str, reversed(it))) for it in (self._latents, size))
            raise InputError(f"this model takes latents of {own} (width x height) only, not {given}; choose that size")
        self._check_length(encoder_hidden_states)
        return super().__call__(sample, timestep, encoder_hidden_states, *args, **settings)

    def fuse_qkv_projections(self) -> None:
        patches = (it for it in self.modules() if isinstance(it, DensePatch))
        if name := next((it.site.name for it in patches if it.site.kind in ("attn_key", "attn_value")), None):
            raise InputError(f"the edit of {name} would be lost in fused projections; do not fuse them")
        super().fuse_qkv_projections()  # type: ignore[misc]


def load_torch_pipeline(
    artifact: Artifact,
    device: str | torch.device,
    dtype: torch.dtype | None,
    *,
    base: Model | str | os.PathLike[str] | None = None,
    kernels: str | None = None,
    compiled: bool = False,
) -> Any:
    """The pipeline of an artifact in PyTorch: see `Artifact.load`, which says what the arguments are."""
    kernels = None if kernels == "auto" else kernels
    if "diffusers" in artifact.manifest.targets:
        if base is not None:
            raise InputError(f"{artifact.folder} has diffusers/, which is all that torch needs; leave base out")
        _check_unneeded(kernels)
        pipeline = artifact.model.pipeline(device, dtype)
        guard(pipeline, artifact.manifest.validity.hidden_states)
    else:
        pipeline = _patched_pipeline(artifact, source_of(artifact, base), device, dtype, kernels)
    if compiled:
        compile_unet(pipeline)
    return pipeline


def compile_unet(pipeline: Any) -> None:
    """Let torch.compile compile the UNet, in one graph, when it is first called.

    Each new shape is compiled once; after the second batch size, any. The text encoders run once a prompt and the VAE
    once a picture, which would not earn back what their compilation takes.

    Raises:
        InputError: PyTorch cannot compile here.
    """
    _try_compiler(pipeline.unet.device)
    pipeline.unet.compile(fullgraph=True)


def _try_compiler(device: torch.device) -> None:
    """Raise InputError unless PyTorch compiles here."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except BackendCompilerFailed as error:
        said = str(error.__cause__ or error).strip().partition("\n")[0][:200]
        raise InputError(
            f"PyTorch cannot compile here ({said}); install a C++ compiler, for a GPU also Triton, or leave compile out"
        ) from error


def kernel_for(edit: Edit, base: Model, kernels: str | None, device: str | torch.device) -> str | None:
    """Which kernel computes the patches of `edit` that are left to a GEGLU; None where there are none.

    Args:
        edit: of an artifact.
        base: the model that was edited, of which nothing is read.
        kernels: of `KERNELS`; None is `triton` on a CUDA device, else `reference`.
        device: of torch.

    Raises:
        InputError: there is no such kernel, or it was asked for and there is nothing for it to do, or no GPU.
    """
    sites = {site.name: site for site in base.sites}
    left = left_to_graph(edit, sites)
    if not any(isinstance(it, PatchActivation) and is_in_geglu(it, sites[it.site]) for it in left):
        _check_unneeded(kernels)
        return None
    kernel = kernels or ("triton" if torch.device(device).type == "cuda" else "reference")
    if kernel not in KERNELS["masked_geglu"]:
        known = ", ".join(KERNELS["masked_geglu"])
        raise InputError(f"there is no kernel {kernel!a:.50}; choose from {known}")
    if kernel != "reference" and torch.device(device).type != "cuda":
        raise InputError(f"the kernels {kernel!a} need an NVIDIA GPU, and torch draws on {device}; leave kernels out")
    return kernel


def _check_unneeded(kernels: str | None) -> None:
    if kernels is not None:
        raise InputError("no operator of this artifact needs a fused kernel in torch; leave kernels out")


def _patched_pipeline(
    artifact: Artifact, base: Model, device: str | torch.device, dtype: torch.dtype | None, kernels: str | None
) -> Any:
    edit = artifact.edit
    kernel = kernel_for(edit, base, kernels, device)
    if kernel is not None:
        _try_kernel(kernel, device, dtype or _stored_dtype(base))
    check_base(artifact, base)
    latents = latents_of(edit)
    if latents != artifact.manifest.validity.latents:
        raise InputError(
            f"{artifact.folder} says that it is for another size than its edit is for; take it from its source again"
        )
    lowered = lower_onto(edit, base)
    if dtype is not None:
        _check_holds(lowered.state, dtype)
    left = placed_in(lowered.remaining, base)
    pipeline = load_pipeline(base, device, dtype, lowered.state)
    for component, operations in left.items():
        network = getattr(pipeline, component)
        patches = [DensePatch(it, site, _parameter(network, site)) for site, it in operations.patched]
        # There is a kernel wherever a GEGLU is patched.
        put_patches(network, patches, partial(FusedGeglu, kernel=cast(str, kernel)))
        edits = [_site_edit(network, site, own, base) for site, own in operations.steered.items()]
        length = prompt_length([*edits, *patches])
        if component == "unet":
            _put_in_front(network, _EditedUNet, _prompt_length=length, _latents=latents)
        else:
            network.add_module("site_edits", ModuleList(edits))
            _put_in_front(network, _EditedTextEncoder, _prompt_length=length)
    if latents is not None:
        hold_to(pipeline, latents)
    guard(pipeline, first_states(edit))
    return pipeline


def _check_holds(state: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    """Raise InputError unless what folded, in the dtypes that are stored, is finite in another as well."""
    for tensors in state.values():
        for name, tensor in tensors.items():
            if not tensor.to(dtype).isfinite().all():
                raise InputError(f"the edited {name} is beyond what {dtype} holds; load it in torch.float32")


def _stored_dtype(base: Model) -> torch.dtype:
    """Of the UNet, as its edited weights are stored."""
    stored = base.tensor(base.sites_of("ffn2")[0])
    if stored is None:
        raise TypeError("a Linear has a weight")
    with safe_open(stored.file, "pt") as file:
        return cast(torch.dtype, file.get_slice(stored.name)[:0].dtype)


def _try_kernel(kernel: str, device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise InputError unless the kernel runs here, in this dtype."""
    h = _TRIED_WIDTH
    x, weight, value = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((1, h), (2 * h, h), (h,)))
    mask = pack_mask(torch.ones(h, dtype=torch.bool, device=device))
    try:
        if kernel in KERNELS["masked_geglu_linear"]:
            masked_geglu_linear(x, weight, None, mask, value, kernel)
        else:
            masked_geglu(weight[:, 0], mask, value, kernel)
    except KernelUnavailable as error:
        raise InputError(str(error)) from error


def _site_edit(
    network: Module, site: Site, operations: Sequence[ShiftActivation | SteerLatents], base: Model
) -> SiteEdit:
    like = _parameter(network, site)
    wide = torch.promote_types(like.dtype, torch.float32)
    # PyTorch's TopK says nothing of ties.
    edit = _WideSiteEdit(site, operations, blank_tokens(base, site, operations), wide, "threshold")
    for shift in edit.shift.values():
        constant(site, shift, like.dtype)
    return edit.to(like.device)


def _parameter(network: Module, site: Site) -> Tensor:
    """One of the site's, for its dtype and device."""
    return next(network.get_submodule(site.module).parameters())


def _put_in_front(network: Module, front: type[_Edited], **attributes: object) -> None:
    # Not a hook: those of a compiled network are compiled with it, and what they raise is lost.
    kind = type(network)
    network.__class__ = type(kind.__name__, (front, kind), {**attributes, "__module__": kind.__module__})
