"""Draw pictures with a diffusers pipeline, whatever runtime is under it, and write them to a folder.

Picture i of a prompt has the seed `seed + i`, and its noise comes from `torch.Generator("cpu").manual_seed(seed + i)`,
as in a call of the pipeline for that picture alone: neither the batch size nor the device changes where it starts.

This module imports torch only when it draws, so that a mistake in a request is answered at once.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bakeout import __version__
from bakeout.editor.errors import InputError
from bakeout.editor.pipeline import image_to_image
from bakeout.picture import fitted_size, read_picture

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from bakeout.editor.model import Model
    from bakeout.export.manifest import Shapes

INDEX = "pictures.json"
# Beside the weights of a built-in model: how well it draws, and with which settings that was measured.
ACCURACY = "accuracy.json"

# Name → class in diffusers, and what it overrides in the configuration of the model's own scheduler.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DTYPES = ("fp32", "fp16", "bf16")
# What torch says where a CPU's memory is short: on Linux, on Windows, and for more bytes than can be counted.
NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class Request:
    """What to draw: `count` pictures of every prompt. What is None is the model's own.

    Attributes:
        prompts: one or more texts.
        negative_prompt: what guidance leads away from, for every prompt.
        seed: of each prompt's first picture; the next ones count up from it.
        count: pictures of each prompt.
        steps: denoising steps, as the scheduler counts them.
        guidance: scale of classifier-free guidance; at 1 and below there is none.
        size: width and height in pixels.
        scheduler: a key of `SCHEDULERS`, or the name of one of its classes.
        batch: pictures that are drawn at a time.
        image: a picture to begin with (image-to-image), for every prompt.
        strength: how far from `image` to begin, from nearly 0 (little is drawn anew) to 1 (all is).
        clip_skip: how many of the text encoder's last layers the prompts do without, as diffusers counts them.

    Raises:
        InputError: a value that no model could take.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None = None
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    batch: int = 4
    image: Path | None = None
    strength: float | None = None
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there is nothing to draw: give at least one prompt")
        whole = {"count": self.count, "steps": self.steps, "batch": self.batch, "clip_skip": self.clip_skip}
        for name, value in whole.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be 1 or more")
        # 2**63 is where torch's generators stop.
        if not 0 <= self.seed <= 2**63 - self.count:
            raise InputError(f"seed is {self.seed}: it must lie between 0 and {2**63 - self.count}")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise InputError(f"guidance is {self.guidance:g}: it must be 0 or more (1 and below switch guidance off)")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"size is {self.size[0]}x{self.size[1]}: both sides must be 1 pixel or more")
        if self.scheduler is not None:
            _scheduler_class(self.scheduler)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength is {self.strength:g}: it must be more than 0 and at most 1")
        if self.strength is not None and self.image is None:
            raise InputError("strength says how far to begin from a picture: give one with --image")

    @property
    def pictures(self) -> list[tuple[int, str, int]]:
        """Number of the prompt (from 1), prompt and seed of every picture, in the order in which they are drawn."""
        return [(n, prompt, self.seed + i) for n, prompt in enumerate(self.prompts, 1) for i in range(self.count)]

    @property
    def files(self) -> list[str]:
        """The file name of every picture, in the order of `pictures`: `<number of the prompt>-<seed>.png`."""
        digits = len(str(len(self.prompts)))
        return [f"{number:0{digits}}-{seed}.png" for number, _, seed in self.pictures]


@dataclass(frozen=True)
class Picture:
    """A picture, and what is wrong with it: `problem` is None, or says why it is no picture of anything."""

    image: Image.Image
    prompt: str
    seed: int
    problem: str | None


def size_from_text(text: str) -> tuple[int, int]:
    """`"512"` → (512, 512) and `"512x768"` → (512, 768), width first.

    Raises:
        InputError: it reads otherwise.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InputError(f"size is '{text}': write one number for a square (512), or width x height (512x768)")
    return int(sides[0]), int(sides[-1])


def device_from_text(text: str) -> str:
    """A device that torch has here; `"auto"` is the GPU where there is one, else the CPU.

    Raises:
        InputError: torch does not know the device, or this machine does not have it.
    """
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"'{text}' is no device: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        raise InputError(
            f"device {text} is not here (there are {torch.cuda.device_count()} CUDA devices{built}): "
            "leave --device out to use what is there"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not here: leave --device out to use what is there")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device '{text}' is not supported: use auto, cpu, cuda, cuda:1 or mps")
    return text


def dtype_from_text(text: str, device: str) -> torch.dtype:
    """One of `DTYPES` as torch's; `"auto"` is fp16 on a GPU and fp32 on the CPU, where fp16 is slow and overflows."""
    import torch

    if text == "auto":
        text = "fp32" if device == "cpu" else "fp16"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[text]


def complete(
    request: Request,
    pipeline: Any,
    recommended: Mapping[str, Any] | None = None,
    only: tuple[int, int] | None = None,
    shapes: Shapes | None = None,
) -> Request:
    """The request with steps, guidance, size and strength filled in: from `recommended`, else the pipeline's defaults.

    The size of an image-to-image request is by default about the model's own, in the shape of its picture. With
    `shapes` the default of every request is the usual one of these, and batches are such as these have.

    Args:
        request: what was asked for.
        pipeline: a text-to-image pipeline with diffusers' interface.
        recommended: `steps` and `guidance` with which the model is meant to be used.
        only: width and height, in pixels, of the only pictures that the model's edit is for; None is any.
        shapes: of the only pictures that the runtime's engines draw; None is any.

    Raises:
        InputError: the model or its engines cannot draw that size, or not so few pictures; it was not trained with that
            many steps, or has none to do at that strength; cannot skip that many layers of its text encoder, or must
            not because its edit would be skipped too; or the picture to begin with cannot be read.
    """
    if request.image is not None:
        pipeline = image_to_image(pipeline)
    defaults = inspect.signature(type(pipeline).__call__).parameters
    usual = {"steps": defaults["num_inference_steps"].default, "guidance": defaults["guidance_scale"].default}
    usual |= {name: value for name, value in (recommended or {}).items() if name in usual}
    steps = usual["steps"] if request.steps is None else request.steps
    if shapes is not None:
        request = _fitted(request, shapes)
    size = _size(request, pipeline) if only is None else _only_size(request, pipeline, only)
    trained = pipeline.scheduler.config.num_train_timesteps
    if steps > trained:
        raise InputError(f"steps is {steps}: this model was trained with {trained}, so use at most as many")
    guidance = usual["guidance"] if request.guidance is None else request.guidance
    strength = request.strength
    if request.image is not None:
        strength = defaults["strength"].default if strength is None else strength
        if int(steps * strength) < 1:
            raise InputError(f"strength {strength:g} leaves none of {steps} steps to do: take more of either")
    if request.clip_skip is not None:
        _check_clip_skip(pipeline, request.clip_skip, 1 if shapes is None else shapes.batch.min)
    return replace(request, steps=steps, guidance=guidance, size=size, strength=strength)


def _size(request: Request, pipeline: Any) -> tuple[int, int]:
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # Each of the UNet's blocks but the last halves the latents.
    unit = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    own = (side, side) if request.image is None else fitted_size(read_picture(request.image).size, side, unit)
    width, height = request.size or own
    if width % unit or height % unit:
        nearest = "x".join(str(max(1, round(side / unit)) * unit) for side in (width, height))
        raise InputError(
            f"size is {width}x{height}: this model draws multiples of {unit} pixels, for example {nearest}"
        )
    return width, height


def _fitted(request: Request, shapes: Shapes) -> Request:
    """The request with a size and a batch that engines of such shapes draw."""
    ranges = shapes.width, shapes.height
    size = request.size or (shapes.width.opt, shapes.height.opt)
    if not all(it.min <= side <= it.max for side, it in zip(size, ranges, strict=True)):
        sizes = dict.fromkeys((f"{ranges[0].min}x{ranges[1].min}", f"{ranges[0].max}x{ranges[1].max}"))
        raise InputError(
            f"size is {size[0]}x{size[1]}: the engines were made for pictures of {' to '.join(sizes)}; leave it out, "
            "or export again with another --size"
        )
    count, least = len(request.pictures), shapes.batch.min
    most = max(least, min(request.batch, shapes.batch.max))
    # What a batch leaves over is the last one.
    fitting = (batch for batch in range(most, least - 1, -1) if (count % batch or batch) >= least)
    if (batch := next(fitting, None)) is None:
        raise InputError(
            f"the engines were made for {least} pictures at a time or more, which does not go into {count}; draw a "
            f"multiple of {least}, or export again with another --batch"
        )
    return replace(request, size=size, batch=batch)


def _only_size(request: Request, pipeline: Any, only: tuple[int, int]) -> tuple[int, int]:
    if request.size not in (None, only):
        asked, made_for = ("x".join(map(str, size)) for size in (request.size, only))
        latents = "x".join(str(side // pipeline.vae_scale_factor) for side in only)
        raise InputError(
            f"size is {asked}: this edit is for pictures of {made_for} only (latents of {latents}), so leave it out"
        )
    return only


def _check_clip_skip(pipeline: Any, clip_skip: int, prompts: int) -> None:
    """Encode so many empty prompts: what can be skipped, and what must not be, is for the text encoders to say."""
    import torch

    from bakeout.export.hidden_states import clip_skips

    settings = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    try:
        with _layers_can_be_skipped(pipeline), torch.inference_mode():
            pipeline.encode_prompt([""] * prompts, **settings, clip_skip=clip_skip)
    except IndexError:
        most = min(clip_skips(pipeline).values())
        raise InputError(
            f"clip_skip is {clip_skip}: this model has {most} layers to skip, so use at most {most}"
        ) from None


@contextmanager
def _layers_can_be_skipped(pipeline: Any) -> Iterator[None]:
    """Put the text encoder's final norm where StableDiffusionPipeline looks for it when it skips layers.

    A CLIPTextModel of transformers 5 has no `text_model`. It gets one for as long as it is needed only, because by it
    diffusers tells what the weights of a LoRA are called.
    """
    encoder = pipeline.text_encoder
    norm = getattr(encoder, "final_layer_norm", None)
    if norm is None or hasattr(encoder, "text_model"):
        yield
        return
    encoder.text_model = SimpleNamespace(final_layer_norm=norm)
    try:
        yield
    finally:
        del encoder.text_model


def recommended_settings(model: Model) -> dict[str, Any]:
    """The steps and the guidance with which a built-in model was measured; empty for any other model."""
    if model.format != "builtin":
        return {}
    return dict(json.loads((model.path / ACCURACY).read_text(encoding="utf-8"))["settings"])


def scheduler_for(pipeline: Any, name: str) -> Any:
    """A scheduler by its name or class, with the configuration of the pipeline's own.

    Raises:
        InputError: `SCHEDULERS` has neither such a name nor such a class.
    """
    import diffusers

    class_name, overrides = _scheduler_class(name)
    return getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **overrides)


def draw(pipeline: Any, request: Request, progress: Callable[[float], object] | None = None) -> Iterator[Picture]:
    """Draw the pictures of a completed request, in the order of `request.pictures`.

    Args:
        pipeline: a text-to-image pipeline with diffusers' interface, also for image-to-image. It has its own scheduler
            again when all is drawn.
        request: as `complete` returns it.
        progress: called after every step with the number of pictures, in parts of one, that the step was worth.

    Raises:
        InputError: the scheduler cannot take that many steps, the pictures do not fit into memory, or the one to begin
            with cannot be read.
    """
    start = None
    if request.image is not None:
        pipeline, start = image_to_image(pipeline), read_picture(request.image)
        start = start.resize(request.size or start.size)
    own = pipeline.scheduler
    if request.scheduler is not None:
        pipeline.scheduler = scheduler_for(pipeline, request.scheduler)
    try:
        # Some schedulers need a few steps to start with, and say so by failing somewhere inside numpy.
        pipeline.scheduler.set_timesteps(request.steps)
    except (ValueError, IndexError) as error:
        name = type(pipeline.scheduler).__name__
        pipeline.scheduler = own
        raise InputError(
            f"{name} cannot draw in {request.steps} steps: take more steps or another scheduler"
        ) from error
    try:
        for first in range(0, len(request.pictures), request.batch):
            batch = request.pictures[first : first + request.batch]
            yield from _draw_batch(pipeline, request, batch, start, progress)
    finally:
        pipeline.scheduler = own


def problem_of_picture(pixels: NDArray[np.float32]) -> str | None:
    """Why float pixels [height, width, 3] in 0 … 1 are no picture of anything; None where they may be one."""
    import numpy as np

    if not np.isfinite(pixels).all():
        return "the model overflowed; draw in fp32 with --dtype fp32"
    # What is less than a grey value apart is one colour to whoever looks.
    return "one colour all over" if np.ptp((pixels.clip(0, 1) * 255).round(), axis=(0, 1)).max() == 0 else None


@contextmanager
def reserved(folder: Path, request: Request, *, also: Sequence[str] = (), force: bool = False) -> Iterator[None]:
    """Make the folder and see that the request's files, and those called `also`, can be written there, before any work.

    A folder that was not there and stays empty is gone afterwards.

    Raises:
        InputError: the folder cannot be written, or has such files already and `force` is not given.
    """
    was_there = folder.exists()
    try:
        _reserve(folder, request, also, force)
        yield
    finally:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def _reserve(folder: Path, request: Request, also: Sequence[str], force: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another folder with -o") from error
    if existing := [name for name in [*request.files, *also, INDEX] if (folder / name).exists()]:
        if force:
            return
        raise InputError(
            f"{folder / existing[0]} exists already: choose another folder with -o, or overwrite it with --force"
        )


def draw_to_folder(
    pipeline: Any,
    request: Request,
    folder: Path,
    facts: Mapping[str, str],
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """Draw a completed request; write every picture as soon as it is there, and at the end `pictures.json`.

    Each PNG also carries as text what it was drawn from.

    Args:
        pipeline: as for `draw`.
        request: as `complete` returns it.
        folder: as `reserve` left it.
        facts: what else to record: the model, the device, …
        progress: as for `draw`.

    Returns:
        The index's entries, one a picture: `file`, `prompt`, `seed`, `problem`.

    Raises:
        InputError: what `draw` raises, or a file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    settings = {
        name: value for name, value in asdict(request).items() if name not in ("prompts", "seed", "count", "batch")
    }
    settings["image"] = request.image and request.image.name
    settings["scheduler"] = request.scheduler or type(pipeline.scheduler).__name__
    settings |= {**facts, "bakeout": __version__}
    entries: list[dict[str, Any]] = []
    for name, picture in zip(request.files, draw(pipeline, request, progress), strict=True):
        entry = {"prompt": picture.prompt, "seed": picture.seed, "problem": picture.problem}
        text = PngInfo()
        for key, value in {**entry, **settings}.items():
            if value is not None:
                text.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        write_whole(folder / name, partial(picture.image.save, format="PNG", pnginfo=text))
        entries.append({"file": name, **entry})
    index = json.dumps({**settings, "pictures": entries}, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / INDEX, lambda part: part.write_text(index, encoding="utf-8"))
    return entries


def _scheduler_class(name: str) -> tuple[str, dict[str, Any]]:
    key = name.lower().replace("-", "_")
    if key in SCHEDULERS:
        return SCHEDULERS[key]
    if any(name == class_name for class_name, _ in SCHEDULERS.values()):
        return name, {}
    raise InputError(f"there is no scheduler '{name}': use one of {', '.join(SCHEDULERS)}")


def _draw_batch(
    pipeline: Any,
    request: Request,
    batch: Sequence[tuple[int, str, int]],
    start: Image.Image | None,
    progress: Callable[[float], object] | None,
) -> list[Picture]:
    import torch

    width, height = request.size or (None, None)
    canvas: dict[str, Any] = {"width": width, "height": height}
    if start is not None:
        canvas = {"image": [start] * len(batch), "strength": request.strength}
    prompts = [prompt for _, prompt, _ in batch]
    seeds = [seed for _, _, seed in batch]

    def step_done(running: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(len(batch) / running.num_timesteps)
        return tensors

    try:
        with nullcontext() if request.clip_skip is None else _layers_can_be_skipped(pipeline):
            output = pipeline(
                prompt=prompts,
                negative_prompt=None if request.negative_prompt is None else [request.negative_prompt] * len(batch),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                clip_skip=request.clip_skip,
                **canvas,
                output_type="np",
                callback_on_step_end=step_done,
            )
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory is full: use a smaller --batch or --size, or --device cpu") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise InputError("the pictures do not fit into memory: use a smaller --batch or --size") from error
    blanked = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
    return [_picture(*drawn) for drawn in zip(output.images, prompts, seeds, blanked, strict=True)]


def _picture(pixels: NDArray[np.float32], prompt: str, seed: int, blanked: bool) -> Picture:
    import numpy as np
    from PIL import Image

    rounded = (np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8)
    problem = "the model's safety checker blanked it" if blanked else problem_of_picture(pixels)
    return Picture(Image.fromarray(rounded), prompt, seed, problem)


def reserve_file(path: Path, example: str, kind: str, *, force: bool = False) -> None:
    """Raise InputError unless a file may be written to `path`: it ends as it should, and is not there or is forced.

    Args:
        path: of the file.
        example: a name with the ending that it must have.
        kind: of file, in words: `a PNG`.
        force: overwrite what is there.
    """
    suffix = Path(example).suffix
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it with -o, for example {path / example}")
        if path.suffix.lower() != suffix:
            raise InputError(f"{path} would be {kind} under another name: let it end in {suffix}")
        if path.exists() and not force:
            raise InputError(f"{path} exists already: choose another file with -o, or overwrite it with --force")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another file with -o") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, then rename: an interrupted run leaves no half file under the real one."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): make room, or choose another folder with -o"
        ) from error
    finally:
        part.unlink(missing_ok=True)
