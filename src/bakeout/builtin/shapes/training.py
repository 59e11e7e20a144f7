"""How `shapes` is made: a tokenizer, a small CLIP, a VAE, the detector, then the UNet on the frozen text encoder.

Each stage can be interrupted and started again; each depends only on the ones before and on the seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bakeout.builtin.shapes import architecture, routing
from bakeout.builtin.shapes.detector import Detector, load_detector, tensor_from_pictures
from bakeout.builtin.shapes.evaluation import (
    accuracy,
    generate,
    measure,
    uniform_scenes,
    without_ffn2,
    write_accuracy,
)
from bakeout.builtin.shapes.fitting import fit
from bakeout.builtin.shapes.scenes import ATTRIBUTES, Scene, briefly, captions, draw, prompt, sample_scene
from bakeout.builtin.shapes.similarity import load_image_encoder
from bakeout.builtin.shapes.tokenizer import train_tokenizer

TRAINING_SEED = 0


@dataclass(frozen=True)
class Settings:
    """Lengths of the stages in steps, and the sizes of their batches."""

    drawings: int = 40_000
    captions_each: int = 3
    clip_steps: int = 1_500
    clip_batch: int = 256
    vae_steps: int = 9_000
    vae_batch: int = 8
    detector_steps: int = 800
    detector_batch: int = 128
    unet_steps: int = 6_000
    unet_batch: int = 64
    deafness: float = 3.0
    routed_share: float = 0.7
    spill: float = 0.25
    ablation: float = 3.0


class Workshop:
    """The drawings, and the networks as far as they are trained; everything lives in the folder `run`."""

    def __init__(self, run: Path, settings: Settings) -> None:
        self.run, self.settings = run, settings
        run.mkdir(parents=True, exist_ok=True)

    @cached_property
    def scenes(self) -> list[Scene]:
        """What the drawings show."""
        rng = np.random.default_rng([TRAINING_SEED, 0])
        return [sample_scene(rng) for _ in range(self.settings.drawings)]

    @cached_property
    def pictures(self) -> NDArray[np.uint8]:
        """Uint8 [drawings, 64, 64, 3]."""
        return np.stack([draw(scene) for scene in self.scenes])

    @cached_property
    def captions(self) -> list[list[str]]:
        """`captions_each` texts a drawing."""
        rng = np.random.default_rng([TRAINING_SEED, 1])
        return [captions(scene, rng, self.settings.captions_each) for scene in self.scenes]

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """Attribute -> int64 [drawings]."""
        return {
            name: torch.tensor([values.index(getattr(scene, name)) for scene in self.scenes])
            for name, values in ATTRIBUTES.items()
        }

    @cached_property
    def tokenizer(self) -> Any:
        """Trained on the distinct captions."""
        every = sorted({caption for told in self.captions for caption in told})
        return train_tokenizer(every, self.run / "tokenizer")

    def tokens(self, texts: list[str], length: int = 77) -> Tensor:
        """Token ids, int64 [n, length]."""
        encoded = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return torch.as_tensor(encoded.input_ids)

    def batch_of_pictures(self, indices: Tensor) -> Tensor:
        """Float [n, 3, 64, 64] in -1 .. 1."""
        return tensor_from_pictures(self.pictures[indices.numpy()])

    def any_drawings(self, count: int, generator: torch.Generator) -> Tensor:
        """Drawings at random, int64 [count]."""
        return torch.randint(self.settings.drawings, (count,), generator=generator)

    def alike(self, groups: int, generator: torch.Generator) -> Tensor:
        """As many drawings as CLIP's batch, of a few groups that differ in the object alone; int64 [clip_batch].

        Most pairs at random differ in colour or background already, and CLIP would learn no more than that for long.
        """
        drawings, size = self.any_drawings(groups, generator), self.settings.clip_batch // groups
        members = []
        for drawing in drawings.tolist():
            same = self.but_object == self.but_object[drawing]
            candidates = same.nonzero().flatten()
            members.append(candidates[torch.randint(len(candidates), (size,), generator=generator)])
        return torch.cat(members)

    def reading(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Cross-entropy, summed over the attributes, of the labels of drawings [n] and logits [n, number of values]."""
        parts = torch.split(logits, [len(values) for values in ATTRIBUTES.values()], dim=1)
        losses = [
            functional.cross_entropy(part, self.labels[name][indices])
            for name, part in zip(ATTRIBUTES, parts, strict=True)
        ]
        return torch.stack(losses).sum()

    @cached_property
    def but_object(self) -> Tensor:
        """A number for each combination of colour, style and background, int64 [drawings]."""
        code = torch.zeros(self.settings.drawings, dtype=torch.int64)
        for name in ("colour", "style", "background"):
            code = code * len(ATTRIBUTES[name]) + self.labels[name]
        return code

    @cached_property
    def clip(self) -> nn.ModuleDict:
        """CLIP's symmetric contrastive loss (Radford et al., 2021) of the pooled text and the projected picture.

        A linear reader of the labels on the picture's embedding is trained along and thrown away: it shows the image
        tower what objects are, which the contrast alone takes long to find.
        """
        torch.manual_seed(0)
        settings = self.settings
        text, image = architecture.text_encoder(self.tokenizer), architecture.image_encoder()
        scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(scale.weight, float(np.log(1 / 0.07)))
        reader = nn.Linear(architecture.TEXT_WIDTH, sum(map(len, ATTRIBUTES.values())))
        networks = nn.ModuleDict({"text": text, "image": image, "scale": scale, "reader": reader})
        texts = self.captions
        short = 32

        def loss_step(step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
            indices = self.alike(8, generator) if step % 4 else self.any_drawings(settings.clip_batch, generator)
            which = torch.randint(settings.captions_each, (settings.clip_batch,), generator=generator)
            told = [texts[i][j] for i, j in zip(indices.tolist(), which.tolist(), strict=True)]
            length = short
            if step % 10 == 0:
                told = [", ".join(texts[i]) for i in indices.tolist()]
                length = 77
            words = functional.normalize(text(input_ids=self.tokens(told, length)).pooler_output, dim=-1)
            embeds = image(pixel_values=self.batch_of_pictures(indices)).image_embeds
            seen = functional.normalize(embeds, dim=-1)
            logits = scale.weight.clamp(max=4.6).exp() * words @ seen.T
            target = torch.arange(len(told))
            loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
            loss = loss + 0.5 * self.reading(reader(embeds), indices)
            return loss, {"found": (logits.argmax(1) == target).float().mean().item()}

        return fit("clip", self.run, networks, loss_step, steps=settings.clip_steps, rate=1e-3, weight_decay=0.05)

    @cached_property
    def vae(self) -> Any:
        """Reconstruction of pictures and of their edges, a light pull of the posterior towards a standard normal.

        A small classifier on the latents is trained along and thrown away: it makes the few channels hold colour and
        surface early, which the error in pixels alone asks for weakly.
        """
        torch.manual_seed(1)
        vae: Any = architecture.autoencoder().to(memory_format=torch.channels_last)
        reader = architecture.latent_classifier()
        settings = self.settings

        def loss_step(_: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
            indices = self.any_drawings(settings.vae_batch, generator)
            pictures = self.batch_of_pictures(indices)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pictures).latent_dist
                latents = posterior.sample(generator=generator)
                again = vae.decode(latents).sample
            error = again.float() - pictures
            edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
            reading = self.reading(reader(latents.float()), indices)
            divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
            loss = error.abs().mean() + error.square().mean() + edges + 0.05 * reading + 1e-5 * divergence
            psnr = 10 * torch.log10(4 / error.detach().square().mean())
            return loss, {
                "psnr": psnr.item(),
                "divergence": divergence.item(),
                "reading": torch.as_tensor(reading).item(),
            }

        networks = nn.ModuleDict({"vae": vae, "reader": reader})
        fit("vae", self.run, networks, loss_step, steps=settings.vae_steps, rate=2e-3, average=0.995)
        with torch.inference_mode():
            latents = vae.encode(self.batch_of_pictures(torch.arange(min(2000, settings.drawings)))).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        return vae.requires_grad_(False)

    @cached_property
    def detector(self) -> Detector:
        """Trained on drawings, an eighth of them gone through the VAE, with noise and shifts of colour."""
        torch.manual_seed(2)
        settings = self.settings
        detector, vae = Detector(), self.vae

        def loss_step(_: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
            indices = self.any_drawings(settings.detector_batch, generator)
            pictures = self.batch_of_pictures(indices)
            part = len(pictures) // 8
            with torch.no_grad():
                latents = vae.encode(pictures[:part]).latent_dist.mean
                noise = torch.randn(latents.shape, generator=generator) * 0.15 / vae.config.scaling_factor
                pictures[:part] = vae.decode(latents + noise).sample
            shift = 0.06 * torch.randn(len(pictures), 3, 1, 1, generator=generator)
            grain = 0.15 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
            pictures = pictures + shift + grain * torch.randn(pictures.shape, generator=generator)
            logits = detector(pictures)
            target = {name: labels[indices] for name, labels in self.labels.items()}
            loss = torch.stack([functional.cross_entropy(logits[name], target[name]) for name in logits]).sum()
            right = {name: (logits[name].argmax(1) == target[name]).float().mean().item() for name in logits}
            return loss, right

        fit("detector", self.run, nn.ModuleDict({"detector": detector}), loss_step, steps=settings.detector_steps,
            rate=3e-3, average=0.99)  # fmt: skip
        return detector

    @cached_property
    def latents(self) -> Tensor:
        """Scaled latents of every drawing, float [drawings, 4, 8, 8]."""
        vae, indices = self.vae, torch.arange(self.settings.drawings)
        with torch.inference_mode():
            batches = [vae.encode(self.batch_of_pictures(part)).latent_dist.mean for part in torch.split(indices, 250)]
        return torch.cat(batches).clone() * float(vae.config.scaling_factor)

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """The text encodings, and which of them describe each drawing.

        Float16 [captions + 1, 77, 96], those of every distinct caption and, last, of the empty one; int64 [drawings,
        captions_each].
        """
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(c for told in self.captions for c in told))}
        which = torch.tensor([[distinct[caption] for caption in told] for told in self.captions])
        texts = [*distinct, ""]
        encoded = [self.encode(texts[i : i + 256]).half() for i in range(0, len(texts), 256)]
        return torch.cat(encoded), which

    def encode(self, texts: list[str]) -> Tensor:
        """What the frozen text encoder makes of texts, float [n, 77, 96]."""
        encoder = self.clip["text"]
        with torch.no_grad():
            return torch.as_tensor(encoder(input_ids=self.tokens(texts)).last_hidden_state)

    @cached_property
    def groups(self) -> Tensor:
        """Which groups of units each encoding of `embeddings` speaks to, bool [captions + 1, groups]."""
        return routing.open_groups([*dict.fromkeys(c for told in self.captions for c in told), ""])

    def with_and_without(self, drawings: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each drawing a prompt, the same prompt without one of the values that it names, and that value's group.

        The prompts encoded, float [n, 77, 96] each; int64 [n]. Every prompt names the object and, in seven of
        ten, each other attribute.
        """
        likely = torch.tensor([1.0 if name == "object" else 0.7 for name in ATTRIBUTES])
        named, unnamed, groups = [], [], []
        for scene in (self.scenes[drawing] for drawing in drawings.tolist()):
            keep = (torch.rand(len(ATTRIBUTES), generator=generator) < likely).tolist()
            names = [name for name, kept in zip(ATTRIBUTES, keep, strict=True) if kept]
            left_out = names[int(torch.randint(len(names), (1,), generator=generator))]
            named.append(briefly(scene, names))
            unnamed.append(briefly(scene, [name for name in names if name != left_out]))
            groups.append(routing.GROUPS.index(scene.labels[left_out]))
        both = self.encode(named + unnamed)
        return both[: len(named)], both[len(named) :], torch.tensor(groups)

    @cached_property
    def unet(self) -> Any:
        """Noise prediction on the frozen text encoder, a tenth of the captions dropped (for guidance).

        In so small a network the residual blocks and cross-attention would draw alone what they can, and every concept
        would be spread over all units. Three terms make what the prompt says go through the FFNs, where the erasure
        methods act, each value of each attribute through units of its own (`routing`):

        - `deafness`: without its FFNs the network predicts the same with and without the prompt;
        - `spill`: units are quiet for captions that do not mention their value, and in some rows, of the share
          `routed_share`, all but the units of the caption's values are cut off;
        - `ablation`: without the units of a value it predicts what it predicts when the prompt does not name the value.
        """
        torch.manual_seed(3)
        settings = self.settings
        unet = architecture.unet()
        scheduler = architecture.scheduler()
        signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        ratio = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        weight_of: Tensor = ratio.clamp(max=5) / ratio

        def weighted(error: Tensor, times: Tensor) -> Tensor:
            return (error.square().mean((1, 2, 3)) * weight_of[times]).mean()

        def loss_step(step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
            size = settings.unet_batch
            part = size // 4
            encodings, which = self.embeddings
            empty = len(encodings) - 1
            indices = self.any_drawings(size, generator)
            told = which[indices, torch.randint(settings.captions_each, (size,), generator=generator)]
            told[torch.rand(size, generator=generator) < 0.1] = empty
            times = torch.randint(1000, (size,), generator=generator)
            clean = self.latents[indices]
            noise = torch.randn(clean.shape, generator=generator)
            noisy = signal[times].view(-1, 1, 1, 1) * clean + noise_level[times].view(-1, 1, 1, 1) * noise
            enforced = torch.rand(size, generator=generator) < settings.routed_share
            with routing.routed(unet, self.groups[told], enforced) as spilled:
                error = unet(noisy, times, encodings[told].float()).sample - noise
            spill = torch.stack(spilled).mean()
            loss = weighted(error, times) + settings.spill * spill
            numbers = {"error": error.detach().square().mean().item(), "spill": spill.item()}
            if step % 4 == 3:
                with without_ffn2(unet):
                    prompts = torch.cat([encodings[told[:part]], encodings[empty].expand(part, -1, -1)]).float()
                    twice = unet(noisy[:part].repeat(2, 1, 1, 1), times[:part].repeat(2), prompts).sample
                hearing = weighted(twice[:part] - twice[part:], times[:part])
                loss = loss + settings.deafness * hearing
                numbers["hearing"] = hearing.item()
            if step % 2 == 0:
                named, unnamed, silent = self.with_and_without(indices[-part:], generator)
                with torch.no_grad():
                    wanted = unet(noisy[-part:], times[-part:], unnamed).sample
                with routing.silenced(unet, silent):
                    left = unet(noisy[-part:], times[-part:], named).sample
                ablation = weighted(left - wanted, times[-part:])
                loss = loss + settings.ablation * ablation
                numbers["ablation"] = ablation.item()
            return loss, numbers

        def judge(networks: nn.ModuleDict) -> Mapping[str, float]:
            pipeline = self.pipeline(networks["unet"])
            scenes = uniform_scenes(100)
            prompts = [prompt(scene) for scene in scenes]
            drawn = {"drawn": generate(pipeline, prompts)}
            with without_ffn2(networks["unet"]):
                drawn["without_ffn2"] = generate(pipeline, prompts)
            return {
                f"{how}_{name}": found["share"]
                for how, pictures in drawn.items()
                for name, found in accuracy(self.detector, pictures, scenes).items()
            }

        fit("unet", self.run, nn.ModuleDict({"unet": unet}), loss_step, steps=settings.unet_steps, rate=1.2e-3,
            average=0.999, judge=judge)  # fmt: skip
        return unet

    def ship(self, package: Path, prompts: int = 300) -> None:
        """Write what the package ships, in float16: `model/` (a diffusers folder), `image_encoder/`, the detector.

        Then measures the shipped files, not the networks in memory, on that many `prompts`: `model/accuracy.json`.
        """
        from diffusers import StableDiffusionPipeline
        from safetensors.torch import save_file

        pipeline = self.pipeline(self.unet)
        for network in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            network.half()
        pipeline.save_pretrained(package / "model")
        # transformers 5 writes neither, and older versions read nothing else.
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(self.run / "tokenizer" / name, package / "model" / "tokenizer" / name)
        image: Any = self.clip["image"]
        image.half().save_pretrained(package / "image_encoder")
        halves = {name: tensor.half().contiguous() for name, tensor in self.detector.state_dict().items()}
        save_file(halves, package / "detector.safetensors")
        shipped = StableDiffusionPipeline.from_pretrained(package / "model", dtype=torch.float32, local_files_only=True)
        detector = load_detector(package / "detector.safetensors")
        image_encoder = load_image_encoder(package / "image_encoder")
        write_accuracy(measure(shipped, detector, image_encoder, prompts), package / "model")

    def pipeline(self, unet: Any) -> Any:
        """The StableDiffusionPipeline around a UNet."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.clip["text"],
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=architecture.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
