"""Make the diffusers pipeline of an opened model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError
from bakeout.editor.weights import load_module

if TYPE_CHECKING:
    import torch

    from bakeout.editor.model import Model, Part

# What the pipelines take of their model_index.json besides components.
_SETTINGS = {"sdxl": ("force_zeros_for_empty_prompt",)}


def load_pipeline(model: Model, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    """See `Model.pipeline`."""
    StableDiffusionPipeline, StableDiffusionXLPipeline = pipeline_classes()
    parts: dict[str, Any] = {
        name: load_module(component.class_name, component.config, component.tensors, component.locations, device, dtype)
        for name, component in model.components.items()
    }
    for name, part in model.parts.items():
        parts[name] = _scheduler(part) if name == "scheduler" else _tokenizer(part)
    settings = {key: model.index[key] for key in _SETTINGS.get(model.family, ()) if key in model.index}
    if model.family == "sdxl":
        # Left to itself it marks pictures or not by whether a package is installed.
        pipeline = StableDiffusionXLPipeline(**parts, **settings, add_watermarker=False)
    else:
        _modernise(parts["scheduler"], parts["unet"])
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **off)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_classes() -> tuple[Any, Any]:
    """StableDiffusionPipeline and StableDiffusionXLPipeline.

    They import an image processor, of which transformers tells everyone who has no torchvision; neither is used here.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    finally:
        logging.set_verbosity(level)
    return StableDiffusionPipeline, StableDiffusionXLPipeline


def _scheduler(part: Part) -> Any:
    import diffusers

    try:
        return getattr(diffusers, part.class_name).from_config(dict(part.config))
    except Exception as error:  # noqa: BLE001 - a constructor raises anything on values it was not written for
        raise InputError(
            f"{part.folder}/scheduler_config.json does not describe a working {part.class_name} "
            f"({type(error).__name__}: {_first_line(error)}); take the model's original one"
        ) from None


def _tokenizer(part: Part) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(part.folder), local_files_only=True, **part.config)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception on such files
        raise InputError(
            f"the tokenizer in {part.folder} does not load ({type(error).__name__}: {_first_line(error)}); "
            "download the folder again"
        ) from None


def _modernise(scheduler: Any, unet: Any) -> None:
    """Set what StableDiffusionPipeline sets by itself in the configurations of early models, but warns about."""
    if getattr(scheduler.config, "steps_offset", 1) != 1:
        scheduler.register_to_config(steps_offset=1)
    if getattr(scheduler.config, "clip_sample", False):
        scheduler.register_to_config(clip_sample=False)
    from packaging.version import Version

    written_by = Version(getattr(unet.config, "_diffusers_version", "0.9.0"))
    if written_by.release < (0, 9) and isinstance(unet.config.sample_size, int) and unet.config.sample_size < 64:
        unet.register_to_config(sample_size=64)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
