"""The reference of every comparison: an Edit as hooks on the eager base pipeline.

What the operations mean is said in `bakeout.editor.edit`; here it is computed literally, in the dtype of the module
that is edited (a sparse autoencoder in its own dtype, where that is wider). Nothing of `bakeout.export` is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from inspect import signature
from typing import Any, Protocol, Self, cast
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
    are recognised when the pipeline's text encoder runs, those of a negative prompt when its `encode_prompt` does;
    embeddings that the caller passes bypass the text encoder and whatever edits it. Contexts may be nested where they
    edit different sites.

    Raises:
        InputError: the Edit does not fit the pipeline, a site is edited already, or (while the pipeline runs) an
            operation is valid for another number of tokens, or for rows that cannot be told apart.
    """
    by_site: dict[str, list[Operation]] = defaultdict(list)
    for operation in merge([edit]).operations:
        by_site[operation.site].append(operation)
    with ExitStack() as stack:
        known: dict[tuple[str, Rows], _Watch] = {}
        for name, operations in by_site.items():
            site = model.site(name)
            module = _module(model, pipeline, site, operations)
            if module in _edited:
                raise InputError(f"{name} of this pipeline is edited already; merge the two edits into one")
            _edited.add(module)
            stack.callback(_edited.discard, module)
            parameter = next(module.parameters())
            own = [_converted(operation, parameter) for operation in operations]
            rows = {it.rows for it in own if isinstance(it, ShiftActivation | SteerLatents)} & _WATCHES.keys()
            for it in rows:
                if (site.component, it) not in known:
                    known[site.component, it] = _WATCHES[it].watched(pipeline, site.component, stack)
            hook = partial(_edited_output, own, {it: known[site.component, it] for it in rows})
            # First of the module's hooks: transformers records hidden states in one, and must record what is edited.
            stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield


class _Watch(Protocol):
    """Knows the rows of a text encoder's current call that an operation is for.

    Attributes:
        chosen: bool [batch] or [1], None between calls.
    """

    chosen: Tensor | None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self: ...


@dataclass
class _Prompted:
    """Knows which rows are not empty prompts; `blank` int64 [2] are the tokens that end and pad a prompt."""

    blank: Tensor
    chosen: Tensor | None = None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self:
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
        self.chosen = has_text(tokens.reshape(-1, tokens.shape[-1]), self.blank)

    def _forget(self, *_: object) -> None:
        self.chosen = None


def has_text(tokens: Tensor, blank: Tensor) -> Tensor:
    """Which rows of input_ids [batch, tokens] are not empty prompts, bool [batch]; `blank` end and pad a prompt."""
    # Every token must be blank: text may follow an end mark that stands in the prompt itself.
    return ~torch.isin(tokens[:, 1:], blank.to(tokens)).all(dim=1)


@dataclass
class _Conditional:
    """Knows whether a call is for prompts or for negative prompts.

    `encode_prompt` of diffusers' pipelines runs each text encoder once for the prompts and then, with guidance, once
    for the negative prompts, and leaves out either where its embeddings are given.

    Attributes:
        for_prompts: whether the text encoder's next call is for prompts, None outside `encode_prompt`.
        chosen: bool [1], None between calls.
    """

    for_prompts: bool | None = None
    chosen: Tensor | None = None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self:
        self = cls()
        encoder = getattr(pipeline, component)
        stack.callback(encoder.register_forward_pre_hook(self._read).remove)
        stack.callback(encoder.register_forward_hook(self._forget, always_call=True).remove)
        # The class's own method, or that of another text encoder or of a context around this one.
        outer = vars(pipeline).get("encode_prompt")
        stack.callback(_restore, pipeline, "encode_prompt", outer)
        pipeline.encode_prompt = wraps(pipeline.encode_prompt)(partial(self._encode, pipeline.encode_prompt))
        return self

    def _encode(self, encode_prompt: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = signature(encode_prompt).bind(*args, **kwargs).arguments
        self.for_prompts = given.get("prompt_embeds") is None
        try:
            return encode_prompt(*args, **kwargs)
        finally:
            self.for_prompts = None

    def _read(self, *_: object) -> None:
        if self.for_prompts is None:
            raise InputError(
                "this Edit skips negative prompts, which only the pipeline tells from others; run the pipeline, or its "
                "encode_prompt"
            )
        self.chosen, self.for_prompts = torch.tensor([self.for_prompts]), False

    def _forget(self, *_: object) -> None:
        self.chosen = None


def _restore(holder: Any, name: str, outer: Any) -> None:
    if outer is None:
        delattr(holder, name)
    else:
        setattr(holder, name, outer)


_WATCHES: Mapping[Rows, type[_Watch]] = {"prompted": _Prompted, "conditional": _Conditional}


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
    operations: Sequence[Operation],
    watches: Mapping[Rows, _Watch],
    module: Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    if not isinstance(output, Tensor):  # an encoder layer of transformers 4
        return _edited_output(operations, watches, module, args, output[0]), *output[1:]
    inputs = [it for it in operations if isinstance(it, PatchActivation) and it.at == "input"]
    weights = [it for it in operations if isinstance(it, PatchWeightInput)]
    y = _linear(cast(torch.nn.Linear, module), args[0], inputs, weights) if inputs or weights else output
    for operation in operations:
        if isinstance(operation, PatchActivation) and operation.at == "output":
            y = _patched(operation, y)
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


def _chosen(watch: _Watch) -> Tensor:
    if watch.chosen is None:
        raise InputError("this Edit skips some prompts, which are known by their tokens; run the whole text encoder")
    return watch.chosen


def _check_tokens(site: str, constant: Tensor, x: Tensor) -> None:
    if constant.ndim == 2 and constant.shape[0] != x.shape[-2]:
        raise InputError(
            f"the Edit at {site} is valid for {constant.shape[0]} tokens and not for {x.shape[-2]}; "
            "use the picture size or prompt length that it was calibrated at"
        )
