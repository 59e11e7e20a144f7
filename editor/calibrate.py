"""Run prompts through the first calls of a model's UNet and add up what its layers take in.

Nothing is kept but the sums. Of two numbers that almost agree, the rounding says which is larger, and the rounding of
a kernel depends on the shape that it runs on. So the networks always run `PROMPTS_PER_RUN` prompts, the last run filled
up, and every prompt has its place by its number: nothing that a user sets for speed or memory reaches the sums.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.sites import Site

PROMPTS_PER_RUN = 4
LARGEST_SIDE = 2048  # of a picture, in pixels; SDXL's own is 1024
_LIBRARIES = ("bakeout", "torch", "diffusers", "transformers")

Half = Literal["unconditional", "conditional"]
SchedulerName = Literal["model", "dpm-solver"]
# Called with the site, the number of the UNet call, the half of the guidance, and the site's input or output [prompts,
# tokens, d] in the network's dtype. A text encoder runs once a half, before the UNet; its call is 0.
Observer: TypeAlias = Callable[[Site, int, Half, Tensor], object]
# Makes of inputs [prompts, tokens, d_in] something of each prompt, [prompts, ...].
Reduce: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        steps: as the scheduler counts them.
        guidance: the scale of guidance; 1 and below: none.
        seed: of every prompt.
        scheduler: the `model`'s own, or `dpm-solver`, DPM-Solver++ on the noise levels of the model's.
        size: width and height of the pictures in pixels; None is the model's own.
    """

    steps: int
    guidance: float
    seed: int
    scheduler: SchedulerName = "model"
    size: tuple[int, int] | None = None


class _Enough(Exception):  # noqa: N818 - not an error
    """Leaves a pipeline whose remaining calls nobody needs."""


class UNetInputs(NamedTuple):
    """What the UNet is given, of the conditional half only.

    Attributes:
        sample: [prompts, channels, height, width], latents as the scheduler scales them.
        timestep: a number.
        conditions: what it is given by name: tensors [prompts, ...] and tables of such.
    """

    sample: Tensor
    timestep: Tensor
    conditions: Mapping[str, Any]


def call_timesteps(pipeline: Any, steps: int, scheduler_name: SchedulerName = "model") -> tuple[float, ...]:
    """The time step of every UNet call that `steps` steps of a scheduler make; PNDM makes one more.

    Raises:
        InputError: more steps than the model was trained with, or than the scheduler can take.
    """
    scheduler = _fresh_scheduler(pipeline, scheduler_name)
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise InputError(f"steps is {steps}: this model was trained with {trained}, so use at most as many")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{type(scheduler).__name__} cannot draw in {steps} steps: take more steps or another scheduler"
        ) from error
    return tuple(scheduler.timesteps.tolist())


def latent_size(pipeline: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the latents for pictures of a width and height in pixels, or of the model's own.

    Raises:
        InputError: a size that the UNet's levels do not halve evenly, or beyond `LARGEST_SIDE`.
    """
    unet, factor = pipeline.unet.config, pipeline.vae_scale_factor
    if size is None:
        own = unet.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        size = width * factor, height * factor
    unit = factor * 2 ** (len(unet.block_out_channels) - 1)
    if any(side % unit or not 0 < side <= LARGEST_SIDE for side in size):
        most = LARGEST_SIDE // unit
        width, height = (min(max(round(side / unit), 1), most) * unit for side in size)
        raise InputError(
            f"size is {size[0]} x {size[1]}, and this model draws in multiples of {unit} pixels up to {most * unit}: "
            f"take {width} x {height}"
        )
    return size[1] // factor, size[0] // factor


def latent_tokens(pipeline: Any, site: Site, latents: tuple[int, int]) -> int:
    """How many tokens a site of the UNet sees, for latents of a height and width from `latent_size`."""
    _, side, block, *_ = site.name.split(".")
    deepest = len(pipeline.unet.config.block_out_channels) - 1
    level = {"down": int(block), "up": deepest - int(block)}[side] if block.isdigit() else deepest
    return (latents[0] >> level) * (latents[1] >> level)


def observe(
    model: Model,
    pipeline: Any,
    sites: Sequence[Site],
    prompts: Sequence[str],
    sampling: Sampling,
    observer: Observer,
    *,
    calls: int,
    at: Literal["input", "output"] = "input",
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Run up to PROMPTS_PER_RUN prompts through the first `calls` UNet calls, all from the latent of one seed.

    The noise of every prompt, of its latent and of its steps, is that of `torch.Generator("cpu").manual_seed(seed)`.
    Nothing is decoded, and the pipeline comes out as it went in, whatever happens.

    Args:
        model: what the pipeline was loaded from.
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline.
        sites: where to observe.
        prompts: 1 to PROMPTS_PER_RUN texts.
        sampling: how to draw; without guidance only the conditional half is seen.
        observer: called for every site, call and half.
        calls: UNet calls to run; 0 runs the text encoders only.
        at: whether the inputs or the outputs of the sites are observed.
        tick: called after each call, or once where `calls` is 0.
    """
    begun = 0
    text_runs: dict[str, int] = defaultdict(int)

    def before_call(*_: object) -> None:
        nonlocal begun
        if begun == calls:
            raise _Enough
        if begun:
            tick()
        begun += 1

    def see(site: Site, x: Tensor) -> None:
        if site.component == "unet":
            parts = x.reshape(-1, PROMPTS_PER_RUN, *x.shape[1:])
            halves: tuple[Half, ...] = ("unconditional", "conditional")
            for half, part in zip(halves[-len(parts) :], parts, strict=True):
                observer(site, begun - 1, half, part[: len(prompts)])
        else:
            # The pipelines encode the prompts first, then what guidance leads away from.
            half = "unconditional" if text_runs[site.name] else "conditional"
            text_runs[site.name] += 1
            observer(site, 0, half, x[: len(prompts)])

    with ExitStack() as hooks:
        hooks.enter_context(pipeline.unet.register_forward_pre_hook(before_call))
        for site in sites:
            hooks.enter_context(watch(model.module(pipeline, site), at, partial(see, site)))
        _draw(pipeline, prompts, sampling)
    tick()


def first_inputs(pipeline: Any, prompts: Sequence[str], sampling: Sampling) -> UNetInputs:
    """What the first UNet call is given for up to PROMPTS_PER_RUN prompts; only the text encoders run."""
    found: list[UNetInputs] = []

    def take(_unet: object, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        found.append(conditional_inputs(args, given, len(prompts)))
        raise _Enough

    with pipeline.unet.register_forward_pre_hook(take, with_kwargs=True):
        _draw(pipeline, prompts, sampling)
    return found[0]


def conditional_inputs(args: tuple[Any, ...], given: Mapping[str, Any], prompts: int) -> UNetInputs:
    """Of the arguments with which a pipeline calls the UNet in `observe`, those for the first conditional `prompts`."""

    def rows(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: rows(it) for name, it in value.items()}
        return value[-PROMPTS_PER_RUN:][:prompts]

    conditions = {name: rows(it) for name, it in given.items() if isinstance(it, Tensor | Mapping)}
    return UNetInputs(rows(args[0]), args[1], conditions)


def watch(module: torch.nn.Module, at: Literal["input", "output"], see: Callable[[Tensor], object]) -> RemovableHandle:
    """Have `see` called with the first input, or the output, of every call of a module."""

    def before(_module: object, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])

    def after(_module: object, _inputs: object, output: Tensor) -> None:
        see(output)

    return module.register_forward_pre_hook(before) if at == "input" else module.register_forward_hook(after)


def _draw(pipeline: Any, prompts: Sequence[str], sampling: Sampling) -> None:
    """Run the pipeline on a full run of prompts, the last one repeated, to its end or to `_Enough`."""
    if not 0 < len(prompts) <= PROMPTS_PER_RUN:
        raise ValueError(f"{len(prompts)} prompts in a run of {PROMPTS_PER_RUN}")
    # A copy shares the networks and nothing else: what a call sets on the pipeline stays with the copy.
    own = copy.copy(pipeline)
    own.scheduler = _fresh_scheduler(pipeline, sampling.scheduler)
    own.set_progress_bar_config(disable=True)
    width, height = sampling.size or (None, None)
    with suppress(_Enough):
        own(
            prompt=[*prompts, *[prompts[-1]] * (PROMPTS_PER_RUN - len(prompts))],
            generator=[torch.Generator("cpu").manual_seed(sampling.seed) for _ in range(PROMPTS_PER_RUN)],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            height=height,
            width=width,
            output_type="latent",
        )


def sum_over_prompts(
    model: Model,
    pipeline: Any,
    sites: Sequence[Site],
    prompts: Sequence[Sequence[str]],
    sampling: Sampling,
    reduce: Reduce,
    *,
    moments: Sequence[int],
    halves: Collection[Half] = ("unconditional", "conditional"),
    saved: Path | None = None,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Tensor]:
    """What `reduce` makes of a site's inputs, summed over prompts and halves: by site, [sets, moments, ...].

    Args:
        model: what the pipeline was loaded from.
        pipeline: as for `observe`.
        sites: where to observe; all of the UNet or all of text encoders.
        prompts: sets of prompts, none empty; each set is summed by itself.
        sampling: as for `observe`.
        reduce: makes of inputs [prompts, tokens, d_in] something of each prompt, [prompts, ...].
        moments: for each UNet call that is needed, which sum it goes into: from 0 on, rising. Text encoders have one.
        halves: which halves of the guidance count.
        saved: a file that keeps the sums so far, so that an interrupted pass goes on where it was. Its name must
            depend on all that is given here (`fingerprint`).
        progress: called with the part, of one, of the pass that was just done.

    Raises:
        InputError: activations that are not finite, or the file cannot be written.
    """
    runs = [
        (number, texts[start : start + PROMPTS_PER_RUN])
        for number, texts in enumerate(prompts)
        for start in range(0, len(texts), PROMPTS_PER_RUN)
    ]
    calls = len(moments) if any(site.component == "unet" for site in sites) else 0
    tell = progress or (lambda _part: None)

    def sums_of(number: int, texts: Sequence[str]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def add(site: Site, call: int, half: Half, x: Tensor) -> None:
            if half in halves:
                _add(sums, _key(number, moments[call], site), reduce(x).sum(0))

        def tick() -> None:
            tell(1 / len(runs) / max(calls, 1))

        observe(model, pipeline, sites, texts, sampling, add, calls=calls, tick=tick)
        return sums

    done, totals = (0, {}) if saved is None else load_sums(saved, pipeline.unet.device)
    if done:
        tell(done / len(runs))
    for number, texts in runs[done:]:
        # Whole runs only: one that breaks off leaves no half of itself in the totals.
        sums = sums_of(number, texts)
        refuse_unless_finite(sums, pipeline)
        for key, value in sums.items():
            _add(totals, key, value)
        done += 1
        if saved is not None:
            save_sums(saved, done, totals)

    def stacked(site: Site, number: int) -> Tensor:
        return torch.stack([totals[_key(number, moment, site)] for moment in range(moments[-1] + 1)])

    return {site.name: torch.stack([stacked(site, number) for number in range(len(prompts))]) for site in sites}


def fingerprint(pipeline: Any, prompts: Sequence[Sequence[str]], said: Mapping[str, Any]) -> str:
    """SHA-256 of all that sums depend on.

    That is the sets of prompts and their tokens, `said` (JSON), the networks with their weights, the scheduler, the
    device and the libraries' versions.
    """
    scheduler = pipeline.scheduler
    networks = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
    texts = ["", *chain.from_iterable(prompts)]
    facts = [
        said, prompts, PROMPTS_PER_RUN, str(pipeline.unet.device), [version(name) for name in _LIBRARIES],
        type(pipeline).__name__, dict(pipeline.config), type(scheduler).__name__, dict(scheduler.config),
        [str(network.config) for network in networks.values() if network is not None],
        [_tokens(tokenizer, texts) for tokenizer in tokenizers if tokenizer is not None],
    ]  # fmt: skip
    total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for component, network in networks.items():
        for name, tensor in network.state_dict().items() if network is not None else ():
            total.update(f"{component} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy())
    return total.hexdigest()


def _tokens(tokenizer: Any, texts: list[str]) -> Any:
    """As the pipelines ask for them."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids


def _fresh_scheduler(pipeline: Any, name: SchedulerName) -> Any:
    if name == "model":
        return type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def _key(number: int, moment: int, site: Site) -> str:
    return f"{number}/{moment}/{site.name}"


def refuse_unless_finite(sums: Mapping[str, Tensor], pipeline: Any) -> None:
    """Raise InputError if any of `sums`, whose keys end in the site's name after a slash, is not finite."""
    for key, value in sums.items():
        if not value.isfinite().all():
            narrow = pipeline.unet.dtype in (torch.float16, torch.bfloat16)
            cure = "calibrate in fp32" if narrow else "this model draws nothing with these settings; mend either"
            raise InputError(f"the activations at {key.rpartition('/')[2]} are not finite: {cure}")


def _add(sums: MutableMapping[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def load_sums(path: Path, device: torch.device) -> tuple[int, dict[str, Tensor]]:
    """How many runs a file of `save_sums` holds and their sums; none where it is not there or not whole.

    Its time becomes now: whoever looks into the folder sees which calibrations were of use.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            keys = stored.keys()
            path.touch()
            return int(stored.metadata()["runs"]), {key: stored.get_tensor(key).to(device) for key in keys}
    except (OSError, SafetensorError):
        return 0, {}


def save_sums(path: Path, runs: int, sums: Mapping[str, Tensor]) -> None:
    """Write the sums of so many runs in place of a file. Raises InputError if it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    content = safetensors_torch.save({key: value.cpu() for key, value in sums.items()}, {"runs": str(runs)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Overwritten by the next run if this one is killed here: the name is the same.
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): make room there, or choose another output folder"
        ) from error
