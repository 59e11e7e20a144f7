"""What goes into and comes out of each network: the directory contract of ONNX pipelines, and eager PyTorch by it.

The names are those that diffusers' and optimum's ONNX pipelines use. `bakeout.export` is not asked what it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bakeout.editor.model import Model

# Of each input, the dimensions in which it may have any size: batch, tokens, and the sides of a picture or latents.
FREE: Mapping[str, tuple[int, ...]] = {
    "input_ids": (0, 1),
    "sample": (0, 2, 3),
    "latent_sample": (0, 2, 3),
    "encoder_hidden_states": (0, 1),
    "text_embeds": (0,),
    "time_ids": (0,),
    "timestep": (),
}


@dataclass(frozen=True)
class Interface:
    """The names of a network's inputs and outputs, in order, with the number of dimensions of each."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


def contract(model: Model) -> dict[str, Interface]:
    """The interface of each network of a model: text encoders, `unet`, `vae_encoder` and `vae_decoder`.

    The first text encoder gives `last_hidden_state` [batch, tokens, width] and `pooler_output` [batch, width], for SDXL
    also every `hidden_states.i`; its second one `text_embeds`, `last_hidden_state` and these.
    """
    xl = model.family == "sdxl"
    found = {}
    for name, component in model.components.items():
        if name.startswith("text_encoder"):
            first = {"text_embeds": 2, "last_hidden_state": 3} if name == "text_encoder_2" else {}
            outputs = first or {"last_hidden_state": 3, "pooler_output": 2}
            layers = range(component.config["num_hidden_layers"] + 1) if xl else ()
            found[name] = Interface({"input_ids": 2}, {**outputs, **{f"hidden_states.{i}": 3 for i in layers}})
    added = {"text_embeds": 2, "time_ids": 2} if xl else {}
    found["unet"] = Interface({"sample": 4, "timestep": 0, "encoder_hidden_states": 3, **added}, {"out_sample": 4})
    found["vae_encoder"] = Interface({"sample": 4}, {"latent_parameters": 4})
    found["vae_decoder"] = Interface({"latent_sample": 4}, {"sample": 4})
    return found


@torch.inference_mode()
def run_network(pipeline: Any, name: str, interface: Interface, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of one network of a pipeline, eager or of ONNX Runtime, on the CPU.

    Args:
        pipeline: with diffusers' interface; a network with a method `run` is asked by the names of the contract.
        name: of the network, in the contract.
        interface: of the network; what an eager network gives beyond it is left out.
        inputs: by their names, on any device.
    """
    module = getattr(pipeline.vae, name.removeprefix("vae_")) if name.startswith("vae_") else getattr(pipeline, name)
    if hasattr(module, "run"):
        return {key: value.cpu() for key, value in module.run(inputs).items()}
    device = pipeline.device
    given = {key: value.to(device) for key, value in inputs.items()}
    found = _eager(pipeline, name, given)
    return {key: found[key].cpu() for key in interface.outputs if key in found}


def _eager(pipeline: Any, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if name == "unet":
        added = {key: given[key] for key in ("text_embeds", "time_ids") if key in given}
        arguments = (given["sample"], given["timestep"], given["encoder_hidden_states"])
        return {"out_sample": pipeline.unet(*arguments, added_cond_kwargs=added or None).sample}
    if name == "vae_encoder":
        return {"latent_parameters": pipeline.vae.encode(given["sample"]).latent_dist.parameters}
    if name == "vae_decoder":
        return {"sample": pipeline.vae.decode(given["latent_sample"]).sample}
    said = getattr(pipeline, name)(given["input_ids"], output_hidden_states=True)
    return {**said, **{f"hidden_states.{i}": state for i, state in enumerate(said.hidden_states)}}
