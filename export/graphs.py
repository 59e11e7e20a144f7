"""The networks of a model as they are traced for its ONNX folder: what each takes and gives, and with which edits.

Names and order of inputs and outputs are those that optimum's pipelines for ONNX Runtime expect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.nn import Module, ModuleList

from bakeout.editor.architecture import build
from bakeout.editor.errors import InputError
from bakeout.editor.model import Component, Model
from bakeout.editor.weights import make_position_ids
from bakeout.export.patch import SitePatch, put_patches
from bakeout.export.shrink import Cut, narrow
from bakeout.export.steer import SiteEdit, prompt_length, steering

# Keys of a configuration that tell of somebody's machine, or of the dtype that the weights had before.
LOCAL = ("_name_or_path", "dtype", "torch_dtype")
# In units; far beyond what any machine draws, and without it torch.export finds no multiples.
_MAX_SIDE = 1 << 20
# Place of a dynamic dimension → its name.
Dims = Mapping[int, str]


@dataclass(frozen=True)
class Input:
    """An input.

    Attributes:
        shape: an example, with sizes of two and more where they are dynamic: of one, PyTorch would make constants.
        dims: the dynamic dimensions.
        unit: of what the sides of a picture are multiples.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dims: Dims
    unit: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def dynamic(self) -> dict[int, Any]:
        """The dynamic dimensions as torch.export takes them."""
        return {
            place: self.unit * Dim(name, min=1, max=_MAX_SIDE) if place >= 2 and self.unit > 1 else Dim.DYNAMIC
            for place, name in self.dims.items()
        }


@dataclass(frozen=True)
class Graph:
    """A graph of the folder.

    Attributes:
        name: of its folder.
        component: whose parameters it has.
        config: of the component, with the library's defaults filled in.
        module: of the component, without weights but the constants of edits; takes the inputs and returns the outputs
            as a tuple.
        inputs: by name, in order.
        outputs: name → dynamic dimensions, in order.
    """

    name: str
    component: Component
    config: Mapping[str, Any]
    module: Module
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Dims]

    @property
    def edits(self) -> dict[str, SiteEdit | SitePatch]:
        """What happens at sites of the graph, by submodule of `module`."""
        return {path: it for path, it in self.module.named_modules() if isinstance(it, SiteEdit | SitePatch)}


class _TextEncoder(Module):
    def __init__(
        self, network: Module, first: tuple[str, ...], edits: Sequence[SiteEdit], *, hidden_states: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.edits = ModuleList(edits)
        self._first = first
        self._hidden_states = hidden_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        with steering(self.network, cast(Sequence[SiteEdit], self.edits), input_ids):
            output = self.network(input_ids, output_hidden_states=self._hidden_states)
        return (*(output[name] for name in self._first), *(output.hidden_states if self._hidden_states else ()))


class _UNet(Module):
    def __init__(self, network: Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        more = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.network(  # type: ignore[no-any-return]
            sample, timestep, encoder_hidden_states, added_cond_kwargs=more, return_dict=False
        )


class _VaeEncoder(Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        return (self.network.encode(sample).latent_dist.parameters,)


class _VaeDecoder(Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        return self.network.decode(latent_sample, return_dict=False)  # type: ignore[no-any-return]


def graphs_of(
    model: Model,
    edits: Mapping[str, Sequence[SiteEdit | SitePatch]] = MappingProxyType({}),
    cuts: Mapping[str, Mapping[str, Cut]] = MappingProxyType({}),
) -> Iterator[Graph]:
    """The graphs of a model's ONNX folder, in order; their modules have no weights but the constants of `edits`.

    `edits` are by component, as `edits_of` gives them, and so are `cuts`, as `cuts_of` does.
    """
    for component in model.components.values():
        network: Any = build(component.class_name, component.config).eval()
        narrow(network, cuts.get(component.name, {}))
        own = edits.get(component.name, ())
        put_patches(network, [it for it in own if isinstance(it, SitePatch)])
        config = _config(network, component)
        if component.name == "vae":
            yield from _vae_graphs(component, config, network)
        elif component.name == "unet":
            yield _unet_graph(component, config, network, own)
        else:
            # Of several text encoders the pipelines take hidden states; of one, the last.
            states = config["num_hidden_layers"] + 1 if model.family == "sdxl" else 0
            yield _text_graph(component, config, network, states, own)


def _text_graph(
    component: Component,
    config: Mapping[str, Any],
    network: Any,
    states: int,
    edits: Sequence[SiteEdit | SitePatch],
) -> Graph:
    longest = config["max_position_embeddings"]
    # Static: ONNX Runtime would broadcast one token to a constant's.
    length = prompt_length(edits)
    if length is not None and length > longest:
        raise InputError(
            f"the Edit of the {component.name} is for {length} tokens where the model has {longest}; use the model "
            "that it was made for"
        )
    batch: dict[int, str] = {0: "batch_size"}
    tokens = batch if length is not None else {**batch, 1: "sequence_length"}
    last = {"last_hidden_state": tokens}
    projects = component.class_name.endswith("WithProjection")
    outputs: dict[str, Dims] = {"text_embeds": batch, **last} if projects else {**last, "pooler_output": batch}
    hooked = [it for it in edits if isinstance(it, SiteEdit)]
    module = _TextEncoder(network, tuple(outputs), hooked, hidden_states=states > 0)
    outputs |= {f"hidden_states.{layer}": tokens for layer in range(states)}
    ids = Input((2, length or longest), tokens, dtype=torch.int64)
    return Graph(component.name, component, config, module, {"input_ids": ids}, outputs)


def _unet_graph(
    component: Component, config: Mapping[str, Any], network: Any, edits: Sequence[SiteEdit | SitePatch]
) -> Graph:
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    batch: dict[int, str] = {0: "batch_size"}
    latents = next((it.latents for it in edits if isinstance(it, SitePatch) and it.latents is not None), None)
    if latents is None:
        height, width, picture = 4 * unit, 6 * unit, {**batch, 2: "height", 3: "width"}
    else:
        height, width, picture = *latents, batch
        if height % unit or width % unit:
            raise InputError(
                f"the Edit of the unet is for latents of {width}x{height} where this model takes multiples of {unit}; "
                "calibrate it at such a size"
            )
        if height == width:
            # What pipelines draw at unless told otherwise; not all of them can read two sides there.
            config = {**config, "sample_size": height}
    length = prompt_length(edits)
    # Any number of tokens will do.
    tokens = batch if length is not None else {**batch, 1: "sequence_length"}
    inputs = {
        "sample": Input((2, config["in_channels"], height, width), picture, unit),
        "timestep": Input((), {}),
        "encoder_hidden_states": Input((2, length or 77, config["cross_attention_dim"]), tokens),
    }
    if config["addition_embed_type"] == "text_time":
        # Six numbers tell size, crop and target size.
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs |= {"text_embeds": Input((2, pooled), batch), "time_ids": Input((2, 6), batch)}
    return Graph("unet", component, config, _UNet(network), inputs, {"out_sample": picture})


def _vae_graphs(component: Component, config: Mapping[str, Any], network: Any) -> Iterator[Graph]:
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    picture = {0: "batch_size", 2: "sample_height", 3: "sample_width"}
    latents = {0: "batch_size", 2: "latent_height", 3: "latent_width"}
    # Spelt as optimum spells them, which calculates with these names.
    smaller = {0: "batch_size", 2: f"sample_height / {unit}", 3: f"sample_width / {unit}"}
    larger = {0: "batch_size", 2: f"latent_height * {unit}", 3: f"latent_width * {unit}"}
    yield Graph(
        "vae_encoder", component, config, _VaeEncoder(network),
        {"sample": Input((2, config["in_channels"], 4 * unit, 6 * unit), picture, unit)},
        {"latent_parameters": smaller},
    )  # fmt: skip
    yield Graph(
        "vae_decoder", component, config, _VaeDecoder(network),
        {"latent_sample": Input((2, config["latent_channels"], 4, 6), latents)},
        {"sample": larger},
    )  # fmt: skip


def trace(graph: Graph) -> ExportedProgram:
    """The program of a graph. It needs no weights, so there are none."""
    module = graph.module
    # Not fake: the program has position ids as constants.
    make_position_ids(module, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.load_state_dict(
            {name: torch.empty(it.shape, dtype=torch.float32 if it.is_floating_point() else it.dtype)
             for name, it in module.state_dict().items()},
            assign=True,
        )  # fmt: skip
        example = tuple(torch.zeros(it.shape, dtype=it.dtype) for it in graph.inputs.values())
        return export(module, example, dynamic_shapes=tuple(it.dynamic for it in graph.inputs.values()))


def _config(network: Any, component: Component) -> dict[str, Any]:
    """A network's configuration, with the library's defaults filled in."""
    if component.name.startswith("text_encoder"):
        said = network.config.to_json_string(use_diff=False)
    else:
        said = network.to_json_string()
    return {key: value for key, value in {**json.loads(said), **component.config}.items() if key not in LOCAL}
