"""Diffusers' own pipelines around the graphs of a folder in the directory contract, whatever runs these.

    model_index.json  scheduler/  tokenizer/  [tokenizer_2/]
    text_encoder|[text_encoder_2]|unet|vae_encoder|vae_decoder/{config.json,<the graph>}

| component | inputs | outputs |
|---|---|---|
| text_encoder | input_ids [batch, tokens] int64 | last_hidden_state, pooler_output; SDXL also hidden_states.0 … N |
| text_encoder_2 | the same | text_embeds, last_hidden_state, hidden_states.0 … N |
| unet | sample [batch, 4, height, width], timestep [], encoder_hidden_states [batch, tokens, width]; SDXL also \
text_embeds [batch, width], time_ids [batch, 6] | out_sample, shaped as sample |
| vae_encoder | sample [batch, 3, height, width] | latent_parameters [batch, 8, height / 8, width / 8] |
| vae_decoder | latent_sample [batch, 4, height, width] | sample [batch, 3, 8 height, 8 width] |

All but input_ids go in and out in fp32, in whatever precision a graph computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from torch.nn import Module
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from bakeout.editor.architecture import describe, family_of
from bakeout.editor.errors import InputError
from bakeout.editor.folder import scheduler_part, tokenizer_part
from bakeout.editor.model_files import read_json
from bakeout.editor.pipeline import make_pipeline
from bakeout.export.hidden_states import guard
from bakeout.export.one_size import hold_to

EXPORT_AGAIN = "export the model again"
# The class that reads a network's config.json, and the name of the kind in it.
_KINDS = {
    "text_encoder": ("CLIPTextModel", "clip_text_model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "clip_text_model"),
    "unet": ("UNet2DConditionModel", "UNet2DConditionModel"),
    "vae_encoder": ("AutoencoderKL", "AutoencoderKL"),
    "vae_decoder": ("AutoencoderKL", "AutoencoderKL"),
}


class Graph(Protocol):
    """A network that something runs, called with tensors by name.

    Attributes:
        path: of its file.
        device: where its inputs are wanted, and where its outputs are.
    """

    path: Path
    device: torch.device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, on `device`, the caller's own. Raises InputError for inputs that it does not take."""


# Loads the graph of a component, given the names of all its inputs, and names that must be among its outputs.
LoadGraph = Callable[[str, Collection[str], Collection[str]], Graph]


def check_names(
    path: Path,
    found: tuple[Collection[str], Collection[str]],
    inputs: Collection[str],
    outputs: Collection[str],
) -> None:
    """Raise InputError unless a graph with the inputs and outputs `found` takes `inputs`, and gives `outputs`."""
    for what, wanted, names in (("input", inputs, found[0]), ("output", outputs, found[1])):
        for name in wanted:
            if name not in names:
                raise InputError(f"{path} has no {what} {name}; {EXPORT_AGAIN}")
    for name in found[0]:
        if name not in inputs:
            raise InputError(f"{path} wants an input {name!a:.100}, which no pipeline gives it; {EXPORT_AGAIN}")


def check_given(path: Path, given: Collection[str], wanted: Collection[str]) -> None:
    """Raise InputError unless the inputs given to a graph are those that it wants."""
    if odd := sorted(set(given) ^ set(wanted)):
        known = "lacks" if odd[0] in wanted else "has no input"
        raise InputError(f"{path} {known} {odd[0]!a:.100}; give it {', '.join(wanted)}")


class _Network(Module):
    """What pipelines ask of any component."""

    dtype = torch.float32

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        self.config: Any = FrozenDict(config)
        self.device = device

    def register_to_config(self, **changes: Any) -> None:
        """As `diffusers.ConfigMixin` has it."""
        self.config = FrozenDict({**self.config, **changes})


class GraphTextEncoder(_Network):
    """A text encoder: `transformers.CLIPTextModel`, or `CLIPTextModelWithProjection` if it gives `text_embeds`."""

    def __init__(self, graph: Graph, config: Mapping[str, Any]) -> None:
        super().__init__(config, graph.device)
        self.graph = graph

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Graph.run`."""
        return self.graph.run(inputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        """See `CLIPTextModel.forward`. Raises InputError for an attention mask, or hidden states that are not there."""
        if attention_mask is not None:
            raise InputError(f"{self.graph.path} takes no attention mask; set use_attention_mask to false beside it")
        outputs = self.run({"input_ids": input_ids})
        states = None
        if output_hidden_states:
            names = _hidden_states(self.config)
            if not outputs.keys() >= set(names):
                raise InputError(
                    f"{self.graph.path} gives no hidden states, so no layer can be skipped; leave clip_skip out"
                )
            states = tuple(outputs[name] for name in names)
        last = outputs["last_hidden_state"]
        if "text_embeds" in outputs:
            return CLIPTextModelOutput(text_embeds=outputs["text_embeds"], last_hidden_state=last, hidden_states=states)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=outputs["pooler_output"], hidden_states=states
        )


class GraphUNet(_Network):
    """A `diffusers.UNet2DConditionModel`."""

    def __init__(self, graph: Graph, config: Mapping[str, Any]) -> None:
        super().__init__(config, graph.device)
        self.graph = graph
        # SDXL's pipelines compare the width of what they add with this layer's.
        width = self.config.projection_class_embeddings_input_dim
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Graph.run`."""
        return self.graph.run(inputs)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: object,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """See `UNet2DConditionModel.forward`. Raises InputError for another input, or sides that it cannot halve."""
        for name, value in others.items():
            if value is not None:
                raise InputError(f"{self.graph.path} takes no {name}; leave it out, or draw with torch")
        unit = 2 ** (len(self.config.block_out_channels) - 1)
        if any(side % unit for side in sample.shape[-2:]):
            height, width = sample.shape[-2:]
            raise InputError(
                f"{self.graph.path} takes latents whose sides are multiples of {unit}, not {width}x{height}; choose "
                "another picture size"
            )
        step = torch.as_tensor(timestep).reshape(())
        inputs = {"sample": sample, "timestep": step, "encoder_hidden_states": encoder_hidden_states}
        out = self.run({**inputs, **(added_cond_kwargs or {})})["out_sample"]
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class GraphVae(_Network):
    """A `diffusers.AutoencoderKL`."""

    def __init__(self, encoder: Graph, decoder: Graph, config: Mapping[str, Any]) -> None:
        super().__init__(config, decoder.device)
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """The distribution of the latents of pictures [batch, 3, height, width] in -1 … 1."""
        parameters = self.encoder.run({"sample": x})["latent_parameters"]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:  # noqa: ARG002 - pipelines give it
        """The pictures of latents [batch, 4, height, width]."""
        sample = self.decoder.run({"latent_sample": z})["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def load_graph_pipeline(
    folder: Path,
    load: LoadGraph,
    first_states: Mapping[str, int] = {},
    latents: tuple[int, int] | None = None,
) -> Any:
    """The text-to-image pipeline of diffusers for the folder's family, around graphs.

    A StableDiffusionXLPipeline or StableDiffusionPipeline, as `Model.pipeline` gives it. Its text encoders and UNet
    have `run`, as `Graph.run`, and its `vae` has an `encoder` and a `decoder` with it.

    Args:
        folder: in the directory contract. Nothing but its files is read, and nothing is fetched.
        load: loads a graph.
        first_states: of each edited text encoder, the first hidden state that the edit reaches; see `guard`.
        latents: height and width of the only latents that the edit is for; see `hold_to`. None is any.

    Raises:
        InputError: the folder is not whole, or has no such encoder.
    """
    index = read_json(folder / "model_index.json")
    text = {name: _config(folder, name) for name in ("text_encoder", "text_encoder_2") if _class(index, name)}
    unet, vae = _config(folder, "unet"), _vae_config(folder)
    family = family_of(unet, vae, text, str(folder))
    if unet.get("time_cond_proj_dim") is not None:
        raise InputError(f"{folder} has a UNet with guidance as an input, which no pipeline gives it; draw with torch")
    parts = {"scheduler": scheduler_part(folder, _class(index, "scheduler"))}
    for encoder in text:
        name = encoder.replace("text_encoder", "tokenizer")
        parts[name] = tokenizer_part(folder / name, _class(index, name))
    added = ("text_embeds", "time_ids") if family == "sdxl" else ()
    networks: dict[str, Module] = {
        name: GraphTextEncoder(load(name, ("input_ids",), _text_outputs(name, family, config)), config)
        for name, config in text.items()
    }
    unet_inputs = ("sample", "timestep", "encoder_hidden_states", *added)
    networks["unet"] = GraphUNet(load("unet", unet_inputs, ("out_sample",)), unet)
    networks["vae"] = GraphVae(
        load("vae_encoder", ("sample",), ("latent_parameters",)),
        load("vae_decoder", ("latent_sample",), ("sample",)),
        vae,
    )
    pipeline = make_pipeline(networks, parts, index, family)
    guard(pipeline, first_states)
    if latents is not None:
        hold_to(pipeline, latents)
    return pipeline


def _text_outputs(name: str, family: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    pooled = ("last_hidden_state", "pooler_output") if name == "text_encoder" else ("text_embeds", "last_hidden_state")
    return (*pooled, *(_hidden_states(config) if family == "sdxl" else ()))


def _hidden_states(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"hidden_states.{number}" for number in range(config["num_hidden_layers"] + 1))


def _class(index: Mapping[str, Any], name: str) -> str:
    """The class that a `model_index.json` names for a component, empty if it names none."""
    match index.get(name):
        case [_, str(class_name)]:
            return class_name
    return ""


def _config(folder: Path, name: str) -> dict[str, Any]:
    """The configuration of a network, with the library's defaults filled in."""
    path = folder / name / "config.json"
    said = read_json(path)
    class_name, kind = _KINDS[name]
    found = said.get("_class_name", said.get("model_type"))
    if found != kind:
        raise InputError(f"{path} is of a {found!a:.100}, not a {kind}; {EXPORT_AGAIN}")
    return describe(class_name, said, str(path), None)[1]


def _vae_config(folder: Path) -> dict[str, Any]:
    encoder, decoder = (_config(folder, name) for name in ("vae_encoder", "vae_decoder"))
    if encoder != decoder:
        raise InputError(f"{folder} has a VAE encoder and decoder with different configurations; {EXPORT_AGAIN}")
    return decoder
