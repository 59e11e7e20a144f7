"""The two passes of ActErase's calibration: draw the prompts, then look at what layers take in where the drawing went.

Sums are all that is kept of activations, in fp32 (fp64 for fp64) on the pipeline's device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bakeout.editor.calibrate import (
    PROMPTS_PER_RUN,
    Half,
    Sampling,
    UNetInputs,
    conditional_inputs,
    first_inputs,
    load_sums,
    observe,
    refuse_unless_finite,
    save_sums,
    watch,
)
from bakeout.editor.model import Model
from bakeout.editor.sites import Site


class Drawing(NamedTuple):
    """What is kept of prompts that were drawn.

    Attributes:
        sums: by site, [tokens, d] or [d]: the conditional half's activations summed over calls and prompts, over tokens
            their mean.
        samples: by call, [prompts, channels, height, width]: the conditional half of what the UNet was given.
        timesteps: by call, a number.
    """

    sums: Mapping[str, Tensor]
    samples: Mapping[int, Tensor]
    timesteps: Mapping[int, Tensor]

    def inputs(self, call: int, prompts: list[int], conditions: Mapping[str, Any]) -> UNetInputs:
        """What the UNet is given for some prompts of the drawing, under the conditions of as many of its own or others.

        `conditions` are those of all prompts.
        """
        return UNetInputs(self.samples[call][prompts], self.timesteps[call], _rows(conditions, prompts))


def draw(
    model: Model,
    pipeline: Any,
    sites: Sequence[Site],
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    at: Literal["input", "output"],
    by_token: bool,
    calls: int,
    kept: Collection[int],
    saved: Path | None,
    tell: Callable[[int], object],
) -> Drawing:
    """Draw prompts and sum up what their conditional half is at the sites.

    Args:
        model: what the pipeline was loaded from.
        pipeline: as for `observe`.
        sites: of the UNet.
        prompts: one or more.
        sampling: as for `observe`.
        at: input or output of the sites.
        by_token: keep tokens apart, not their mean.
        calls: of the UNet, all that the sampling makes.
        kept: the calls whose samples are kept.
        saved: a file from which an interrupted pass goes on; its name must depend on all that is given here.
        tell: called with the number of calls that were just done.

    Raises:
        InputError: activations that are not finite, or the file cannot be written.
    """
    runs = [prompts[start : start + PROMPTS_PER_RUN] for start in range(0, len(prompts), PROMPTS_PER_RUN)]
    done, state = (0, {}) if saved is None else load_sums(saved, pipeline.unet.device)
    if done:
        tell(done * calls)

    def add(site: Site, _call: int, half: Half, x: Tensor) -> None:
        if half == "conditional":
            _add(state, _of_sum(site.name), x, by_token)

    def run(number: int) -> None:
        begun = count()

        def keep(_unet: object, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
            call = next(begun)
            if call in kept:
                inputs = conditional_inputs(args, given, len(runs[number]))
                state[f"sample/{call}/{number}"] = inputs.sample.clone()
                state[f"timestep/{call}"] = inputs.timestep.clone()

        with pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True):
            observe(model, pipeline, sites, runs[number], sampling, add, calls=calls, at=at, tick=lambda: tell(1))

    for number in range(done, len(runs)):
        run(number)
        refuse_unless_finite({site.name: state[_of_sum(site.name)] for site in sites}, pipeline)
        if saved is not None:
            save_sums(saved, number + 1, state)
    return Drawing(
        {site.name: state[_of_sum(site.name)] for site in sites},
        {call: torch.cat([state[f"sample/{call}/{number}"] for number in range(len(runs))]) for call in kept},
        {call: state[f"timestep/{call}"] for call in kept},
    )


def text_conditions(pipeline: Any, prompts: Sequence[str], sampling: Sampling) -> Mapping[str, Any]:
    """What the UNet is given for prompts besides sample and time: tensors [prompts, ...] and tables of such."""
    runs = (prompts[start : start + PROMPTS_PER_RUN] for start in range(0, len(prompts), PROMPTS_PER_RUN))
    joined: Mapping[str, Any] = _joined([first_inputs(pipeline, run, sampling).conditions for run in runs])
    return joined


def magnitudes(
    model: Model,
    pipeline: Any,
    sites: Sequence[Site],
    evaluations: Iterable[UNetInputs],
    *,
    by_token: bool,
    tell: Callable[[int], object],
) -> dict[str, Tensor]:
    """The mean of |x| over evaluations of the UNet, x being what a site takes in: by site, [tokens, d_in] or [d_in].

    Evaluations of equal inputs agree to the last bit where they stand in the same place of as many.

    Args:
        model: what the pipeline was loaded from.
        pipeline: whose UNet it is.
        sites: of the UNet.
        evaluations: one or more, of any number of prompts each; each prompt counts as one.
        by_token: keep tokens apart, not their mean.
        tell: called with the number of prompts after each evaluation.

    Raises:
        InputError: activations that are not finite.
    """
    sums: dict[str, Tensor] = {}
    made = 0

    def add(site: Site, x: Tensor) -> None:
        _add(sums, site.name, x.abs(), by_token)

    with ExitStack() as hooks, torch.no_grad():
        for site in sites:
            hooks.enter_context(watch(model.module(pipeline, site), "input", partial(add, site)))
        for it in evaluations:
            pipeline.unet(it.sample, it.timestep, **it.conditions)
            made += len(it.sample)
            tell(len(it.sample))
    refuse_unless_finite(sums, pipeline)
    return {name: total.div_(made) for name, total in sums.items()}


def _add(sums: MutableMapping[str, Tensor], key: str, x: Tensor, by_token: bool) -> None:
    """Add x [prompts, tokens, d] up, a prompt at a time: a sum over prompts would be one more tensor of that size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    for row in x if by_token else x.mean(1, dtype=wide):
        if key in sums:
            sums[key].add_(row)
        else:
            sums[key] = row.to(wide, copy=True)


def _of_sum(site: str) -> str:
    return f"sum/{site}"


def _rows(value: Any, numbers: list[int]) -> Any:
    if isinstance(value, Mapping):
        return {name: _rows(it, numbers) for name, it in value.items()}
    return value[numbers]


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: _joined([value[name] for value in values]) for name in values[0]}
    return torch.cat(list(values))
