"""Whether an engine, as it ships, gives what the fp32 graph gives.

No outputs are added for it: they change what TensorRT fuses, and so can hide a fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model_files import read_json
from bakeout.export.onnx_pipeline import OnnxGraph, SessionSettings
from bakeout.export.precision import limit
from bakeout.export.tensorrt.engine import Engine
from bakeout.export.tensorrt.shapes import Profile
from bakeout.export.tensorrt.skeleton import skeleton

_SEED: Final = 0
# In the middle of the noise, and late in drawing, where the sizes of what networks give differ most.
_TIMESTEPS: Final = (501, 21)
# Outputs whose values differ by less than this part of their size are one value.
_CONSTANT: Final = 1e-6

Shapes = Mapping[str, tuple[int, ...]]


def parity(plan: Path, fp32_onnx: Path, *, graph: str, precision: str, profile: Profile, device: str) -> float:
    """How far an engine is from the fp32 graph in ONNX Runtime on the CPU, at the usual and the largest shapes.

    What is drawn at random, with a fixed seed, is like what a pipeline gives: latents of a standard deviation of one,
    or that of the VAE's own; pictures in [-1, 1]; a prompt of half the length. The largest shapes are of the least
    batch.

    Args:
        plan: the engine.
        fp32_onnx: the graph, with its `config.json` beside it.
        graph: its name.
        precision: of the engine.
        profile: the shapes that the engine's inputs may have.
        device: of torch.

    Returns:
        The relative RMS, ‖engine - graph‖ / ‖graph‖, of the output where it is largest.

    Raises:
        InputError: it is beyond `precision.limit`, or an output is missing, constant or not finite; or a file does not
            load.
    """
    engine = Engine(plan, device)
    types = {it.name: it.type.tensor_type.elem_type for it in skeleton(fp32_onnx).graph.input if it.name in profile}
    reference = OnnxGraph(fp32_onnx, profile.keys(), (), SessionSettings(kernels="function"))
    config = read_json(fp32_onnx.parent / "config.json")
    worst = 0.0
    for shapes in _sets(profile):
        for timestep in _TIMESTEPS if "timestep" in profile else _TIMESTEPS[:1]:
            given = inputs_of(graph, shapes, types, config, timestep)
            expected, found = reference.run(given), engine.run(given)
            if missing := sorted(expected.keys() - found.keys()):
                raise _differs(graph, f"has no output {missing[0]!a:.100}")
            for name, values in expected.items():
                error = _relative_rms(found[name].cpu(), values, graph, name)
                if error > limit(precision, graph):
                    raise _differs(
                        graph,
                        f"is {error:.2g} of {name} from it (relative RMS), and {limit(precision, graph):.2g} is what "
                        f"rounding in {precision} makes",
                    )
                worst = max(worst, error)
    return worst


def inputs_of(
    graph: str, shapes: Shapes, types: Mapping[str, int], config: Mapping[str, Any], timestep: int
) -> dict[str, Tensor]:
    """Inputs like those that a pipeline gives, by name, the same at every call.

    Args:
        graph: the name of the graph.
        shapes: of its inputs.
        types: of its inputs, in ONNX's numbers.
        config: of its network, as diffusers or transformers write it.
        timestep: of the noise.

    Raises:
        InputError: the configuration has no vocabulary, where there are tokens.
    """
    generator = torch.Generator().manual_seed(_SEED)
    inputs = {}
    for name, shape in sorted(shapes.items()):
        if name == "timestep":
            values = torch.full(shape, float(timestep))
        elif name == "time_ids":
            values = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).expand(shape).clone()
        elif types[name] in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            values = _tokens(shape, _vocabulary(config), generator)
        elif graph == "vae_encoder":
            values = 2 * torch.rand(shape, generator=generator) - 1
        else:
            values = torch.randn(shape, generator=generator) * (_latent_scale(config) if graph == "vae_decoder" else 1)
        inputs[name] = values
    return inputs


def _sets(profile: Profile) -> Iterator[Shapes]:
    usual = {name: opt for name, (_, opt, _) in profile.items()}
    largest = {name: (*low[:1], *high[1:]) for name, (low, _, high) in profile.items()}
    yield usual
    if any(largest[name][1:] != opt[1:] for name, opt in usual.items()):
        yield largest


def _tokens(shape: tuple[int, ...], vocabulary: int, generator: torch.Generator) -> Tensor:
    """As CLIP's tokenizers give them: a first token, words, and the end, up to the length. The two are the last ids."""
    tokens = torch.randint(max(vocabulary - 2, 1), shape, generator=generator)
    tokens[..., 0] = vocabulary - 2
    tokens[..., shape[-1] // 2 :] = vocabulary - 1
    return tokens


def _vocabulary(config: Mapping[str, Any]) -> int:
    size = config.get("vocab_size")
    if type(size) is not int or size < 2:
        raise InputError("config.json of a text encoder has no vocab_size; export the model again")
    return size


def _latent_scale(config: Mapping[str, Any]) -> float:
    """Of latents before the pipeline scales them, by the VAE's own factor."""
    factor = config.get("scaling_factor")
    return 1 / factor if isinstance(factor, float) and factor > 0 else 1.0


def _relative_rms(found: Tensor, expected: Tensor, graph: str, name: str) -> float:
    if found.shape != expected.shape:
        raise _differs(graph, f"gives {name} of shape {list(found.shape)}, and not {list(expected.shape)}")
    found, expected = found.double(), expected.double()
    if not found.isfinite().all():
        raise _differs(graph, f"gives {name} that is not finite")
    size = float(expected.norm())
    if not math.isfinite(size) or not size:
        raise InputError(
            f"the fp32 graph of {graph} gives {name} that is not finite, or nothing but 0, so that no engine can be "
            "compared with it; mend the model"
        )
    if found.numel() > 1 and float((found - found.mean()).norm()) <= _CONSTANT * size:
        raise _differs(graph, f"gives {name} that is everywhere the same")
    return float((found - expected).norm()) / size


def _differs(graph: str, how: str) -> InputError:
    return InputError(
        f"the engine of {graph} is not what the fp32 graph is: it {how}; export again with another --precision, and "
        "report it with the version of TensorRT"
    )
