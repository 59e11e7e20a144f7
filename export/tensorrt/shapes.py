"""From the pictures that are to be drawn to the shapes that each graph's inputs may have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bakeout.editor.errors import InputError
from bakeout.editor.model_files import read_json
from bakeout.editor.recipe import MAX_SIZE, Range
from bakeout.export.manifest import Shapes
from bakeout.export.tensorrt.skeleton import skeleton

# Input → its least, its usual and its largest shape.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

_MAX_BLOCKS: Final = 16


def shapes_of(
    folder: Path,
    size: tuple[int, int] | None,
    width: Range | None = None,
    height: Range | None = None,
    batch: Range | None = None,
) -> Shapes:
    """Of which pictures to make engines.

    Args:
        folder: of ONNX graphs.
        size: width and height, in pixels, of the only pictures that the model draws; None is any that it can.
        width: in pixels; None is what the model draws unless told otherwise, and so is `height`.
        height: see `width`.
        batch: pictures at a time; None is one.

    Raises:
        InputError: a side is no multiple of what the model can halve, or is not the only one; or a configuration is
            not as bakeout writes it.
    """
    unet = read_json(folder / "unet" / "config.json")
    factor, unit = _factor(folder), 2 ** (_blocks(unet, folder / "unet") - 1)
    usual = size or _default_size(unet, folder, factor)
    if not all(1 <= side <= MAX_SIZE for side in usual):
        raise _odd(folder / "unet")
    sides = {}
    for name, given, own in (("width", width, usual[0]), ("height", height, usual[1])):
        sides[name] = side = given or Range(min=own, opt=own, max=own)
        for pixels in (side.min, side.opt, side.max):
            if size is not None and pixels != own:
                raise InputError(f"this model draws pictures {own} pixels in {name} alone: leave {pixels} out")
            if pixels % (factor * unit):
                raise InputError(
                    f"this model draws pictures whose sides are multiples of {factor * unit} pixels: {pixels} in "
                    f"{name} is none"
                )
    return Shapes(batch=batch or Range(min=1, opt=1, max=1), **sides)


def profile_of(folder: Path, graph: str, shapes: Shapes) -> Profile:
    """The shapes that the inputs of a graph may have.

    Guidance has the UNet see each picture twice, and without it once: its batches go from the least to twice the most.
    Pictures to begin with are encoded one by one where each has a generator of its own, whatever the batch.
    Text is always as long as the encoder can read, as pipelines give it.

    Args:
        folder: of ONNX graphs.
        graph: the name of one of them.
        shapes: of the pictures.

    Raises:
        InputError: the graph does not load, or has a dynamic dimension that no picture tells.
    """
    factor, guided = _factor(folder), 2 if graph == "unet" else 1
    least = 1 if graph == "vae_encoder" else shapes.batch.min
    batch = (least, guided * shapes.batch.opt, guided * shapes.batch.max)
    tokens = read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings")
    if type(tokens) is not int or tokens < 1:
        raise _odd(folder / "text_encoder")
    sizes = {"batch_size": batch, "sequence_length": (tokens,) * 3}
    for name, side in (("width", shapes.width), ("height", shapes.height)):
        sizes[f"sample_{name}"] = pixels = (side.min, side.opt, side.max)
        sizes[name] = sizes[f"latent_{name}"] = (pixels[0] // factor, pixels[1] // factor, pixels[2] // factor)
    profile = {}
    for name, dims in inputs_of(folder / graph / "model.onnx").items():
        if unknown := [dim for dim in dims if isinstance(dim, str) and dim not in sizes]:
            raise InputError(
                f"{folder / graph} has an input {name!a:.100} with a dimension {unknown[0]!a:.100} that the pictures "
                "do not tell; export the model again"
            )
        ranges = [sizes[dim] if isinstance(dim, str) else (dim,) * 3 for dim in dims]
        profile[name] = (
            tuple(least for least, _, _ in ranges),
            tuple(usual for _, usual, _ in ranges),
            tuple(most for _, _, most in ranges),
        )
    return profile


def inputs_of(path: Path) -> dict[str, tuple[int | str, ...]]:
    """The shape of each input of an ONNX graph; a dynamic dimension is its name. Raises InputError if it is none."""
    graph = skeleton(path).graph
    stored = {it.name for it in graph.initializer}
    return {
        it.name: tuple(dim.dim_param or dim.dim_value for dim in it.type.tensor_type.shape.dim)
        for it in graph.input
        if it.name not in stored
    }


def _factor(folder: Path) -> int:
    """How many pixels a latent is wide: each of the VAE's blocks but the last halves a picture."""
    home = folder / "vae_decoder"
    return int(2 ** (_blocks(read_json(home / "config.json"), home) - 1))


def _default_size(unet: Mapping[str, Any], folder: Path, factor: int) -> tuple[int, int]:
    side = unet.get("sample_size")
    height, width = side if isinstance(side, list) and len(side) == 2 else (side, side)
    # To Python true is an integer.
    if type(height) is not int or type(width) is not int:
        raise _odd(folder / "unet")
    return width * factor, height * factor


def _blocks(config: Mapping[str, Any], home: Path) -> int:
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_BLOCKS:
        raise _odd(home)
    return len(blocks)


def _odd(home: Path) -> InputError:
    return InputError(f"{home / 'config.json'} is not as bakeout writes it; export the model again")
