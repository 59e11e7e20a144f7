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
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.sites import Site

PROMPTS_PER_RUN = 4
_LIBRARIES = ("torch", "diffusers", "transformers")

Half = Literal["unconditional", "conditional"]
# Called with the site, the number of the UNet call, the half of the guidance, and the site's input [prompts, tokens,
# d_in] in the network's dtype. A text encoder runs once a half, before the UNet; its call is 0.
Observer: TypeAlias = Callable[[Site, int, Half, Tensor], object]
# Makes of inputs [prompts, tokens, d_in] something of each prompt, [prompts, ...].
Reduce: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: steps as the scheduler counts them, the scale of guidance, the seed of every prompt."""

    steps: int
    guidance: float
    seed: int


class _Enough(Exception):  # noqa: N818 - not an error
    """Leaves a pipeline whose remaining calls nobody needs."""


def call_timesteps(pipeline: Any, steps: int) -> tuple[float, ...]:
    """The time step of every UNet call that `steps` steps of the pipeline's scheduler make; PNDM makes one more.

    Raises:
        InputError: the scheduler cannot take that many steps.
    """
    scheduler = _fresh_scheduler(pipeline)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{type(scheduler).__name__} cannot draw in {steps} steps: take more steps or another scheduler"
        ) from error
    return tuple(scheduler.timesteps.tolist())


def observe(
    model: Model,
    pipeline: Any,
    sites: Sequence[Site],
    prompts: Sequence[str],
    sampling: Sampling,
    observer: Observer,
    *,
    calls: int,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Run up to PROMPTS_PER_RUN prompts through the first `calls` UNet calls, all from the latent of one seed.

    The noise of every prompt, of its latent and of its steps, is that of `torch.Generator("cpu").manual_seed(seed)`.
    Nothing is decoded, and the pipeline comes out as it went in, whatever happens.

    Args:
        model: what the pipeline was loaded from.
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline.
        sites: where to observe inputs.
        prompts: 1 to PROMPTS_PER_RUN texts.
        sampling: steps, guidance (1 and below: none, only the conditional half is seen) and seed.
        observer: called for every site, call and half.
        calls: UNet calls to run; 0 runs the text encoders only.
        tick: called after each call, or once where `calls` is 0.
    """
    if not 0 < len(prompts) <= PROMPTS_PER_RUN:
        raise ValueError(f"{len(prompts)} prompts in a run of {PROMPTS_PER_RUN}")
    begun = 0
    text_runs: dict[str, int] = defaultdict(int)

    def before_call(*_: object) -> None:
        nonlocal begun
        if begun == calls:
            raise _Enough
        if begun:
            tick()
        begun += 1

    def watch(site: Site) -> Callable[..., None]:
        def of_unet(_module: object, inputs: tuple[Tensor, ...]) -> None:
            parts = inputs[0].reshape(-1, PROMPTS_PER_RUN, *inputs[0].shape[1:])
            halves: tuple[Half, ...] = ("unconditional", "conditional")
            for half, part in zip(halves[-len(parts) :], parts, strict=True):
                observer(site, begun - 1, half, part[: len(prompts)])

        def of_text_encoder(_module: object, inputs: tuple[Tensor, ...]) -> None:
            # The pipelines encode the prompts first, then what guidance leads away from.
            half: Half = "unconditional" if text_runs[site.name] else "conditional"
            text_runs[site.name] += 1
            observer(site, 0, half, inputs[0][: len(prompts)])

        return of_unet if site.component == "unet" else of_text_encoder

    # A copy shares the networks and nothing else: what a call sets on the pipeline stays with the copy.
    own = copy.copy(pipeline)
    own.scheduler = _fresh_scheduler(pipeline)
    own.set_progress_bar_config(disable=True)
    try:
        with ExitStack() as hooks:
            hooks.enter_context(pipeline.unet.register_forward_pre_hook(before_call))
            for site in sites:
                hooks.enter_context(model.module(pipeline, site).register_forward_pre_hook(watch(site)))
            own(
                prompt=[*prompts, *[prompts[-1]] * (PROMPTS_PER_RUN - len(prompts))],
                generator=[torch.Generator("cpu").manual_seed(sampling.seed) for _ in range(PROMPTS_PER_RUN)],
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                output_type="latent",
            )
    except _Enough:
        pass
    tick()


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

    done, totals = (0, {}) if saved is None else _load(saved, pipeline.unet.device)
    if done:
        tell(done / len(runs))
    for number, texts in runs[done:]:
        # Whole runs only: one that breaks off leaves no half of itself in the totals.
        sums = sums_of(number, texts)
        _refuse_unless_finite(sums, pipeline)
        for key, value in sums.items():
            _add(totals, key, value)
        done += 1
        if saved is not None:
            _save(saved, done, totals)

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


def _fresh_scheduler(pipeline: Any) -> Any:
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


def _key(number: int, moment: int, site: Site) -> str:
    return f"{number}/{moment}/{site.name}"


def _refuse_unless_finite(sums: Mapping[str, Tensor], pipeline: Any) -> None:
    for key, value in sums.items():
        if not value.isfinite().all():
            narrow = pipeline.unet.dtype in (torch.float16, torch.bfloat16)
            cure = "calibrate in fp32" if narrow else "this model draws nothing with these settings; mend either"
            raise InputError(f"the activations at {key.rpartition('/')[2]} are not finite: {cure}")


def _add(sums: MutableMapping[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _load(path: Path, device: torch.device) -> tuple[int, dict[str, Tensor]]:
    """How many runs the file holds and their sums; none where it is not there or not whole.

    Its time becomes now: whoever looks into the folder sees which calibrations were of use.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            keys = stored.keys()
            path.touch()
            return int(stored.metadata()["runs"]), {key: stored.get_tensor(key).to(device) for key in keys}
    except (OSError, SafetensorError):
        return 0, {}


def _save(path: Path, runs: int, sums: Mapping[str, Tensor]) -> None:
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
