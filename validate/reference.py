"""The reference of every comparison: an Edit as hooks on the eager base pipeline.

What the operations mean is said in `bakeout.editor.edit`; here it is computed literally, in the dtype of the module
that is edited (a sparse autoencoder in its own dtype, where that is wider). Nothing of `bakeout.export` is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from bakeout.editor.edit import (
    Edit,
    Operation,
    PatchActivation,
    PatchWeightInput,
    ShiftActivation,
    SteerLatents,
    check_fits,
    merge,
)
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.sites import Site

_edited: WeakSet[Module] = WeakSet()


@contextmanager
def applied(edit: Edit, model: Model, pipeline: Any) -> Iterator[None]:
    """Apply `edit` to `pipeline` (of the base `model`) while the context lasts; weights are never touched.

    Works for any batch, with guidance or without, in fp64, fp32, bf16 and fp16, on any device. Rows of an empty prompt
    are recognised when the pipeline's text encoder runs; embeddings that the caller passes bypass the text encoder and
    whatever edits it. Contexts may be nested where they edit different sites.

    Raises:
        InputError: the Edit does not fit the pipeline, a site is edited already, or (while the pipeline runs) an
            operation is valid for another number of tokens.
    """
    by_site: dict[str, list[Operation]] = defaultdict(list)
    for operation in merge([edit]).operations:
        by_site[operation.site].append(operation)
    with ExitStack() as stack:
        prompts: dict[str, _Prompts] = {}
        for name, operations in by_site.items():
            site = model.site(name)
            module = _module(model, pipeline, site, operations)
            if module in _edited:
                raise InputError(f"{name} of this pipeline is edited already; merge the two edits into one")
            _edited.add(module)
            stack.callback(_edited.discard, module)
            parameter = next(module.parameters())
            own = [_converted(operation, parameter) for operation in operations]
            if any(getattr(operation, "rows", "all") == "prompted" for operation in own):
                prompts.setdefault(site.component, _Prompts.watched(pipeline, site.component, stack))
            hook = partial(_edited_output, own, prompts.get(site.component))
            # First of the module's hooks: transformers records hidden states in one, and must record what is edited.
            stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield


@dataclass
class _Prompts:
    """Which rows of a text encoder's current call are not empty prompts.

    Attributes:
        blank: int64 [2], the tokens that end and pad a prompt.
        present: bool [batch], None between calls.
    """

    blank: Tensor
    present: Tensor | None = None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> _Prompts:
        tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"), None)
        if tokenizer is None:
            raise InputError(
                f"the pipeline has no tokenizer of its {component}, by which empty prompts are known; load it with one"
            )
        self = cls(torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id]))
        encoder = getattr(pipeline, component)
        stack.callback(encoder.register_forward_pre_hook(self._read, with_kwargs=True).remove)
        stack.callback(encoder.register_forward_hook(self._forget, always_call=True).remove)
        return self

    def _read(self, _encoder: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            raise InputError("this Edit skips empty prompts, which are known by their tokens; pass input_ids")
        tokens = tokens.reshape(-1, tokens.shape[-1])
        # Every token must be blank: text may follow an end mark that stands in the prompt itself.
        self.present = ~torch.isin(tokens[:, 1:], self.blank.to(tokens)).all(dim=1)

    def _forget(self, *_: object) -> None:
        self.present = None


def _module(model: Model, pipeline: Any, site: Site, operations: Sequence[Operation]) -> Module:
    for operation in operations:
        check_fits(operation, site)
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
    operations: Sequence[Operation], prompts: _Prompts | None, module: Module, args: tuple[Any, ...], output: Any
) -> Any:
    if not isinstance(output, Tensor):  # an encoder layer of transformers 4
        return _edited_output(operations, prompts, module, args, output[0]), *output[1:]
    inputs = [it for it in operations if isinstance(it, PatchActivation) and it.at == "input"]
    weights = [it for it in operations if isinstance(it, PatchWeightInput)]
    y = _linear(cast(torch.nn.Linear, module), args[0], inputs, weights) if inputs or weights else output
    for operation in operations:
        if isinstance(operation, PatchActivation) and operation.at == "output":
            y = _patched(operation, y)
    result = y
    for operation in operations:
        if isinstance(operation, ShiftActivation | SteerLatents):
            shifted = result + (
                _shift(operation, y) if isinstance(operation, ShiftActivation) else _steer(operation, y)
            )
            result = shifted if operation.rows == "all" else _where_prompted(prompts, shifted, result)
    return result


def _linear(
    linear: torch.nn.Linear, x: Tensor, inputs: Sequence[PatchActivation], weights: Sequence[PatchWeightInput]
) -> Tensor:
    for patch in inputs:
        x = _patched(patch, x)
    weight: Tensor = linear.weight
    constants = []
    # Pruned weights see nothing, whatever else is at the site.
    for operation in sorted(weights, key=lambda it: it.value is not None):
        mask = operation.mask.to(weight.device)
        if operation.value is not None:
            constants.append(F.linear(operation.value.to(weight), weight.masked_fill(~mask, 0)))
        weight = weight.masked_fill(mask, 0)
    return sum(constants, F.linear(x, weight, linear.bias))


def _patched(patch: PatchActivation, x: Tensor) -> Tensor:
    _check_tokens(patch.site, patch.mask, x)
    return torch.where(patch.mask.to(x.device), patch.value.to(x), x)


def _shift(operation: ShiftActivation, y: Tensor) -> Tensor:
    _check_tokens(operation.site, operation.value, y)
    return operation.value.to(y)


def _steer(operation: SteerLatents, y: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, operation.encoder.dtype)
    encoder, bias, center, directions, strengths = (
        it.to(y.device, wide)
        for it in (
            operation.encoder, operation.encoder_bias, operation.center, operation.directions, operation.strengths,
        )
    )  # fmt: skip
    before = F.linear(y.to(wide) - center, encoder, bias)
    # A stable sort, so that of equal activations the lower index wins; torch.topk takes any.
    largest = before.sort(dim=-1, descending=True, stable=True).indices[..., : operation.k]
    z = torch.zeros_like(before).scatter(-1, largest, before.gather(-1, largest)).relu()
    return -F.linear(z[..., operation.neurons.to(y.device)] * strengths, directions).to(y.dtype)


def _where_prompted(prompts: _Prompts | None, shifted: Tensor, y: Tensor) -> Tensor:
    if prompts is None or prompts.present is None:
        raise InputError("this Edit skips empty prompts, which are known by their tokens; run the whole text encoder")
    return torch.where(prompts.present[:, None, None], shifted, y)


def _check_tokens(site: str, constant: Tensor, x: Tensor) -> None:
    if constant.ndim == 2 and constant.shape[0] != x.shape[-2]:
        raise InputError(
            f"the Edit at {site} is valid for {constant.shape[0]} tokens and not for {x.shape[-2]}; "
            "use the picture size or prompt length that it was calibrated at"
        )
