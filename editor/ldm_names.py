"""Names and shapes of parameters in a single-file checkpoint (LDM, A1111, ComfyUI), from their names in memory.

The correspondence is that of diffusers' `loaders/single_file_utils.py`, which the tests compare with; here it goes from
memory to disk, because an edit is made to a named parameter and must be written back to the file that people ship.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

UNET = "model.diffusion_model."
VAE_PREFIXES = ("vae.", "first_stage_model.")  # the first that a file has, as diffusers chooses
# Per family and text encoder: the prefix in the file, and whether the names behind it are those of OpenCLIP.
TEXT_PREFIXES: dict[tuple[str, str], tuple[str, bool]] = {
    ("sd1", "text_encoder"): ("cond_stage_model.transformer.text_model.", False),
    ("sd2", "text_encoder"): ("cond_stage_model.model.", True),
    ("sdxl", "text_encoder"): ("conditioner.embedders.0.transformer.text_model.", False),
    ("sdxl", "text_encoder_2"): ("conditioner.embedders.1.model.", True),
}


@dataclass(frozen=True)
class Location:
    """The stored tensor that a parameter is read from, and how its values lie in it.

    `change` is `same`; `transposed` (stored [in, out]); `third` (the rows of third number `part` of a fused q, k, v);
    or `pointwise` (a Linear stored as a convolution, with up to two trailing dimensions of size 1).
    """

    tensor: str
    change: Literal["same", "transposed", "third", "pointwise"] = "same"
    part: int = 0

    def stored_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes that the stored tensor may have when the parameter has `shape`."""
        if self.change == "transposed":
            return (shape[::-1],)
        if self.change == "third":
            return ((3 * shape[0], *shape[1:]),)
        if self.change == "pointwise":
            return (shape, (*shape, 1), (*shape, 1, 1))
        return (shape,)


def unet_location(name: str, names: Collection[str]) -> Location:
    """Where the UNet parameter `name` lies; `names` are all of the UNet's, which show how deep its blocks are."""
    head, _, rest = name.partition(".")
    if head in _UNET_HEADS:
        return Location(UNET + _replace_first(name, _UNET_HEADS[head]))
    layers = 1 + max(int(match[1]) for match in map(_DOWN_RESNET.match, names) if match)
    match = _UNET_BLOCK.fullmatch(rest if head == "mid_block" else name)
    if match is None:
        raise NotImplementedError(f"no name for {name} in a single file is known")
    block, kind, index, tail = match["block"], match["kind"], int(match["index"]), match["tail"]
    if kind == "resnets":
        tail = _replace_first(tail, _RESNET)
    if head == "mid_block":
        return Location(f"{UNET}middle_block.{1 if kind == 'attentions' else 2 * index}.{tail}")
    slot = 1 if kind == "attentions" else 0
    if head == "down_blocks":
        position = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else index)
        tail = tail.replace("conv", "op", 1) if kind == "downsamplers" else tail
        return Location(f"{UNET}input_blocks.{position}.{slot}.{tail}")
    position = int(block) * (layers + 1)
    if kind == "upsamplers":
        with_attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
        return Location(f"{UNET}output_blocks.{position + layers}.{2 if with_attention else 1}.{tail}")
    return Location(f"{UNET}output_blocks.{position + index}.{slot}.{tail}")


def vae_location(name: str, names: Collection[str], prefix: str) -> Location:
    """Where the VAE parameter `name` lies behind `prefix`."""
    blocks = 1 + max(int(match[1]) for match in map(_VAE_UP.match, names) if match)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(\w+)\.(?:0\.)?(weight|bias)", name)
    if attention:
        side, layer, kind = attention.groups()
        linear = kind == "weight" and layer != "group_norm"
        return Location(f"{prefix}{side}.mid.attn_1.{_VAE_ATTENTION[layer]}.{kind}", "pointwise" if linear else "same")
    stored = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    stored = re.sub(r"down_blocks\.(\d+)", r"down.\1", stored)
    stored = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", stored)
    for ours, theirs in _VAE.items():
        stored = stored.replace(ours, theirs)
    return Location(prefix + stored)


def clip_location(name: str, prefix: str) -> Location:
    """Where the parameter `name` of a CLIP text encoder in transformers' names lies behind `prefix`."""
    return Location(prefix + name.removeprefix("text_model."))


def open_clip_location(name: str, prefix: str) -> Location:
    """Where the parameter `name` of a CLIP text encoder lies behind `prefix` in OpenCLIP's names."""
    name = name.removeprefix("text_model.")
    if name in _OPEN_CLIP:
        return Location(prefix + _OPEN_CLIP[name], "transposed" if name == "text_projection.weight" else "same")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise NotImplementedError(f"no name for {name} in a single file is known")
    layer, inner, kind = match.groups()
    block = f"{prefix}transformer.resblocks.{layer}."
    if inner in _QKV:
        return Location(f"{block}attn.in_proj_{kind}", "third", _QKV.index(inner))
    return Location(f"{block}{_OPEN_CLIP_LAYER[inner]}.{kind}")


def _replace_first(name: str, replacement: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in replacement:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


_UNET_HEADS = {
    "time_embedding": (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")),
    "add_embedding": (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2")),
    "conv_in": (("conv_in", "input_blocks.0.0"),),
    "conv_norm_out": (("conv_norm_out", "out.0"),),
    "conv_out": (("conv_out", "out.2"),),
}
_UNET_BLOCK = re.compile(
    r"(?:(?:down|up)_blocks\.(?P<block>\d+)\.)?(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<tail>.+)"
)
_DOWN_RESNET = re.compile(r"down_blocks\.\d+\.resnets\.(\d+)\.")
_RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
_VAE_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.")
_VAE = {
    ".resnets.": ".block.", "downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
