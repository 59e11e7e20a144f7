"""What hooks ask of a running pipeline: for whom each row of a batch is, and which call of a drawing this is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import Module

from bakeout.editor.edit import Rows
from bakeout.editor.errors import InputError


class Watch(Protocol):
    """Knows the rows of a network's current call that an operation is for.

    Attributes:
        chosen: bool [batch] or [1], None between calls.
    """

    chosen: Tensor | None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self:
        """One that watches a component of the pipeline until the stack closes."""


@dataclass
class Prompted:
    """Knows which rows are not empty prompts; `blank` int64 [2] are the tokens that end and pad a prompt."""

    blank: Tensor
    chosen: Tensor | None = None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self:
        """See `Watch`."""
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
class Conditional:
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
        """See `Watch`."""
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


@dataclass
class Drawing:
    """Knows the UNet's calls of a drawing, and of each which rows are for prompts.

    With guidance diffusers' pipelines give the UNet the negative prompts' rows before those of the prompts.

    Attributes:
        count: of the calls since the drawing began, None outside of one.
        call: the number of the current call, from 0; None between calls and outside of a drawing.
        chosen: bool [batch], as `call`.
    """

    count: int | None = None
    call: int | None = None
    chosen: Tensor | None = None

    @classmethod
    def watched(cls, pipeline: Any, component: str, stack: ExitStack) -> Self:
        """See `Watch`."""
        self = cls()
        unet = getattr(pipeline, component)
        stack.callback(unet.register_forward_pre_hook(partial(self._read, pipeline), with_kwargs=True).remove)
        stack.callback(unet.register_forward_hook(self._forget, always_call=True).remove)
        own = type(pipeline)

        @wraps(own.__call__)
        def draw(running: Any, *args: Any, **kwargs: Any) -> Any:
            outer, self.count = self.count, 0
            try:
                return own.__call__(running, *args, **kwargs)
            finally:
                self.count = outer

        # Python looks for the method in the class only, and no other method is there from the first step to the last.
        stack.callback(setattr, pipeline, "__class__", own)
        pipeline.__class__ = type(own.__name__, (own,), {"__call__": draw, "__module__": own.__module__})
        return self

    def _read(self, pipeline: Any, _unet: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.count is None:
            raise InputError(
                "this Edit acts on some rows or calls of a drawing only, which only the pipeline tells from others; "
                "run the pipeline"
            )
        self.call, self.count = self.count, self.count + 1
        batch = len(kwargs["sample"] if "sample" in kwargs else args[0])
        negative = batch // 2 if pipeline.do_classifier_free_guidance else 0
        self.chosen = torch.arange(batch) >= negative

    def _forget(self, *_: object) -> None:
        self.call = self.chosen = None


_OF_TEXTS: Mapping[Rows, type[Watch]] = {"prompted": Prompted, "conditional": Conditional}


def watch_for(rows: Rows, component: str) -> type[Watch]:
    """What knows such rows of a component's calls; not of `all`, which need nobody."""
    return Drawing if component == "unet" else _OF_TEXTS[rows]
