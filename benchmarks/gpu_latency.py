"""How long networks and pictures of an edited pipeline take beside those of the unedited one, and whether it is right.

Both are called in turn, and which is first alternates. What is timed is what a caller waits for, to the end of the
GPU's work. A network's answers are compared with those of eager PyTorch in fp32 first, and one that is wrong, or lost
its edit, is not timed.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import MODELS, PLAIN, Home, Runtime
from ratios import Numbers, interval
from safetensors.torch import load_file, save_file
from torch import Tensor

from bakeout.validate.metrics import relative_rms

PROMPT = "a photo of a cat on a red chair"
# Guidance has the UNet see a picture twice.
BATCH = 2
# Relative RMS from fp32. The networks in fp16 are about a hundredth away, see `bakeout.export.precision`.
BOUND = 0.05
# How far an edit takes a network's answer from the unedited one's where it is seen whether a runtime lost it.
SEEN = 0.01
PICTURE = "picture"
Answers = dict[str, Tensor]
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Attributes:
        device: of torch.
        precision: of the networks.
        steps: of a picture.
        seconds: that each network's calls, or pictures, are repeated, about.
        rounds: how many times at least, and at most.
        small: whether models are those of a rehearsal.
    """

    device: str
    precision: str
    steps: int
    seconds: float
    rounds: tuple[int, int]
    small: bool


@torch.inference_mode()
def measure(home: Home, variant: str, runtime: Runtime, bench: Bench) -> dict[str, Any]:
    """What there is to know of a variant in a runtime.

    Returns:
        `memory_gb`, the most that the pipeline took on its device while it drew; and `networks`, by name, with
        `picture` among them: `ms` and `plain_ms`, medians; `ratio`, `low` and `high` of both, see `interval`; `rounds`;
        `error` and `effect`, relative RMS from fp32, and from the unedited model in fp32; or `why` it was not timed.

    Raises:
        InputError: the runtime is not here, or does not take the model.
    """
    home.artifact(variant, runtime.target, bench.precision)
    home.artifact(PLAIN, runtime.target, bench.precision)
    expected = reference_answers(home, variant, bench)
    unedited = reference_answers(home, PLAIN, bench)
    with most_memory(bench.device) as taken:
        edited = home.pipeline(variant, runtime, bench.device, bench.precision)
        draw(edited, bench)
    plain = home.pipeline(PLAIN, runtime, bench.device, bench.precision)
    given = inputs(edited, home.model)
    of_plain = networks(plain, given)
    found: dict[str, dict[str, Any]] = {}
    for name, call in networks(edited, given).items():
        # A captured graph runs from the second call on.
        *_, last = (call() for _ in range(3))
        found[name] = judged(_answer(last), expected[name], unedited[name])
        if "why" not in found[name]:
            found[name] |= timed((call, of_plain[name]), bench)
    if any("why" in it for it in found.values()):
        found[PICTURE] = {"why": "a network is wrong"}
    else:
        found[PICTURE] = timed((lambda: draw(edited, bench), lambda: draw(plain, bench)), bench)
    return {"memory_gb": taken() / 1e9, "networks": found}


def judged(answer: Tensor, expected: Tensor, unedited: Tensor) -> dict[str, Any]:
    """How far a network's answer is from the reference's, and `why` that is too far."""
    error, effect = relative_rms(answer, expected), relative_rms(expected, unedited)
    said: dict[str, Any] = {"error": error, "effect": effect} if math.isfinite(error) else {"effect": effect}
    if not error <= BOUND:
        said["why"] = f"it is wrong, {error:.1e} from fp32"
    elif effect > SEEN and not error < effect / 2:
        said["why"] = f"its edit is lost, or cannot be told: {error:.1e} from fp32, where the edit makes {effect:.1e}"
    return said


def timed(pair: tuple[Callable[[], object], Callable[[], object]], bench: Bench) -> dict[str, Any]:
    """The edited one's times beside the plain one's."""
    for call in pair:
        # A compiler, a captured graph: what is slow once.
        for _ in range(3):
            call()
    once = sum(_seconds(call, bench.device) for call in pair)
    least, most = bench.rounds
    rounds = min(max(least, round(bench.seconds / once)), most)
    seconds: Numbers = np.empty((rounds, 2))
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            seconds[number, place] = _seconds(pair[place], bench.device)
    edited, plain = 1e3 * np.median(seconds, axis=0)
    ratio = interval(seconds[:, 0] / seconds[:, 1])
    return {"ms": float(edited), "plain_ms": float(plain), "rounds": rounds, **ratio}


def reference_answers(home: Home, variant: str, bench: Bench) -> Answers:
    """What each network of a variant gives in eager PyTorch in fp32, computed the first time."""
    file = home.folder / home.model / f"answers-{variant}.safetensors"
    if not file.exists():
        pipeline = home.reference(variant, bench.device)
        found = {name: _answer(call()) for name, call in networks(pipeline, inputs(pipeline, home.model)).items()}
        aside = file.with_suffix(".part")
        save_file(found, aside)
        aside.rename(file)
        del pipeline
        gc.collect()
        if torch.device(bench.device).type == "cuda":
            torch.cuda.empty_cache()
    return load_file(file)


def inputs(pipeline: Any, model: str) -> dict[str, Any]:
    """Random inputs of every network, the same in every process, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    config = pipeline.unet.config
    side = config["sample_size"]
    given: dict[str, Any] = {
        "sample": torch.randn(BATCH, config["in_channels"], side, side, generator=generator),
        "states": torch.randn(BATCH, 77, config["cross_attention_dim"], generator=generator),
    }
    if MODELS[model] == MODELS["sdxl"]:
        pixels = float(side * pipeline.vae_scale_factor)
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        given["added"] = {
            "text_embeds": torch.randn(BATCH, width, generator=generator),
            "time_ids": torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]] * BATCH),
        }
    return given


def networks(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Call]:
    """A call of each network as the pipeline makes it for a picture: of one prompt, one picture twice, one picture."""
    unet, vae = pipeline.unet, pipeline.vae
    device = unet.device
    encoders = [
        (encoder, tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids.to(device))
        for encoder, tokenizer in (
            (getattr(pipeline, f"text_encoder{number}", None), getattr(pipeline, f"tokenizer{number}", None))
            for number in ("", "_2")
        )
        if encoder is not None and tokenizer is not None
    ]
    added = {name: it.to(device, unet.dtype) for name, it in given.get("added", {}).items()}
    sample, states = (given[name].to(device, unet.dtype) for name in ("sample", "states"))
    timestep = torch.tensor(500.0, device=device)

    def encode() -> Sequence[Tensor]:
        outputs = [encoder(ids, output_hidden_states=bool(added)) for encoder, ids in encoders]
        return [it[name] for it in outputs for name in ("last_hidden_state", "text_embeds") if name in it]

    def denoise() -> Sequence[Tensor]:
        extra = {"added_cond_kwargs": added} if added else {}
        return unet(sample, timestep, encoder_hidden_states=states, return_dict=False, **extra)[:1]  # type: ignore[no-any-return]

    def decode() -> Sequence[Tensor]:
        # As the pipeline of SDXL does, whose VAE fp16 is too narrow for.
        wider = vae.dtype == torch.float16 and vae.config.get("force_upcast", False) and added
        if wider:
            vae.to(dtype=torch.float32)
        picture = vae.decode(sample[:1].to(vae.dtype), return_dict=False)[:1]
        if wider:
            vae.to(dtype=torch.float16)
        return picture  # type: ignore[no-any-return]

    return {"text encoder": encode, "unet": denoise, "vae decoder": decode}


def draw(pipeline: Any, bench: Bench) -> None:
    """A whole picture, guided."""
    generator = torch.Generator().manual_seed(0)
    pipeline(PROMPT, num_inference_steps=bench.steps, generator=generator, output_type="pt")


@contextmanager
def most_memory(device: str) -> Iterator[Callable[[], int]]:
    """Watch how many bytes more of a device are taken than before; what is given tells the most, at the end."""
    kind, taken, done = torch.device(device).type, [0], threading.Event()
    before = _used(kind)

    def watch() -> None:
        while not done.wait(0.01):
            taken.append(_used(kind) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(taken)
        taken.append(_used(kind) - before)
    finally:
        done.set()
        thread.join()


def _used(kind: str) -> int:
    if kind == "cuda":
        # Of all that compute on the GPU, because runtimes have allocators of their own.
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def _seconds(call: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _answer(tensors: Sequence[Tensor]) -> Tensor:
    """All that a network gave, in one."""
    return torch.cat([it.float().flatten().cpu() for it in tensors])
