"""Draw with a pipeline as it is, and keep what a comparison needs: latents after every step, pictures, calls.

A pipeline's own `__call__` draws: its text encoder, guidance, scheduler and VAE are what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import Module

from bakeout.generate import problem_of_picture
from bakeout.validate.metrics import Pixels
from bakeout.validate.report.schema import Kind

# Calls of the UNet that are kept of a trajectory, from its first to its last.
KEPT_STEPS = 5


@dataclass(frozen=True)
class Trial:
    """A prompt and seed to draw. `concept` is what was erased where the prompt has it, else empty."""

    prompt: str
    seed: int
    kind: Kind
    concept: str = ""


@dataclass(frozen=True)
class Settings:
    """How to draw.

    Attributes:
        steps: of denoising.
        guidance: its scale.
        size: width and height in pixels.
        latents: a picture's shape.
        batch: how many pictures at once, at most.
        least: how many at least: what a batch lacks is drawn for nothing.
    """

    steps: int
    guidance: float
    size: tuple[int, int]
    latents: tuple[int, int, int]
    batch: int
    least: int = 1


@dataclass(frozen=True)
class Call:
    """What a network was called with, by the names of the contract; `when` says in words when."""

    network: str
    when: str
    inputs: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """Of its batch."""
        return next(len(value) for value in self.inputs.values() if value.ndim)


def one_more(call: Call) -> Call:
    """The same call with its first row once more at the end: a network must not depend on the size of its batch."""
    inputs = {name: value if value.ndim == 0 else torch.cat([value, value[:1]]) for name, value in call.inputs.items()}
    return Call(call.network, f"{call.when}, in a batch of one more", inputs)


def of_two(call: Call) -> Call:
    """Its first and last row alone: as one picture is drawn, whose negative prompt comes before its prompt.

    Most pictures are drawn so, and validations draw more at once.
    """
    inputs = {name: value if value.ndim == 0 else value[[0, -1]] for name, value in call.inputs.items()}
    return Call(call.network, f"{call.when}, the first and last row alone", inputs)


def smaller(call: Call, unit: int | None) -> Call:
    """Its first row alone, and of a picture or latents the upper half, to whole `unit`s if there are any in a half.

    With None, all of its height: of a network that takes one size only.

    Which size and batch a network is asked for must not choose what it computes.
    """
    inputs = {name: value if value.ndim == 0 else value[:1] for name, value in call.inputs.items()}
    if unit is None:
        return Call(call.network, f"{call.when}, the first row alone", inputs)
    for name in {"sample", "latent_sample"} & inputs.keys():
        height = inputs[name].shape[2]
        inputs[name] = inputs[name][:, :, : height // 2 // unit * unit or height].contiguous()
    return Call(call.network, f"{call.when}, the first row alone and half as high", inputs)


def in_other_shapes(calls: Sequence[Call], pipeline: Any, latents: tuple[int, int] | None) -> list[Call]:
    """The first call of each network, in a larger batch, in one of two rows and in a smaller one of another size.

    With `latents`, the height and width of the only ones that the edit is for, the UNet's size is always theirs.
    """
    halvings = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    units = {
        "unet": halvings if latents is None else None,
        "vae_encoder": halvings * pipeline.vae_scale_factor,
    }
    first = {call.network: call for call in reversed(calls)}
    others = [other for it in first.values() for other in (one_more(it), smaller(it, units.get(it.network, 1)))]
    return others + [of_two(it) for it in first.values() if it.rows > 2]


def odd_prompts(pipeline: Any, component: str, prompt: str) -> list[Call]:
    """Calls of a text encoder with what may be taken for an empty prompt, or is one, together and alone."""
    tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
    end, pad, length = tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length
    texts = [
        prompt, "", "   ", end, pad, f"{end} {prompt}", f"{prompt} {end} {prompt}", f"{prompt} " * length,
        prompt.partition(" ")[0], f"{pad} {prompt}",
    ]  # fmt: skip
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    alone = {"an empty prompt": 1, "an end mark and a prompt": 5, "one word": 8}
    return [
        Call(component, "odd prompts and empty ones together", {"input_ids": ids}),
        *(Call(component, f"{what} alone", {"input_ids": ids[row : row + 1]}) for what, row in alone.items()),
    ]


@dataclass(frozen=True)
class Trajectory:
    """What was drawn of some trials.

    Attributes:
        latents: float [steps, trials, channels, height, width], after each step, or after the last one only.
        pictures: a PNG each; none of a forced run.
        problems: of each picture None, or why it is no picture of anything.
        calls: of the first batch.
    """

    latents: Tensor
    pictures: tuple[bytes, ...] = ()
    problems: tuple[str | None, ...] = ()
    calls: tuple[Call, ...] = ()


def pictures_of(drawings: Sequence[Trajectory]) -> list[bytes]:
    """The PNGs of all, in order."""
    return [png for own in drawings for png in own.pictures]


def check_shapes(drawings: Sequence[Trajectory], reference: Sequence[Trajectory]) -> None:
    """Raise ValueError if a model took another number of steps than the reference, or draws other latents."""
    for own, other in zip(drawings, reference, strict=True):
        if own.latents.shape != other.latents.shape:
            raise ValueError(
                f"its latents are {list(own.latents.shape)} where the reference's are {list(other.latents.shape)}: "
                "steps, prompts, channels, height, width"
            )


def distinct_pictures(drawings: Sequence[Trajectory]) -> int:
    """How many different pictures there are; the same pixels give the same PNG."""
    return len(set(pictures_of(drawings)))


def initial_latents(settings: Settings, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal float32 [trials, channels, height, width], each from its generator, as diffusers draws them."""
    return torch.cat([torch.randn((1, *settings.latents), generator=generator) for generator in generators])


@torch.inference_mode()
def run(
    pipeline: Any,
    trials: Sequence[Trial],
    settings: Settings,
    *,
    forced: Tensor | None = None,
    every_step: bool = True,
    capture: bool = False,
    progress: Callable[[float], object] | None = None,
) -> Trajectory:
    """Draw `trials`, as `bakeout generate` draws them: noise from `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        pipeline: with diffusers' interface.
        trials: one or more.
        settings: how.
        forced: latents of another model's trajectory: after every step they take the place of the model's own, so that
            the next step begins where the other one's did. No pictures are drawn.
        every_step: keep the latents after every step, not only after the last.
        capture: keep what the networks were called with; for eager pipelines.
        progress: called after every step with the number of pictures, in parts of one, that it was worth.
    """
    parts = []
    for first in range(0, len(trials), settings.batch):
        batch = slice(first, first + settings.batch)
        beside = None if forced is None else forced[:, batch]
        parts.append(_run_batch(pipeline, trials[batch], settings, beside, capture and first == 0, progress))
    latents = torch.cat([part.latents if every_step else part.latents[-1:] for part in parts], dim=1)
    return Trajectory(
        latents,
        tuple(picture for part in parts for picture in part.pictures),
        tuple(problem for part in parts for problem in part.problems),
        parts[0].calls,
    )


def _run_batch(
    pipeline: Any,
    trials: Sequence[Trial],
    settings: Settings,
    forced: Tensor | None,
    capture: bool,
    progress: Callable[[float], object] | None,
) -> Trajectory:
    count = len(trials)
    trials = [*trials, *[trials[-1]] * (settings.least - count)]
    generators = [torch.Generator("cpu").manual_seed(trial.seed) for trial in trials]
    seen: list[Tensor] = []

    def step_done(running: Any, step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        seen.append(latents[:count].float().cpu())
        if progress is not None:
            progress(count / running.num_timesteps)
        if forced is None:
            return tensors
        own = forced[step].to(latents)
        return {"latents": torch.cat([own, own[-1:].expand(len(latents) - count, -1, -1, -1)])}

    recorder = _Recorder()
    with recorder.watching(pipeline) if capture else nullcontext():
        drawn = pipeline(
            prompt=[trial.prompt for trial in trials],
            latents=initial_latents(settings, generators).to(pipeline.device),
            generator=generators,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.size[0],
            height=settings.size[1],
            output_type="np" if forced is None else "latent",
            callback_on_step_end=step_done,
        ).images[:count]
    latents = torch.stack(seen)
    if forced is not None:
        return Trajectory(latents)
    if capture:
        sample = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
        recorder.calls.append(Call("vae_encoder", "the drawn pictures", {"sample": sample.contiguous()}))
    return Trajectory(
        latents,
        tuple(png_from_floats(pixels) for pixels in drawn),
        tuple(_problem(pixels) for pixels in drawn),
        tuple(recorder.calls),
    )


def _problem(pixels: NDArray[np.float32]) -> str | None:
    # Nobody here can draw in another dtype, which `problem_of_picture` then recommends.
    return problem_of_picture(pixels) if np.isfinite(pixels).all() else "not all of its values are finite numbers"


def png_from_floats(pixels: NDArray[np.float32]) -> bytes:
    """The PNG of a picture [height, width, 3] in 0 … 1, rounded as `bakeout generate` rounds it."""
    rounded = (np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(rounded).save(stream, format="PNG")
    return stream.getvalue()


def pixels_from_png(png: bytes) -> Pixels:
    """uint8 [height, width, 3]."""
    with Image.open(BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


class _Recorder:
    """Notes what the networks of an eager pipeline are called with."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._unet_calls = 0

    @contextmanager
    def watching(self, pipeline: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for name in ("text_encoder", "text_encoder_2"):
                if (encoder := getattr(pipeline, name, None)) is not None:
                    hook = partial(self._text, name)
                    stack.callback(encoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hook = partial(self._unet, pipeline.scheduler)
            stack.callback(pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
            # The pipelines call the method, and PyTorch has hooks for forward() only.
            decode = pipeline.vae.decode
            pipeline.vae.decode = partial(self._decode, decode)
            stack.callback(delattr, pipeline.vae, "decode")
            yield

    def _text(self, name: str, _encoder: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        # With guidance, diffusers encodes the prompts first and then what guidance leads away from.
        again = any(call.network == name for call in self.calls)
        self._note(name, "negative prompts" if again else "prompts", {"input_ids": ids})

    def _unet(self, scheduler: Any, _unet: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        steps = len(scheduler.timesteps)
        self._unet_calls += 1
        if self._unet_calls - 1 not in np.linspace(0, steps - 1, KEPT_STEPS).round().astype(int):
            return
        given = {
            "sample": args[0],
            "timestep": torch.as_tensor(args[1], dtype=torch.float32),
            "encoder_hidden_states": kwargs["encoder_hidden_states"],
            **(kwargs["added_cond_kwargs"] or {}),
        }
        self._note("unet", f"step {self._unet_calls} of {steps}", given)

    def _decode(self, decode: Callable[..., Any], latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._note("vae_decoder", "the last latents", {"latent_sample": latents})
        return decode(latents, *args, **kwargs)

    def _note(self, network: str, when: str, inputs: Mapping[str, Tensor]) -> None:
        self.calls.append(Call(network, when, {name: value.cpu() for name, value in inputs.items()}))
