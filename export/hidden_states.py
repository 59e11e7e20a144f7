"""Keep whoever skips layers of an edited text encoder from reading what the edit does not reach.

An edit of layer i reaches hidden state i + 1 and those after it. `clip_skip` of diffusers reads the earlier a hidden
state the larger it is (`max_clip_skip`), in the end one of the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Self

from torch import Tensor
from torch.nn import Module

from bakeout.editor.errors import InputError
from bakeout.export.manifest import max_clip_skip


class ReachedStates(tuple[Tensor | None, ...]):
    """Hidden states 0 … L of a text encoder, of which those that the edit does not reach are withheld.

    They are None, and reading one by index or slice raises InputError. Length and iteration are those of all states, as
    code that handles any tuple expects.
    """

    guard: Guard

    def __new__(cls, states: Iterable[Tensor | None], guard: Guard) -> Self:
        """Withhold those before `guard.first`."""
        self = super().__new__(cls, (state if n >= guard.first else None for n, state in enumerate(states)))
        self.guard = guard
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.guard

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            earliest = min(range(len(self))[key], default=self.guard.first)
        else:
            # Before the first of all states there is nothing, but whoever asks for it skips too many layers as well.
            earliest = index(key) + (len(self) if index(key) < 0 else 0)
        if earliest < self.guard.first:
            raise self.guard.refusal(earliest)
        return super().__getitem__(key)


@dataclass(frozen=True)
class Guard:
    """A forward hook of a text encoder that makes its hidden states `ReachedStates`.

    Attributes:
        component: the encoder's name in the pipeline.
        family: of the model.
        layers: L, of the encoder.
        first: hidden state that is not withheld.
        largest: `clip_skip` that reads nothing withheld of any text encoder of the pipeline; 0 is none.
    """

    component: str
    family: str
    layers: int
    first: int
    largest: int

    def __call__(self, _encoder: Module, _args: object, output: Any) -> Any:
        """The output, a `ModelOutput` or without `return_dict` a tuple, in which hidden states are `ReachedStates`."""
        if isinstance(output, tuple):
            # Attentions are a tuple too, of one less.
            return tuple(
                ReachedStates(it, self) if isinstance(it, tuple) and len(it) == self.layers + 1 else it for it in output
            )
        if output.hidden_states is not None:
            output.hidden_states = ReachedStates(output.hidden_states, self)
        return output

    def refusal(self, state: int) -> InputError:
        """What is said to whoever reads hidden state `state`."""
        skipped = max_clip_skip(self.family, self.layers, state)
        cure = f"use at most {self.largest}, or leave it out" if self.largest else "leave clip_skip out"
        return InputError(
            f"clip_skip {skipped} reads a hidden state of {self.component} that the edit does not reach; {cure}"
        )


def guard(pipeline: Any, first_states: Mapping[str, int]) -> None:
    """Withhold, from now on, the hidden states of a pipeline's text encoders that an edit does not reach.

    What is read without `clip_skip` is never withheld. Copies of the pipeline, and the image-to-image pipeline of the
    same components, are guarded as well; what it saves is not.

    Args:
        pipeline: with diffusers' interface, eager or of ONNX Runtime.
        first_states: of each edited text encoder, the first hidden state that the edit reaches; none guards nothing.

    Raises:
        InputError: the pipeline has no such text encoder.
    """
    if not first_states:
        return
    encoders = _text_encoders(pipeline)
    if unknown := sorted(first_states.keys() - encoders.keys()):
        raise InputError(
            f"the edit is said to be in {unknown[0]!a:.100}, which is no text encoder of this model; take the artifact "
            "from its source again"
        )
    skips = clip_skips(pipeline, first_states)
    largest = max(0, min(skips.values()))
    for name, encoder in encoders.items():
        first = first_states.get(name, 0) + min(0, skips[name])
        encoder.register_forward_hook(Guard(name, _family(encoders), encoder.config.num_hidden_layers, first, largest))


def clip_skips(pipeline: Any, first_states: Mapping[str, int] = {}) -> dict[str, int]:
    """The largest `clip_skip` at which each text encoder of a pipeline is not read before its first hidden state.

    Args:
        pipeline: with diffusers' interface.
        first_states: of text encoders; it is 0 of one that is not named, which skips no more layers than it has.
    """
    encoders = _text_encoders(pipeline)
    return {
        name: max_clip_skip(_family(encoders), encoder.config.num_hidden_layers, first_states.get(name, 0))
        for name, encoder in encoders.items()
    }


def _text_encoders(pipeline: Any) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2")
    return {name: pipeline.components[name] for name in names if name in pipeline.components}


def _family(encoders: Mapping[str, Any]) -> str:
    return "sdxl" if "text_encoder_2" in encoders else "sd1"
