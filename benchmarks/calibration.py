"""ConceptPrune's calibration against the same arithmetic done the released way, side by side.

The released way, written here from its description: one prompt at a time, every call of 50 steps, every activation
copied to the host and held until its picture is decoded, and the scores of a layer sorted whole. Where the description
leaves a doubt, it has the benefit of it: only the calls that the masks need are sorted.

    python benchmarks/calibration.py --model shapes
    python benchmarks/calibration.py --model sd15-width
    python benchmarks/calibration.py --memory

Each variant runs in a process of its own. Time is the processor's, summed over threads, so that other work on the
machine counts as little as can be; with OMP_NUM_THREADS=1 no thread waits for another. Only ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bakeout.editor import calibrate
from bakeout.editor.architecture import build
from bakeout.editor.ldm_names import Location
from bakeout.editor.methods import conceptprune
from bakeout.editor.model import Model, open_model
from bakeout.editor.pipeline import pipeline_classes
from bakeout.editor.prompts import Pair
from bakeout.editor.sites import find_sites

CONFIGS = Path(calibrate.__file__).parent / "configs" / "sd15"
WORDS = ("red circle", "blue square", "green star", "pink ring", "cyan heart", "orange moon", "red cross", "blue star")
FULL_SIDE = 64  # of SD 1.5's latent, for a picture of 512 px


def model_and_pipeline(name: str, side: int) -> tuple[Model, Any]:
    """The model to measure on, in fp32 on the CPU; `sd15-width` has random weights, the same in every process."""
    if name == "shapes":
        model = open_model("shapes")
        return model, model.pipeline("cpu", torch.float32)
    from diffusers import PNDMScheduler
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    config = {
        part: json.loads((CONFIGS / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    }
    config["unet"]["sample_size"] = side
    unet = build("UNet2DConditionModel", config["unet"]).to_empty(device="cpu")
    text_encoder = build("CLIPTextModel", config["text_encoder"]).to_empty(device="cpu")
    vae = build("AutoencoderKL", config["vae"]).to_empty(device="cpu")
    for network in (unet, text_encoder, vae):
        for parameter_name, parameter in network.named_parameters():
            with torch.no_grad():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(float("norm" in parameter_name and parameter_name.endswith("weight")))
        for parameter_name, buffer in network.named_buffers():
            if parameter_name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
    pipeline = pipeline_classes()[0](
        unet=unet.eval(), vae=vae.eval(), text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(str(CONFIGS.parent / "clip_tokenizer")),
        scheduler=PNDMScheduler.from_config(json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text())),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    sites = find_sites("unet", shapes, {key: Location(key) for key in shapes})
    return Model("sd15-width", "folder", "sd1", CONFIGS, {}, {}, {}, sites), pipeline


def ours(model: Model, pipeline: Any, pairs: list[Pair], settings: conceptprune.Settings) -> dict[str, Tensor]:
    """The masks as bakeout finds them."""
    edit = conceptprune.calibrate(model, pipeline, "benchmark", pairs, settings)
    return {operation.site: operation.mask for operation in edit.operations}  # type: ignore[union-attr]


def released(model: Model, pipeline: Any, pairs: list[Pair], settings: conceptprune.Settings) -> dict[str, Tensor]:
    """The same masks the released way: see the module's docstring."""
    sites = model.sites_of(settings.site)
    modules = {site.name: model.module(pipeline, site) for site in sites}
    norms: list[dict[tuple[str, int], Tensor]] = []
    for prompts in zip(*pairs, strict=True):
        of_set: dict[tuple[str, int], Tensor] = {}
        for prompt in prompts:
            held: dict[str, list[Tensor]] = {name: [] for name in modules}

            def hold(name: str, held: dict[str, list[Tensor]] = held) -> Any:
                return lambda _module, inputs: held[name].append(inputs[0].detach().to("cpu", copy=True))

            handles = [module.register_forward_pre_hook(hold(name)) for name, module in modules.items()]
            pipeline(
                prompt, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
                generator=torch.Generator("cpu").manual_seed(settings.seed),
            )  # fmt: skip
            for handle in handles:
                handle.remove()
            for name, calls in held.items():
                for call, activation in enumerate(calls):
                    rows = activation.flatten(0, -2).float()
                    norm = torch.nn.functional.normalize(rows, dim=1).norm(dim=0)
                    before = of_set.get((name, call))
                    of_set[name, call] = norm if before is None else (before.square() + norm.square()).sqrt()
        norms.append(of_set)
    masks = {}
    for name, module in modules.items():
        weight = module.weight.detach().abs().float()
        count = int(settings.sparsity * weight.shape[1])
        skilled = torch.zeros_like(weight, dtype=torch.bool)
        for call in range(settings.first_calls):
            target, reference = (weight * of_set[name, call] for of_set in norms)
            largest = torch.sort(target, dim=1, descending=True, stable=True).indices[:, :count]
            top = torch.zeros_like(skilled).scatter_(1, largest, True)
            skilled |= top & (target > reference)
        masks[name] = skilled
    return masks


def plain(model: Model, pipeline: Any, pairs: list[Pair], settings: conceptprune.Settings) -> dict[str, Tensor]:
    """The network on the shape that ours runs it on, and nothing else: what memory is measured from."""
    prompts = [pair.target for pair in pairs][: calibrate.PROMPTS_PER_RUN]
    sampling = calibrate.Sampling(settings.steps, settings.guidance, settings.seed)
    calibrate.observe(model, pipeline, (), prompts, sampling, lambda *_: None, calls=settings.first_calls)
    return {}


def one_call(model: Model, pipeline: Any, hooked: bool) -> None:
    """One UNet call of `PROMPTS_PER_RUN` guided prompts, with the sums of squares or without."""
    sites = model.sites_of("ffn2") if hooked else ()
    sums: dict[str, Tensor] = {}

    def add(site: Any, call: int, half: str, x: Tensor) -> None:
        key = f"{site.name}/{call}/{half}"
        sums[key] = conceptprune._squared_sums(x, True).sum(0)

    prompts = [f"a {word}" for word in WORDS[: calibrate.PROMPTS_PER_RUN]]
    calibrate.observe(model, pipeline, sites, prompts, calibrate.Sampling(50, 7.5, 0), add, calls=1)


VARIANTS = {"ours": ours, "released": released, "plain": plain}


def measure(variant: str, name: str, side: int, pairs: int, output: Path) -> None:
    """Run one variant in this process and write its masks, processor time and memory."""
    model, pipeline = model_and_pipeline(name, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if variant.startswith("call"):
        one_call(model, pipeline, hooked=variant == "call-hooked")
        masks: dict[str, Tensor] = {}
    else:
        prompts = [Pair(f"a {word} in the style of ink", f"a photo of a {word}") for word in WORDS[:pairs]]
        masks = VARIANTS[variant](model, pipeline, prompts, conceptprune.Settings())
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save({"seconds": seconds, "peak": peak * 1024, "loaded": before * 1024, "masks": masks}, output)


def in_a_process(variant: str, name: str, side: int, pairs: int) -> dict[str, Any]:
    """What `measure` writes, of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured"
        # Fixed, because glibc moves it while a program runs, and with it what stays in the process after a free.
        fixed = {"MALLOC_MMAP_THRESHOLD_": "65536"} if variant.startswith("call") else {}
        command = [sys.executable, __file__, "--variant", variant, "--model", name, "--side", str(side)]
        command += ["--pairs", str(pairs), "--output", str(output)]
        subprocess.run(command, check=True, env={**os.environ, **fixed})  # noqa: S603 - this file
        found: dict[str, Any] = torch.load(output, weights_only=True)
        return found


def agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Intersection over union of two models' masks."""
    both = [(one.get(name, torch.zeros_like(mask)), mask) for name, mask in other.items()]
    return sum(int((a & b).sum()) for a, b in both) / sum(int((a | b).sum()) for a, b in both)


def compare(name: str, side: int, pairs: int) -> None:
    """Print what the two ways take, as a table in Markdown."""
    found = {variant: in_a_process(variant, name, side, pairs) for variant in ("plain", "released", "ours")}
    old, new = found["released"], found["ours"]
    base = found["plain"]["peak"]
    print(f"| {name}, {pairs} pairs | released way | ours | ratio |")
    print("|---|---|---|---|")
    print(
        f"| processor time, s | {old['seconds']:.1f} | {new['seconds']:.1f} | {old['seconds'] / new['seconds']:.1f} |"
    )
    memory = [(it["peak"] - base) / 1e6 for it in (old, new)]
    print(f"| peak memory over the network alone, MB | {memory[0]:.0f} | {memory[1]:.0f} | |")
    print(f"| intersection over union of the masks | | {agreement(new['masks'], old['masks']):.4f} | |")


def compare_memory(side: int) -> None:
    """Print what the hooks add to the memory of one UNet call, and what the released way would hold."""
    without, hooked = (in_a_process(variant, "sd15-width", side, 1) for variant in ("call", "call-hooked"))
    held = sum(tokens * width for tokens, width in full_size_inputs()) * 2 * 4 * 51
    print(f"| SD 1.5 widths, latent {side}x{side}, {calibrate.PROMPTS_PER_RUN} guided prompts, fp32 | MB |")
    print("|---|---|")
    print(f"| one call: peak over the loaded model | {(without['peak'] - without['loaded']) / 1e6:.0f} |")
    print(f"| the same with the hooks: more by | {(hooked['peak'] - without['peak']) / 1e6:.0f} |")
    print(f"| held the released way, one prompt, 51 calls (computed) | {held / 1e6:.0f} |")


def full_size_inputs() -> list[tuple[int, int]]:
    """Tokens and width of the input of each FFN-2 of SD 1.5 at 512 px."""
    levels = [(FULL_SIDE**2, 1280, 5), (FULL_SIDE**2 // 4, 2560, 5), (FULL_SIDE**2 // 16, 5120, 5), (64, 5120, 1)]
    return [(tokens, width) for tokens, width, blocks in levels for _ in range(blocks)]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", "sd15-width"], default="shapes")
    parser.add_argument("--pairs", type=int, default=4, choices=range(1, len(WORDS) + 1), help="prompt pairs")
    parser.add_argument("--side", type=int, help="of the latent of sd15-width; 8, or 64 with --memory")
    parser.add_argument("--memory", action="store_true", help="measure one full-size UNet call with and without hooks")
    parser.add_argument("--variant", choices=[*VARIANTS, "call", "call-hooked"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    side = given.side or (FULL_SIDE if given.memory else 8)
    if given.variant:
        measure(given.variant, given.model, side, given.pairs, given.output)
    elif given.memory:
        compare_memory(side)
    else:
        compare(given.model, side, given.pairs)


if __name__ == "__main__":
    main()
