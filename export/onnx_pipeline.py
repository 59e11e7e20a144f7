"""Draw with ONNX Runtime: diffusers' own pipelines around the graphs of a folder in the directory contract.

    model_index.json  scheduler/  tokenizer/  [tokenizer_2/]
    text_encoder|[text_encoder_2]|unet|vae_encoder|vae_decoder/{config.json,model.onnx[,model.onnx_data]}

| component | inputs | outputs |
|---|---|---|
| text_encoder | input_ids [batch, tokens] int64 | last_hidden_state, pooler_output; SDXL also hidden_states.0 … N |
| text_encoder_2 | the same | text_embeds, last_hidden_state, hidden_states.0 … N |
| unet | sample [batch, 4, height, width], timestep [], encoder_hidden_states [batch, tokens, width]; SDXL also \
text_embeds [batch, width], time_ids [batch, 6] | out_sample, shaped as sample |
| vae_encoder | sample [batch, 3, height, width] | latent_parameters [batch, 8, height / 8, width / 8] |
| vae_decoder | latent_sample [batch, 4, height, width] | sample [batch, 3, 8 height, 8 width] |

Nothing but these files is read, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from bakeout.editor.errors import InputError, not_installed
from bakeout.editor.folder import scheduler_part, tokenizer_part
from bakeout.editor.model_files import read_json
from bakeout.editor.pipeline import make_pipeline
from bakeout.export.hidden_states import guard
from bakeout.export.one_size import check_static, hold_to
from bakeout.export.op_library import KERNELS, op_library

GRAPH = "model.onnx"
EXPORT_AGAIN = "export the model again"
# The class that reads a network's config.json, and the name of the kind in it.
_KINDS = {
    "text_encoder": ("CLIPTextModel", "clip_text_model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "clip_text_model"),
    "unet": ("UNet2DConditionModel", "UNet2DConditionModel"),
    "vae_encoder": ("AutoencoderKL", "AutoencoderKL"),
    "vae_decoder": ("AutoencoderKL", "AutoencoderKL"),
}
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}
# ONNX Runtime's "fatal": what goes wrong comes as an exception, and need not stand on the terminal too.
_QUIET = 4


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime runs.

    Attributes:
        providers: execution providers in order of preference. What the first cannot run, the next does, and the CPU's
            at last.
        provider_options: of a provider, by its name: what ONNX Runtime documents for it.
        threads: that work on one operation; None leaves it to ONNX Runtime, which takes one a core.
        arena: keep freed memory for the next call. Without, little stays in use between calls, which take longer: on a
            CPU the UNet of `shapes` an eighth, its VAE decoder a third.
        memory_pattern: plan a call's memory as a whole when its shapes have been seen before. ONNX Runtime does so by
            default; that UNet is 3 % faster with it, and the arena of that VAE at 512 px 1.8 times as large.
        kernels: what computes operators of ours (`bakeout.export.custom_ops`): `library`, our library of kernels;
            `function`, their bodies in the file, as in any other runtime; or `auto`, the library if it can be had.

    Raises:
        InputError: no provider, options for another one, less than one thread, or no such kernels.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    threads: int | None = None
    arena: bool = True
    memory_pattern: bool = False
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if not self.providers:
            raise InputError("no execution provider is given; give one, as CPUExecutionProvider")
        if unused := sorted(self.provider_options.keys() - set(self.providers)):
            raise InputError(f"there are options for {unused[0]!a:.100}, which is not among the providers; add it")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}: it must be 1 or more")
        if self.kernels not in KERNELS:
            raise InputError(f"ONNX Runtime has no kernels {self.kernels!a:.50}; choose from {', '.join(KERNELS)}")


class OnnxGraph:
    """A graph in ONNX Runtime, called with tensors by name.

    Args:
        path: of the graph.
        inputs: the names of all its inputs.
        outputs: names that must be among its outputs.
        settings: of the session.

    Raises:
        InputError: it does not load, or has other inputs and outputs, or the kernels asked for are not there.
    """

    def __init__(
        self, path: Path, inputs: Collection[str], outputs: Collection[str], settings: SessionSettings
    ) -> None:
        self.path = path
        self.session = _session(path, settings)
        self.inputs = {it.name: it for it in self.session.get_inputs()}
        self.outputs = tuple(it.name for it in self.session.get_outputs())
        for what, wanted, found in (("input", inputs, self.inputs), ("output", outputs, self.outputs)):
            for name in wanted:
                if name not in found:
                    raise InputError(f"{path} has no {what} {name}; {EXPORT_AGAIN}")
        for name, it in self.inputs.items():
            if name not in inputs:
                raise InputError(f"{path} wants an input {name!a:.100}, which no pipeline gives it; {EXPORT_AGAIN}")
            if it.type not in _DTYPES:
                raise InputError(f"{path} wants {name} as {it.type:.50}, which no pipeline gives it; {EXPORT_AGAIN}")

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            inputs: by name, on any device and in any dtype; those on the CPU in the graph's dtype are not copied.

        Returns:
            Tensors on the CPU, in the graph's dtypes.

        Raises:
            InputError: an input is missing, unknown, or of a shape that the graph does not take, or memory is short.
        """
        if odd := sorted(inputs.keys() ^ self.inputs.keys()):
            known = "lacks" if odd[0] in self.inputs else "has no input"
            raise InputError(f"{self.path} {known} {odd[0]!a:.100}; give it {', '.join(self.inputs)}")
        feeds = {
            name: inputs[name].detach().to("cpu", _DTYPES[it.type]).contiguous() for name, it in self.inputs.items()
        }
        for name, tensor in feeds.items():
            _check_shape(self.path, name, tensor.shape, self.inputs[name].shape)
        try:
            arrays = self.session.run(self.outputs, {name: tensor.numpy() for name, tensor in feeds.items()})
        except Exception as error:  # ONNX Runtime has a class for each of its codes, and documents none
            raise InputError(
                f"ONNX Runtime failed in {self.path} ({_reason(error)}); if memory is short, draw fewer or smaller "
                f"pictures at a time, else {EXPORT_AGAIN}"
            ) from error
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)}


class _Network(Module):
    """What pipelines ask of any component. Tensors go in and out on the CPU, wherever the provider computes."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config: Any = FrozenDict(config)

    def register_to_config(self, **changes: Any) -> None:
        """As `diffusers.ConfigMixin` has it."""
        self.config = FrozenDict({**self.config, **changes})


class OnnxTextEncoder(_Network):
    """A text encoder: `transformers.CLIPTextModel`, or `CLIPTextModelWithProjection` if it gives `text_embeds`."""

    def __init__(self, graph: OnnxGraph, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.graph = graph

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `OnnxGraph.run`."""
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


class OnnxUNet(_Network):
    """A `diffusers.UNet2DConditionModel`."""

    def __init__(self, graph: OnnxGraph, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.graph = graph
        # SDXL's pipelines compare the width of what they add with this layer's.
        width = self.config.projection_class_embeddings_input_dim
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `OnnxGraph.run`."""
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


class OnnxVae(_Network):
    """A `diffusers.AutoencoderKL`."""

    def __init__(self, encoder: OnnxGraph, decoder: OnnxGraph, config: Mapping[str, Any]) -> None:
        super().__init__(config)
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


def load_onnx_pipeline(
    folder: Path,
    settings: SessionSettings | None = None,
    first_states: Mapping[str, int] = {},
    latents: tuple[int, int] | None = None,
) -> Any:
    """The text-to-image pipeline of diffusers for the folder's family, running in ONNX Runtime.

    A StableDiffusionXLPipeline or StableDiffusionPipeline, as `Model.pipeline` gives it. Its text encoders and UNet
    have `run`, as `OnnxGraph.run`, and its `vae` has an `encoder` and a `decoder` with it.

    Args:
        folder: in the directory contract.
        settings: of every session; by default one on the CPU.
        first_states: of each edited text encoder, the first hidden state that the edit reaches; see `guard`.
        latents: height and width of the only latents that the edit is for; see `hold_to`. None is any.

    Raises:
        InputError: ONNX Runtime or a provider is not installed, or the folder is not whole, has no such encoder, or has
            a UNet for latents of another size.
    """
    settings = settings or SessionSettings()
    check_providers(settings)
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

    def graph(component: str, inputs: Collection[str], outputs: Collection[str]) -> OnnxGraph:
        return OnnxGraph(folder / component / GRAPH, inputs, outputs, settings)

    added = ("text_embeds", "time_ids") if family == "sdxl" else ()
    networks: dict[str, Module] = {
        name: OnnxTextEncoder(graph(name, ("input_ids",), _text_outputs(name, family, config)), config)
        for name, config in text.items()
    }
    unet_inputs = ("sample", "timestep", "encoder_hidden_states", *added)
    networks["unet"] = network = OnnxUNet(graph("unet", unet_inputs, ("out_sample",)), unet)
    check_static(network.graph.path, network.graph.inputs["sample"].shape, latents)
    networks["vae"] = OnnxVae(
        graph("vae_encoder", ("sample",), ("latent_parameters",)),
        graph("vae_decoder", ("latent_sample",), ("sample",)),
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


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(not_installed("onnxruntime")) from None
    return onnxruntime


def check_providers(settings: SessionSettings) -> None:
    """Raise InputError if ONNX Runtime, or a provider, is not installed."""
    available = _onnxruntime().get_available_providers()
    for name in settings.providers:
        if name not in available:
            raise InputError(f"this ONNX Runtime has no {name!a:.100}; choose from {', '.join(available)}")


def _session(path: Path, settings: SessionSettings) -> Any:
    onnxruntime = _onnxruntime()
    if not path.is_file():
        raise InputError(f"{path} is missing; {EXPORT_AGAIN}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.enable_cpu_mem_arena = settings.arena
    options.enable_mem_pattern = settings.memory_pattern
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if library := op_library([path], settings):
        options.register_custom_ops_library(str(library))
    providers = [(name, dict(settings.provider_options.get(name, {}))) for name in settings.providers]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime has a class for each of its codes, and documents none
        raise InputError(f"{path} does not load in ONNX Runtime ({_reason(error)}); {EXPORT_AGAIN}") from error
    # Else a provider that fails while it runs is replaced by the CPU's, with a remark on the terminal.
    session.disable_fallback()
    for name in settings.providers:
        if name not in session.get_providers():
            raise InputError(
                f"ONNX Runtime has {name} but could not start it; install what it needs, or choose another provider"
            )
    return session


def _check_shape(path: Path, name: str, given: tuple[int, ...], wanted: list[int | str | None]) -> None:
    fixed = [size if isinstance(size, int) else None for size in wanted]
    if len(given) != len(fixed) or any(size not in (None, own) for size, own in zip(fixed, given, strict=True)):
        shape = ", ".join("any" if size is None else str(size) for size in fixed)
        raise InputError(f"{path} takes {name} of shape [{shape}] only, not {list(given)}; draw what it was made for")


def _reason(error: Exception) -> str:
    """The first line of a message of ONNX Runtime, without `[ONNXRuntimeError] : code : NAME : `."""
    return str(error).strip().partition("\n")[0].split(" : ", 3)[-1][:300]
