"""Make the diffusers pipeline of an opened model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError
from bakeout.editor.weights import load_module

if TYPE_CHECKING:
    import torch

    from bakeout.editor.model import Model, Part

# What the pipelines take of their model_index.json besides components.
_SETTINGS = {"sdxl": ("force_zeros_for_empty_prompt",)}


def load_pipeline(
    model: Model,
    device: str | torch.device,
    dtype: torch.dtype | None,
    changed: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
) -> Any:
    """See `Model.pipeline`. `changed` are by component what takes the place of stored tensors, by their names."""
    networks = {
        name: load_module(
            component.class_name,
            component.config,
            component.tensors,
            component.locations,
            device,
            dtype,
            changed.get(name, {}),
        )
        for name, component in model.components.items()
    }
    return make_pipeline(networks, model.parts, model.index, model.family)


def make_pipeline(
    networks: Mapping[str, torch.nn.Module], parts: Mapping[str, Part], index: Mapping[str, Any], family: str
) -> Any:
    """The text-to-image pipeline of `family`, without safety checker, watermark and progress bar.

    Args:
        networks: text encoders, UNet and VAE, by the names in the pipeline.
        parts: scheduler and tokenizers, by the names in the pipeline.
        index: the model's `model_index.json`, for the pipeline's settings.
        family: `sd1`, `sd2` or `sdxl`.

    Raises:
        InputError: a tokenizer or scheduler does not load.
    """
    StableDiffusionPipeline, StableDiffusionXLPipeline = pipeline_classes()
    all_parts: dict[str, Any] = dict(networks)
    for name, part in parts.items():
        all_parts[name] = _scheduler(part) if name == "scheduler" else load_tokenizer(part)
    settings = {key: index[key] for key in _SETTINGS.get(family, ()) if key in index}
    if family == "sdxl":
        # Left to itself it marks pictures or not by whether a package is installed.
        pipeline = StableDiffusionXLPipeline(**all_parts, **settings, add_watermarker=False)
    else:
        _modernise(all_parts["scheduler"], all_parts["unet"])
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**all_parts, **off)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_to_image(pipeline: Any) -> Any:
    """The image-to-image pipeline of diffusers with the components of a text-to-image one, which stays as it is."""
    pipeline_classes()  # their imports remark on optional packages
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    made: Any
    config = pipeline.config
    if "text_encoder_2" in pipeline.components:
        settings = {"force_zeros_for_empty_prompt": config.force_zeros_for_empty_prompt, "add_watermarker": False}
        made = StableDiffusionXLImg2ImgPipeline(**pipeline.components, **settings)
    else:
        settings = {"requires_safety_checker": config.requires_safety_checker}
        made = StableDiffusionImg2ImgPipeline(**pipeline.components, **settings)
    made.set_progress_bar_config(disable=True)
    return made


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


def load_tokenizer(part: Part) -> Any:
    """The CLIP tokenizer of a part. Raises InputError if it does not load."""
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
