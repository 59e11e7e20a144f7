"""What benchmarks/gpu.py runs: models of full size with random weights, edits of each method, and their artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from full_size import write_full_size
from random_patches import patches

from bakeout.editor.edit import Edit, PatchWeightInput, SteerLatents
from bakeout.editor.model import Model, open_model
from bakeout.export.artifact import Artifact, making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import base_of

# What a rehearsal has in place of the real sizes.
_UNET: Mapping[str, Any] = {"norm_num_groups": 4, "sample_size": 8}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "projection_dim": 32,
}  # fmt: skip
_VAE: Mapping[str, Any] = {
    "block_out_channels": [8, 8, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip
SMALL: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {
        "unet": {
            **_UNET, "block_out_channels": [16, 16, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 32,
            "layers_per_block": 1,
        },
        "vae": _VAE,
        "text_encoder": _TEXT,
    },
    "sdxl": {
        "unet": {
            **_UNET, "block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4], "cross_attention_dim": 80,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 88,
            "transformer_layers_per_block": [1, 2, 3],
        },
        "vae": _VAE,
        "text_encoder": _TEXT,
        "text_encoder_2": {**_TEXT, "hidden_size": 48, "projection_dim": 40},
    },
}  # fmt: skip
MODELS: Mapping[str, str] = {"sd15": "SD 1.5", "sdxl": "SDXL"}
PRUNED, PATCHED = 0.02, 0.01


@dataclass(frozen=True)
class Variant:
    """A model as one method leaves it.

    Attributes:
        what: in words.
        edit: of a model, with random masks as dense as the method's.
        goal: the most that a UNet's call and a picture are to take, over those of the unedited model; None is none.
        folds: whether a diffusers folder holds it.
        patched: whether operators of ours are left to the GEGLU of FFNs.
    """

    what: str
    edit: Callable[[Model], Edit]
    goal: float | None
    folds: bool = True
    patched: bool = False


def pruned(model: Model) -> Edit:
    """ConceptPrune's form: single weights of every FFN-2."""
    generator = torch.Generator().manual_seed(0)
    return Edit(tuple(
        PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < PRUNED)
        for site in model.sites_of("ffn2")
    ))  # fmt: skip


def patched_tokens(model: Model) -> Edit:
    """ActErase's form that is for one size of pictures: pairs of token and feature of every FFN-2's input."""
    return patches(model, PATCHED, model.components["unet"].config["sample_size"])


def steered(model: Model) -> Edit:
    """SNCE's form: neurons of an autoencoder with m = 4d latents, of which K = 32 are active, at its layer."""
    generator = torch.Generator().manual_seed(0)
    operations = []
    for component in (name for name in model.components if name.startswith("text_encoder")):
        layers = [site for site in model.sites_of("text_layer") if site.component == component]
        site = layers[round(len(layers) * 10 / 12) - 1]
        width = site.d_out
        directions = torch.randn(width, 4 * width, generator=generator)
        directions /= directions.norm(dim=0)
        # Many and strong, so that a runtime which loses the edit gives something else.
        neurons = torch.arange(0, 4 * width, 16)
        operations.append(
            SteerLatents(
                site.name, directions.T.contiguous(), torch.zeros(4 * width), torch.zeros(width), min(32, width // 4),
                neurons, directions[:, neurons].contiguous(), torch.full((len(neurons),), 4.0), "prompted",
            )
        )  # fmt: skip
    return Edit(tuple(operations))


PLAIN = "unedited"
VARIANTS: Mapping[str, Variant] = {
    PLAIN: Variant("nothing", lambda _: Edit(()), None),
    "conceptprune": Variant(f"ConceptPrune: {PRUNED:.0%} of the weights of every FFN-2, folded", pruned, 1.0),
    "acterase": Variant(
        f"ActErase, portable: {PATCHED:.0%} of the features of every FFN-2, folded",
        lambda model: patches(model, PATCHED),
        1.0,
    ),
    "acterase-tokens": Variant(
        f"ActErase, token by token: {PATCHED:.0%} of the pairs of every FFN-2, patched",
        patched_tokens,
        1.01,
        folds=False,
        patched=True,
    ),
    "snce": Variant("SNCE: neurons of an autoencoder, in the graph of each text encoder", steered, 1.01, folds=False),
}


@dataclass(frozen=True)
class Runtime:
    """What runs an artifact.

    Attributes:
        what: in words.
        name: of `bakeout.export.artifact.RUNTIMES`.
        target: what it runs besides a diffusers folder or the base.
        settings: of `Artifact.load`.
    """

    what: str
    name: str
    target: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


RUNTIMES: Mapping[str, Runtime] = {
    "eager": Runtime("PyTorch, eager", "torch"),
    "compile": Runtime("PyTorch, torch.compile", "torch", settings={"compile": True}),
    "onnxruntime-cuda": Runtime("ONNX Runtime, CUDA", "onnxruntime-cuda", "onnx"),
    "tensorrt": Runtime("TensorRT", "tensorrt", "tensorrt"),
}
ON_CPU: Mapping[str, Runtime] = {"onnxruntime": Runtime("ONNX Runtime, CPU", "onnxruntime", "onnx"), **RUNTIMES}


@dataclass(frozen=True)
class Home:
    """The folder of one model and its artifacts.

    Attributes:
        folder: where it lies.
        model: a key of `MODELS`.
        small: whether it is one for a rehearsal.
    """

    folder: Path
    model: str
    small: bool

    def base(self) -> Model:
        """The model, written the first time."""
        folder = self.folder / self.model / "base"
        if not folder.exists():
            # A folder that is there is whole.
            aside = folder.with_name("base.part")
            shutil.rmtree(aside, ignore_errors=True)
            write_full_size(self.model, aside, smaller=SMALL[self.model] if self.small else {})
            aside.rename(folder)
        return open_model(folder)

    def artifact(self, variant: str, target: str | None = None, precision: str = "fp32") -> Artifact:
        """The artifact of a variant, baked the first time, and with a target, if any, in a precision."""
        folder, kind = self.folder / self.model / variant, VARIANTS[variant]
        base = self.base()
        if folder.exists():
            made = Artifact.open(folder)
        else:
            edit, plan = kind.edit(base), plan_diffusers(base)
            targets = ("diffusers",) if kind.folds else ("onnx",)
            with making(folder, plan, targets=targets, force=False) as place:
                facts: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}
                identity = base_of(base, str(base.path))
                made = write_artifact(place, plan, identity, edit, lower_onto(edit, base), facts, targets)
        there = {"onnx": made.manifest.onnx, "tensorrt": made.manifest.tensorrt}
        if target is not None and getattr(there[target], "precision", None) != precision:
            made = made.export(target, base=None if kind.folds else base, precision=precision, force=True)
        return made

    def pipeline(self, variant: str, runtime: Runtime, device: str, precision: str) -> Any:
        """A variant's pipeline in a runtime. Raises InputError where the runtime is not here."""
        made = self.artifact(variant, runtime.target, precision)
        settings = dict(runtime.settings)
        if runtime.name == "torch":
            settings["dtype"] = {"fp16": torch.float16, "fp32": torch.float32}[precision]
            settings["base"] = None if VARIANTS[variant].folds else self.base()
            # The others know theirs: the CPU, or the first GPU.
            settings["device"] = device
        pipeline = made.load(runtime.name, **settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def reference(self, variant: str, device: str) -> Any:
        """A variant's pipeline in eager PyTorch in fp32, without kernels of ours."""
        settings = {"kernels": "reference"} if VARIANTS[variant].patched else {}
        return self.pipeline(variant, replace(RUNTIMES["eager"], settings=settings), device, "fp32")

    def remove(self, variant: str) -> None:
        """Make room."""
        shutil.rmtree(self.folder / self.model / variant, ignore_errors=True)
