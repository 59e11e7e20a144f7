"""What a configuration builds (parameters and their shapes, without memory) and which model family it makes.

Modules are built on torch's meta device by the libraries that will run them, so that no rule of ours can drift from
theirs. torch, diffusers and transformers are imported when a function is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError

if TYPE_CHECKING:
    import torch

SUPPORTED = "bakeout edits base models of Stable Diffusion 1.x, 2.x and SDXL, so give one of those"
# The classes a component may have, and the library of each; nothing else is ever looked up or imported.
CLASSES: Mapping[str, Mapping[str, str]] = {
    "unet": {"UNet2DConditionModel": "diffusers"},
    "vae": {"AutoencoderKL": "diffusers"},
    "text_encoder": {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"},
    "text_encoder_2": {"CLIPTextModelWithProjection": "transformers"},
    "tokenizer": {"CLIPTokenizer": "transformers", "CLIPTokenizerFast": "transformers"},
    "tokenizer_2": {"CLIPTokenizer": "transformers", "CLIPTokenizerFast": "transformers"},
}
_BLOCKS = {
    "CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D", None,
}  # fmt: skip
_DEPTHS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "num_hidden_layers",
)  # fmt: skip
_MOST_LAYERS = 64  # in one stack: SDXL's second text encoder has 32
_BY_INPUT_CHANNELS = {
    9: "an inpainting model (its UNet takes 9 channels)",
    8: "an image-editing model like instruct-pix2pix (its UNet takes 8 channels)",
    7: "an upscaler (its UNet takes 7 channels)",
    3: "a pixel-space model (its UNet takes 3 channels)",
}


def build(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The module that `config` describes, on the meta device: names and shapes, no memory."""
    import torch

    with torch.device("meta"):
        if class_name in CLASSES["text_encoder"]:
            import transformers

            model_class = getattr(transformers, class_name)
            module: torch.nn.Module = model_class(model_class.config_class.from_dict(dict(config)))
        else:
            import diffusers

            module = getattr(diffusers, class_name).from_config(dict(config))
    return module


def describe(
    class_name: str, config: Mapping[str, Any], where: str, stored: int | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The shape of every parameter by its name in memory, and the configuration with the library's defaults filled in.

    `where` names the configuration in messages. `stored` is how many tensors the weights hold, None if that is unknown:
    every layer has some, so a configuration that asks for more layers is wrong, and building it might take forever.
    Raises InputError.
    """
    _check_depth(config, where, stored)
    try:
        shapes, effective = _described(class_name, json.dumps(dict(config), sort_keys=True))
    except Exception as error:  # noqa: BLE001 - a constructor raises anything on values that it was not written for
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where} does not describe a working {class_name} ({type(error).__name__}: {reason:.200}); {SUPPORTED}"
        ) from None
    return dict(shapes), deepcopy(effective)


# A validation opens the same few configurations again and again, and building a large UNet takes a second.
@lru_cache(maxsize=32)
def _described(class_name: str, config: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """As `describe`, of a configuration in JSON; the caller must not change what it gets."""
    module = build(class_name, json.loads(config))
    effective: Any = module.config
    return (
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
        dict(effective.to_dict() if hasattr(effective, "to_dict") else effective),
    )


def _check_depth(config: Mapping[str, Any], where: str, stored: int | None) -> None:
    layers = 1
    for key in _DEPTHS:
        layers = max(layers, _largest(config.get(key)))
    if stored is None and layers > _MOST_LAYERS:
        raise InputError(f"{where} asks for {layers} layers, more than any model that bakeout edits; {SUPPORTED}")
    if stored is not None and layers > stored:
        raise InputError(
            f"{where} asks for {layers} layers but the weights hold {stored} tensors; get both from one model"
        )


def _largest(value: object) -> int:
    if isinstance(value, list):
        return max((_largest(item) for item in value), default=0)
    return value if isinstance(value, int) else 0


def family_of(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Mapping[str, Any]], where: str
) -> str:
    """`sd1`, `sd2` or `sdxl`, from the (effective) configurations of the UNet, VAE and text encoders.

    Structure decides, never a name or a size: two text encoders and an embedding of size and crop make SDXL; one text
    encoder makes SD 2.x where the transformers project linearly and SD 1.x where by convolution. Raises InputError for
    the rest.
    """
    if fault := _unet_fault(unet):
        raise InputError(f"{where} is {fault}; {SUPPORTED}")
    with_sizes = unet.get("addition_embed_type") == "text_time"
    if with_sizes and set(text) == {"text_encoder_2"}:
        raise InputError(f"{where} is an SDXL refiner (it has only the second text encoder); {SUPPORTED}")
    expected = {"text_encoder", "text_encoder_2"} if with_sizes else {"text_encoder"}
    if set(text) != expected:
        raise InputError(
            f"{where} has {' and '.join(sorted(text)) or 'no text encoder'} but its UNet wants "
            f"{' and '.join(sorted(expected))}; {SUPPORTED}"
        )
    _check_widths(unet, vae, text, where)
    if with_sizes:
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _unet_fault(unet: Mapping[str, Any]) -> str | None:
    channels: Any = unet.get("in_channels")
    if channels != 4:
        return _BY_INPUT_CHANNELS.get(channels, f"a model whose UNet takes {channels!a:.20} channels instead of 4")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
        if unet.get(key) is not None:
            return f"a model whose UNet has extra conditioning ({key})"
    if unet.get("addition_embed_type") not in (None, "text_time"):
        return f"a model whose UNet has extra conditioning (addition_embed_type {unet['addition_embed_type']!a:.50})"
    kinds = [*unet["down_block_types"], unet.get("mid_block_type"), *unet["up_block_types"]]
    if unknown := [kind for kind in kinds if kind not in _BLOCKS]:
        return f"a model whose UNet has blocks of type {unknown[0]!a:.50}"
    if unet.get("dual_cross_attention"):
        return "a model whose UNet has dual cross attention"
    return None


def _check_widths(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    width = sum(config["hidden_size"] for config in text.values())
    wanted = unet["cross_attention_dim"]
    if any(value != width for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])):
        raise InputError(
            f"{where} has text encoders of width {width} but a UNet for width {wanted}; get all components from one "
            "model"
        )
    if vae["latent_channels"] != unet["in_channels"]:
        raise InputError(
            f"{where} has a VAE with {vae['latent_channels']} latent channels but a UNet for {unet['in_channels']}; "
            "get all components from one model"
        )
    if "text_encoder_2" in text:
        pooled, width = text["text_encoder_2"]["projection_dim"], unet["addition_time_embed_dim"]
        if not isinstance(width, int) or pooled + 6 * width != unet["projection_class_embeddings_input_dim"]:
            raise InputError(
                f"{where} has a UNet whose size and crop embedding does not fit its second text encoder (6 numbers "
                f"expected); {SUPPORTED}"
            )


def describe_single_file(names: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a single file is, from its tensors' names and shapes; None if it may be a supported checkpoint."""
    for test, what in _SINGLE_FILES:
        if any(test(name) for name in names):
            return what
    channels = names.get("model.diffusion_model.input_blocks.0.0.weight", (0,))
    if len(channels) == 4 and channels[1] != 4:
        return _BY_INPUT_CHANNELS.get(channels[1], f"a model whose UNet takes {channels[1]} channels instead of 4")
    return None


def _has(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


def _starts(*parts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(parts)


# In this order, the first that fits any tensor wins: parts of a checkpoint also appear inside whole ones.
_SINGLE_FILES: tuple[tuple[Callable[[str], bool], str], ...] = (
    (_has("lora_up.", "lora_down.", "lora_A.", "lora_B.", ".lora.", "hada_w1", "lokr_w1"), "a LoRA, not a whole model"),
    (_starts("emb_params", "string_to_param", "clip_g", "clip_l"), "a textual-inversion embedding, not a whole model"),
    (_starts("control_model.", "controlnet_"), "a ControlNet"),
    (_has("motion_modules."), "an AnimateDiff motion module"),
    (_has("joint_blocks."), "a Stable Diffusion 3 model"),
    (_has("double_blocks.", "double_stream_blocks."), "a Flux-like diffusion transformer"),
    (_has("caption_projection.", "y_embedder."), "a PixArt-like diffusion transformer"),
    (_starts("edm_mean"), "a Playground 2.5 model (its noise schedule is EDM)"),
    (_starts("conditioner.embedders.0.model."), "an SDXL refiner (its only text encoder is OpenCLIP)"),
    (_starts("down_blocks.", "text_model.encoder.", "encoder.layers.", "decoder.up_blocks."),
     "one component of a diffusers folder, so give the folder that has model_index.json"),
)  # fmt: skip
_WITHOUT_UNET = (
    (_starts("decoder.up.", "decoder.mid.", "first_stage_model.", "vae."), "a VAE, not a whole model"),
    (_starts("transformer.resblocks.", "cond_stage_model.", "conditioner."), "a text encoder, not a whole model"),
    (_starts("input_blocks.", "diffusion_model."), "a UNet, not a whole model"),
)


def describe_without_unet(names: Mapping[str, tuple[int, ...]]) -> str:
    """What a file without `model.diffusion_model.` is, from its tensors' names."""
    for test, what in _WITHOUT_UNET:
        if any(test(name) for name in names):
            return what
    return "not an image model that bakeout knows"
