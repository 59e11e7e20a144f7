"""From the pictures that are to be drawn to the shapes of each graph's inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bakeout.editor.errors import InputError
from bakeout.editor.recipe import MAX_SIZE, Range
from bakeout.export.manifest import Shapes
from bakeout.export.tensorrt.shapes import profile_of, shapes_of

FAMILIES = ("sd1", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sd2", "sdxl")))


def steps(least: int, usual: int, most: int) -> Range:
    return Range(min=least, opt=usual, max=most)


def one(number: int) -> Range:
    return steps(number, number, number)


@pytest.fixture
def copy(onnx_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(onnx_folders("sd1"), tmp_path / "onnx"))


def config(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_word_it_is_one_picture_of_the_models_own_size(
    onnx_folders: Callable[[str], Path], family: str
) -> None:
    folder = onnx_folders(family)
    factor = 2 ** (len(config(folder, "vae_decoder")["block_out_channels"]) - 1)
    own = one(config(folder, "unet")["sample_size"] * factor)
    assert shapes_of(folder, None) == Shapes(batch=one(1), width=own, height=own)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_graph_gets_the_shapes_of_the_pictures(onnx_folders: Callable[[str], Path], family: str) -> None:
    folder = onnx_folders(family)
    factor = 2 ** (len(config(folder, "vae_decoder")["block_out_channels"]) - 1)
    unet, text = config(folder, "unet"), config(folder, "text_encoder")
    unit = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    shapes = shapes_of(
        folder, None, steps(unit, 2 * unit, 3 * unit), steps(2 * unit, 2 * unit, 4 * unit), steps(1, 2, 3)
    )
    wide, high, tokens = unit // factor, 2 * unit // factor, text["max_position_embeddings"]
    channels, width = unet["in_channels"], unet["cross_attention_dim"]
    profile = profile_of(folder, "unet", shapes)
    # Without guidance the UNet sees a picture once, with it twice.
    assert profile["sample"] == (
        (1, channels, high, wide), (4, channels, high, 2 * wide), (6, channels, 2 * high, 3 * wide),
    )  # fmt: skip
    assert profile["encoder_hidden_states"] == ((1, tokens, width), (4, tokens, width), (6, tokens, width))
    assert profile["timestep"] == ((), (), ())
    assert profile_of(folder, "text_encoder", shapes) == {"input_ids": ((1, tokens), (2, tokens), (3, tokens))}
    channels = config(folder, "vae_decoder")["latent_channels"]
    assert profile_of(folder, "vae_decoder", shapes) == {
        "latent_sample": ((1, channels, high, wide), (2, channels, high, 2 * wide), (3, channels, 2 * high, 3 * wide))
    }
    assert profile_of(folder, "vae_encoder", shapes) == {
        "sample": ((1, 3, 2 * unit, unit), (2, 3, 2 * unit, 2 * unit), (3, 3, 4 * unit, 3 * unit))
    }
    if family == "sdxl":
        assert profile["time_ids"] == ((1, 6), (4, 6), (6, 6))
        assert profile_of(folder, "text_encoder_2", shapes) == profile_of(folder, "text_encoder", shapes)


def test_a_side_is_a_multiple_and_the_only_one_where_there_is_one(onnx_folders: Callable[[str], Path]) -> None:
    folder = onnx_folders("sd1")
    usual = shapes_of(folder, None).width.opt
    with pytest.raises(InputError, match=r"sides are multiples of \d+ pixels: 1001 in height is none"):
        shapes_of(folder, None, one(usual), one(1001))
    held = (usual, 2 * usual)
    assert shapes_of(folder, held) == Shapes(batch=one(1), width=one(usual), height=one(2 * usual))
    assert shapes_of(folder, held, batch=steps(1, 2, 3)).batch == steps(1, 2, 3)
    with pytest.raises(InputError, match=f"draws pictures {2 * usual} pixels in height alone: leave {usual} out"):
        shapes_of(folder, held, one(usual), steps(usual, 2 * usual, 2 * usual))


def test_the_largest_batch_is_twice_as_large_with_guidance(onnx_folders: Callable[[str], Path]) -> None:
    folder = onnx_folders("sd1")
    shapes = shapes_of(folder, None, batch=one(MAX_SIZE))
    assert [shape[0] for shape in profile_of(folder, "unet", shapes)["sample"]] == [
        MAX_SIZE, 2 * MAX_SIZE, 2 * MAX_SIZE,
    ]  # fmt: skip


def test_pictures_are_encoded_one_by_one(onnx_folders: Callable[[str], Path]) -> None:
    """Image-to-image would else be refused by engines that draw several pictures at a time at least."""
    folder = onnx_folders("sd1")
    shapes = shapes_of(folder, None, batch=steps(2, 3, 4))
    for graph, name, batches in (("vae_encoder", "sample", [1, 3, 4]), ("vae_decoder", "latent_sample", [2, 3, 4])):
        assert [shape[0] for shape in profile_of(folder, graph, shapes)[name]] == batches


def test_a_size_of_two_sides_is_height_and_width(copy: Path) -> None:
    said = config(copy, "unet")
    usual = shapes_of(copy, None).width.opt
    side = said["sample_size"]
    (copy / "unet" / "config.json").write_text(json.dumps({**said, "sample_size": [2 * side, side]}))
    assert shapes_of(copy, None) == Shapes(batch=one(1), width=one(usual), height=one(2 * usual))


def _shapes_and_profile(folder: Path) -> None:
    profile_of(folder, "unet", shapes_of(folder, None))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet", {"block_out_channels": [1] * 17}),
        ("unet", {"block_out_channels": 4}),
        ("unet", {"sample_size": "512"}),
        ("unet", {"sample_size": None}),
        ("unet", {"sample_size": True}),
        ("unet", {"sample_size": 0}),
        ("unet", {"sample_size": [8, -8]}),
        ("unet", {"sample_size": 10**20}),
        ("vae_decoder", {"block_out_channels": []}),
        ("text_encoder", {"max_position_embeddings": True}),
        ("text_encoder", {"max_position_embeddings": 0}),
    ],
)
def test_a_configuration_of_somebody_else_is_refused(copy: Path, name: str, changes: dict[str, object]) -> None:
    _shapes_and_profile(copy)
    (copy / name / "config.json").write_text(json.dumps({**config(copy, name), **changes}))
    with pytest.raises(InputError, match=f"{name}/config.json is not as bakeout writes it; export the model again"):
        _shapes_and_profile(copy)


def test_what_is_no_graph_is_refused(copy: Path) -> None:
    shapes = shapes_of(copy, None)
    (copy / "unet" / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"unet/model\.onnx is no ONNX graph"):
        profile_of(copy, "unet", shapes)
