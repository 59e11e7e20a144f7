"""The reference of every comparison: an Edit as hooks on the eager base pipeline.

What the operations mean is said in `bakeout.editor.edit`; here it is computed literally, in the dtype of the module
that is edited (a sparse autoencoder in its own dtype, where that is wider). Nothing of `bakeout.export` is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from bakeout.editor.edit import (
    Edit,
    InputNorm,
    Operation,
    PatchActivation,
    PatchWeightInput,
    Rows,
    ShiftActivation,
    SteerLatents,
    check_fits,
)
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.editor.sites import Site
from bakeout.validate.watches import Drawing, Watch, watch_for

_edited: WeakSet[Module] = WeakSet()
_NOT_WHOLE = (
    "this Edit skips some prompts or calls, which are told apart where they enter a network; "
    "run the whole text encoder or the pipeline"
)


@contextmanager
def applied(edit: Edit, model: Model, pipeline: Any) -> Iterator[None]:
    """Apply `edit` to `pipeline` (of the base `model`) while the context lasts; weights are never touched.

    Works for any batch, with guidance or without, in fp64, fp32, bf16 and fp16, on any device. Rows of an empty prompt
    are recognised when the pipeline's text encoder runs, those of a negative prompt when its `encode_prompt` does, and
    in the UNet, as the calls of a drawing, when the pipeline draws; embeddings that the caller passes bypass the text
    encoder and whatever edits it. Contexts may be nested where they edit different sites.

    Raises:
        InputError: the Edit does not fit the pipeline, a site is edited already, or (while the pipeline runs) an
            operation is valid for another number of tokens or size of latents, or for rows or calls that cannot be told
            apart.
    """
    by_site: dict[str, list[Operation]] = defaultdict(list)
    for operation in merge([edit]).operations:
        by_site[operation.site].append(operation)
    with ExitStack() as stack:
        known: dict[tuple[str, Rows], Watch] = {}
        for name, operations in by_site.items():
            site = model.site(name)
            module = _module(model, pipeline, site, operations)
            if module in _edited:
                raise InputError(f"{name} of this pipeline is edited already; merge the two edits into one")
            _edited.add(module)
            stack.callback(_edited.discard, module)
            parameter = next(module.parameters())
            own = [_converted(operation, parameter) for operation in operations]
            watched = {rows for it in own for rows in _rows_to_watch(it)}
            for rows in watched:
                if (site.component, rows) not in known:
                    known[site.component, rows] = watch_for(rows, site.component).watched(
                        pipeline, site.component, stack
                    )
            hook = partial(_edited_output, own, {rows: known[site.component, rows] for rows in watched})
            # First of the module's hooks: transformers records hidden states in one, and must record what is edited.
            stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        if (size := latents_of(edit)) is not None:
            hook = partial(_check_latents, size, pipeline.vae_scale_factor)
            stack.callback(pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _rows_to_watch(operation: Operation) -> Iterator[Rows]:
    if isinstance(operation, PatchWeightInput):
        return
    if operation.rows != "all":
        yield operation.rows
    # Who knows the rows of the UNet's calls knows the calls as well.
    if isinstance(operation, PatchActivation) and operation.calls is not None:
        yield "conditional"


def latents_of(edit: Edit) -> tuple[int, int] | None:
    """Height and width of the only latents that `edit` is for; None is any. Raises InputError where there are two."""
    sizes = {it.latents for it in edit.operations if isinstance(it, PatchActivation) and it.latents is not None}
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise InputError(f"this Edit is for latents of {listed}; calibrate all of it at one picture size")
    return next(iter(sizes), None)


def _check_latents(
    size: tuple[int, int], factor: int, _unet: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    height, width = (kwargs["sample"] if "sample" in kwargs else args[0]).shape[-2:]
    if (height, width) != size:
        raise InputError(
            f"this Edit is valid for latents of {size[1]}x{size[0]} (width x height) and not of {width}x{height}; draw "
            f"pictures of {size[1] * factor}x{size[0] * factor} pixels"
        )


def _module(model: Model, pipeline: Any, site: Site, operations: Sequence[Operation]) -> Module:
    for operation in operations:
        check_fits(operation, site)
        if isinstance(operation, PatchActivation) and operation.calls is not None and site.component != "unet":
            raise InputError(f"{site.name} runs before the first call of a drawing; patch it without calls")
    module = model.module(pipeline, site)
    if site.weight is not None and tuple(cast(Tensor, module.weight).shape) != (site.d_out, site.d_in):
        raise InputError(f"the pipeline has another width at {site.name}; use a pipeline of {model.source}")
    return module


def _converted(operation: Operation, parameter: Tensor) -> Operation:
    """The operation on the device of `parameter`; what enters the module's own arithmetic in its dtype as well."""
    own: dict[str, Any] = {}
    for it in fields(operation):
        tensor = getattr(operation, it.name)
        if isinstance(tensor, Tensor):
            own[it.name] = tensor.to(parameter if it.name == "value" else parameter.device)
            if not own[it.name].isfinite().all():
                raise InputError(
                    f"a value of the Edit at {operation.site} is beyond what {parameter.dtype} holds; "
                    "load the pipeline in float32"
                )
    return replace(operation, **own)


def _edited_output(
    operations: Sequence[Operation],
    watches: Mapping[Rows, Watch],
    module: Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    if not isinstance(output, Tensor):  # an encoder layer of transformers 4
        return _edited_output(operations, watches, module, args, output[0]), *output[1:]
    patches = [it for it in operations if isinstance(it, PatchActivation)]
    weights = [it for it in operations if isinstance(it, PatchWeightInput)]
    x, y = args[0], output
    if weights or any(it.at == "input" for it in patches):
        x = _patched([it for it in patches if it.at == "input"], watches, x)
        y = _linear(cast(torch.nn.Linear, module), x, weights)
    y = _patched([it for it in patches if it.at == "output"], watches, y)
    return shifted(operations, y, {rows: _chosen(watch) for rows, watch in watches.items()})


def shifted(operations: Sequence[Operation], y: Tensor, chosen: Mapping[Rows, Tensor]) -> Tensor:
    """What a site gives in place of y [batch, tokens, d] by the shifts and latents among `operations`.

    `chosen` says which rows those are that an operation's `rows` name, bool [batch] or [1].
    """
    result = y
    for operation in operations:
        if isinstance(operation, ShiftActivation | SteerLatents):
            moved = result + (_shift(operation, y) if isinstance(operation, ShiftActivation) else _steer(operation, y))
            if operation.rows != "all":
                moved = torch.where(chosen[operation.rows].to(y.device)[:, None, None], moved, result)
            result = moved
    return result


def _linear(linear: torch.nn.Linear, x: Tensor, weights: Sequence[PatchWeightInput]) -> Tensor:
    weight: Tensor = linear.weight
    constants = []
    # Pruned weights see nothing, whatever else is at the site.
    for operation in sorted(weights, key=lambda it: it.value is not None):
        mask = operation.mask.to(weight.device)
        if operation.value is not None:
            constants.append(F.linear(operation.value.to(weight), weight.masked_fill(~mask, 0)))
        weight = weight.masked_fill(mask, 0)
    return sum(constants, F.linear(x, weight, linear.bias))


def _patched(patches: Sequence[PatchActivation], watches: Mapping[Rows, Watch], x: Tensor) -> Tensor:
    """What x [batch, tokens, d] is under patches of one place: where(any of M, the mean of v over those M, x)."""
    masks, values = [], []
    for patch in patches:
        _check_tokens(patch.site, patch.mask, x)
        if patch.calls is not None and _call(watches) not in range(*patch.calls):
            continue
        mask = patch.mask.to(x.device)
        if patch.rows != "all":
            mask = mask & _chosen(watches[patch.rows]).to(x.device)[:, None, None]
        masks.append(mask)
        values.append(patch.value.to(x))
    if len(masks) <= 1:
        return torch.where(masks[0], values[0], x) if masks else x
    count, total = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.float64)
    for mask, value in zip(masks, values, strict=True):
        count, total = count + mask.int(), total + value.double().where(mask, 0)
    return torch.where(count > 0, (total / count.clamp(min=1)).to(x), x)


def _shift(operation: ShiftActivation, y: Tensor) -> Tensor:
    _check_tokens(operation.site, operation.value, y)
    return operation.value.to(y)


def _steer(operation: SteerLatents, y: Tensor) -> Tensor:
    before = preactivations(operation, y)
    _, scale = _norm(operation.input_norm, y.to(before))
    # A stable sort, so that of equal activations the lower index wins; torch.topk takes any.
    largest = before.sort(dim=-1, descending=True, stable=True).indices[..., : operation.k]
    z = torch.zeros_like(before).scatter(-1, largest, before.gather(-1, largest)).relu()
    directions, strengths = operation.directions.to(before), operation.strengths.to(before)
    return -(F.linear(z[..., operation.neurons.to(y.device)] * strengths, directions) * scale).to(y.dtype)


def preactivations(operation: SteerLatents, y: Tensor) -> Tensor:
    """E (n(y) - c) + e of y [..., d]: [..., m], in the wider of both dtypes."""
    wide = torch.promote_types(y.dtype, operation.encoder.dtype)
    encoder, bias, center = (
        it.to(y.device, wide) for it in (operation.encoder, operation.encoder_bias, operation.center)
    )
    shift, scale = _norm(operation.input_norm, y.to(wide))
    return F.linear((y.to(wide) - shift) / scale - center, encoder, bias)


def _norm(name: InputNorm, y: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is subtracted from the autoencoder's input and by what it is divided, each [..., 1]."""
    if name == "layer_norm":
        return y.mean(-1, keepdim=True), y.std(-1, keepdim=True) + 1e-5
    return 0.0, y.norm(dim=-1, keepdim=True) / y.shape[-1] ** 0.5 if name == "constant_norm" else 1.0


def _chosen(watch: Watch) -> Tensor:
    if watch.chosen is None:
        raise InputError(_NOT_WHOLE)
    return watch.chosen


def _call(watches: Mapping[Rows, Watch]) -> int:
    call = cast(Drawing, watches["conditional"]).call
    if call is None:
        raise InputError(_NOT_WHOLE)
    return call


def _check_tokens(site: str, constant: Tensor, x: Tensor) -> None:
    if constant.ndim == 2 and constant.shape[0] != x.shape[-2]:
        raise InputError(
            f"the Edit at {site} is valid for {constant.shape[0]} tokens and not for {x.shape[-2]}; "
            "use the picture size or prompt length that it was calibrated at"
        )
