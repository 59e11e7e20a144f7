"""`bakeout.json`: a closed schema that trusts nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.export.artifact import Artifact
from bakeout.export.manifest import (
    MANIFEST,
    Lowering,
    Resolution,
    base_of,
    first_states,
    latents_of,
    max_clip_skip,
    read_manifest,
    validity_of,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path], baked: Any) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "artifact"
    baked(folders("sd1"), folder)
    return folder


def change(said: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    here: Any = said
    for key in parents:
        here = here[int(key) if isinstance(here, list) else key]
    here[int(last) if isinstance(here, list) else last] = value


def test_it_reads_what_it_writes(written: Path, tmp_path: Path) -> None:
    manifest = read_manifest(written)
    raw = (written / MANIFEST).read_bytes()
    assert manifest.to_json() == raw
    assert json.loads(raw) == json.loads(json.dumps(json.loads(raw), sort_keys=True))


def test_it_says_what_was_done(written: Path, folders: Callable[[str], Path]) -> None:
    manifest = read_manifest(written)
    model = open_model(folders("sd1"))
    assert manifest.base == base_of(model, "sd1")
    assert [(it.method, it.concept, it.pairs) for it in manifest.edits] == [("conceptprune", "a star", 3)]
    assert {it.site for it in manifest.lowering} == {
        site.name for kind in ("ffn2", "attn_key", "text_ffn2") for site in model.sites_of(kind)
    }
    assert all(0 < it.touched < it.of and it.how == "folded" and it.reason for it in manifest.lowering)
    assert manifest.precision == {"text_encoder": ("BF16",), "unet": ("F16",), "vae": ("F32",)}
    assert {it.base_name for it in manifest.edited} == {model.site(it.site).weight for it in manifest.lowering}
    assert all(it.sha256 != it.base_sha256 for it in manifest.edited)
    assert "2603.06640" in manifest.validity.reveals
    layers = len(model.sites_of("text_layer"))
    assert manifest.validity.hidden_states == {"text_encoder": 1}
    around = f"a clip skip above {layers - 1}, which reads text_encoder's hidden_states.0, before the edit"
    assert around in manifest.validity.bypasses
    assert manifest.validity.limits == ()


def test_it_names_no_folder_of_the_machine(written: Path, tmp_path: Path) -> None:
    assert str(tmp_path.parents[1]) not in (written / MANIFEST).read_text()


def shift(site: str, rows: str = "all") -> ShiftActivation:
    return ShiftActivation(site, torch.ones(2), rows)


def prune(site: str) -> PatchWeightInput:
    return PatchWeightInput(site, torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("operations", "states"),
    [
        ((shift("text_encoder.layer.9"),), {"text_encoder": 10}),
        ((shift("text_encoder.layer.9.ffn2"), shift("text_encoder.layer.10")), {"text_encoder": 11}),
        (
            (shift("text_encoder_2.layer.26"), shift("text_encoder.layer.9")),
            {"text_encoder": 10, "text_encoder_2": 27},
        ),
        ((prune("text_encoder.layer.3.ffn2"), prune("text_encoder.layer.7.ffn2")), {"text_encoder": 4}),
        ((prune("text_encoder.layer.3.ffn2"), shift("text_encoder.layer.1")), {"text_encoder": 4}),
        ((prune("unet.down.0.attn.0.block.0.ffn2"),), {}),
        ((), {}),
    ],
)
def test_the_first_hidden_state_that_an_edit_reaches(operations: Any, states: dict[str, int]) -> None:
    assert first_states(Edit(operations)) == states


# diffusers reads hidden_states[-(clip_skip + 1)], in SDXL's pipelines [-(clip_skip + 2)].
@pytest.mark.parametrize(
    ("family", "layers", "first", "largest"),
    [("sd1", 12, 10, 2), ("sdxl", 12, 10, 1), ("sdxl", 32, 27, 4), ("sd2", 23, 23, 0)],
)
def test_the_largest_clip_skip(family: str, layers: int, first: int, largest: int) -> None:
    assert max_clip_skip(family, layers, first) == largest
    states = list(range(layers + 1))
    offset = 2 if family == "sdxl" else 1
    assert states[-(largest + offset)] == first


def test_where_a_shift_is_weaker_is_said(folders: Callable[[str], Path]) -> None:
    model = open_model(folders("sd1"))
    site = model.sites_of("text_layer")[0].name

    def limits(*operations: Any) -> tuple[str, ...]:
        return validity_of(Edit(operations), model).limits

    assert "the larger the guidance scale is" in limits(shift(site))[0]
    assert limits(shift(site, "prompted"), shift(f"{site}.ffn2", "prompted"))[0].startswith("with a negative prompt")
    assert len(limits(shift(site), shift(site, "prompted"))) == 2
    assert limits(shift("unet.down.0.attn.0.block.0.ffn2"), prune(f"{site}.ffn2")) == ()


def patch(site: str = "unet.down.0.attn.0.block.0.ffn2", latents: Any = None, tokens: int = 0) -> PatchActivation:
    mask = torch.ones((tokens, 2) if tokens else (2,), dtype=torch.bool)
    return PatchActivation(site, "input", mask, mask.float(), latents)


@pytest.mark.parametrize(
    ("operations", "latents"),
    [
        ((), None),
        ((prune("a"), shift("b"), patch("c"), patch("d", tokens=8)), None),
        ((prune("a"), patch("c"), patch("d", (2, 4), 8), patch("e", tokens=2), patch("f", (2, 4), 2)), (2, 4)),
    ],
)
def test_the_latents_that_an_edit_is_for(operations: Any, latents: Any) -> None:
    assert latents_of(Edit(operations)) == latents


def test_an_edit_is_for_one_size_of_latents() -> None:
    edit = Edit((patch("a", (4, 2), 8), patch("b", (2, 4), 8), patch("c", (2, 4), 2)))
    with pytest.raises(InputError, match=r"for latents of 4x2 and 2x4; calibrate all of them at one picture size$"):
        latents_of(edit)


def test_what_holds_for_patches_is_said(folders: Callable[[str], Path]) -> None:
    model = open_model(folders("sd1"))

    def holds(*operations: Any) -> Any:
        return validity_of(Edit(operations), model)

    everywhere, at_one_size = holds(patch()), holds(patch(latents=(2, 4), tokens=8))
    assert (everywhere.resolutions, everywhere.latents, everywhere.limits) == ("any", None, ())
    assert at_one_size.resolutions == Resolution(latent_height=2, latent_width=4)
    assert at_one_size.latents == (2, 4)
    assert at_one_size.limits == ("latents of any other size than 4x2 (width x height) are refused",)
    # What each edit tells and what undoes it, of four.
    zeros, missing, constants = "zeros at known places", "absence from a smaller graph", "constants in the graph"
    merged, quantised, taken_out = "training the model", "quantising the weights", "taking the constants out"
    for validity, tells, undoes in (
        (holds(shift("unet.down.0.attn.0.block.0.ffn2")), (), (merged,)),
        (holds(prune("unet.down.0.attn.0.block.0.ffn2")), (zeros,), (merged, quantised)),
        (everywhere, (missing,), (merged, quantised)),
        (at_one_size, (constants,), (merged, taken_out)),
        (holds(patch(), patch(latents=(2, 4), tokens=8)), (missing, constants), (merged, quantised, taken_out)),
    ):
        assert tuple(it for it in (zeros, missing, constants) if it in validity.reveals) == tells
        assert validity.reveals.endswith("whoever has the base and this model can take the difference")
        assert len(validity.bypasses) == len(undoes)
        assert all(said.startswith(it) for said, it in zip(validity.bypasses, undoes, strict=True))


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_version_is_refused(written: Path, tmp_path: Path, version: object) -> None:
    said = json.loads((written / MANIFEST).read_text())
    said["version"] = version
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(InputError, match="install the bakeout that wrote it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("surprise", 1),
        ("base/surprise", 1),
        ("base/family", "flux"),
        ("base/name", ""),
        ("base/name", "a\x1b[2Jb"),
        ("base/name", "a\u202eb"),
        ("base/name", "a\u2028b"),
        ("validity/reveals", "a\u2029b"),
        ("edited/0/name", "a\u2066b"),
        ("tools", {"a\u200fb": "1"}),
        ("lowering/0/site", "unet down"),
        ("lowering/0/site", "unet.down.0.ffn2\n"),
        ("lowering/0/site", "unet..ffn2"),
        ("lowering/0/site", "unet.dówn"),
        ("lowering/0/touched", 10**9),
        ("edit", "A" * 64),
        ("edit", "0" * 63),
        ("edits/0/pairs", "3"),
        ("edits/0/pairs", -1),
        ("edits", {}),
        ("edited/0/file", "diffusers/../../secret"),
        ("edited/0/file", "/etc/passwd"),
        ("edited/0/file", "diffusers/unet/../config.json"),
        ("edited/0/file", "diffusers/unet/.hidden"),
        ("edited/0/file", "diffusers\\unet\\config.json"),
        ("edited/0/file", "edit.safetensors"),
        ("files", {"diffusers/a\n": {"bytes": 0, "sha256": "0" * 64}}),
        ("files", {"diffusers/unet/x/y": {"bytes": 0, "sha256": "0" * 64}}),
        ("files", {"diffusers/x": {"bytes": -1, "sha256": "0" * 64}}),
        ("lowering/0/how", "by magic"),
        ("lowering/0/operation", "Format"),
        ("lowering/0/of", 0),
        ("lowering/0/touched", True),
        ("lowering/0/reason", "\x07"),
        ("lowering/0/rounding", float("nan")),
        ("recipe/deep", float("inf")),
        ("tools", ["torch"]),
        ("targets", [""]),
        ("targets", ["diffusers", "onnx"]),
        ("targets", ["diffusers", "diffusers"]),
        ("targets", []),
        ("targets", ["onnx"]),
        ("lowering/0/cost", "\x07"),
        ("validity/hidden_states", {"text_encoder": 0}),
        ("validity/hidden_states", {"text_encoder": "10"}),
        ("validity/limits", ["a\nb"]),
        ("validity/resolutions", "some"),
        ("validity/resolutions", None),
        ("validity/resolutions", [64, 64]),
        ("validity/resolutions", {"latent_height": 64}),
        ("validity/resolutions", {"latent_height": 64, "latent_width": 64, "pixels": 512}),
        ("validity/resolutions", {"latent_height": 64, "latent_width": "64"}),
        ("validity/resolutions", {"latent_height": 64, "latent_width": 64.0}),
        ("validity/resolutions", {"latent_height": 64, "latent_width": True}),
        ("validity/resolutions", {"latent_height": 0, "latent_width": 64}),
        ("validity/resolutions", {"latent_height": 64, "latent_width": 1_000_000}),
        # Which a diffusers folder draws beside any other.
        ("validity/resolutions", {"latent_height": 64, "latent_width": 64}),
        ("onnx", {"opset": 20, "precision": "fp32", "tools": {}}),
        ("onnx", {"opset": 20}),
        ("edited/0/file", "onnx/unet/model.onnx"),
        ("files/onnx", {"bytes": 0, "sha256": "0" * 64}),
    ],
)
def test_hostile_values_are_refused_in_a_sentence(written: Path, tmp_path: Path, path: str, value: object) -> None:
    said = json.loads((written / MANIFEST).read_text())
    change(said, path, value)
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(InputError, match="not a whole manifest") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_site_that_a_manifest_names_is_one_that_an_operation_may_have(written: Path) -> None:
    said = json.loads((written / MANIFEST).read_text())["lowering"][0]
    for site in (
        "unet",
        "unet.down.0.ffn2",
        "text_encoder.0",
        "",
        ".",
        "a.",
        ".a",
        "a b",
        "a-b",
        "é",
        "a\n",
        "a\u202e",
    ):
        allowed = True
        try:
            ShiftActivation(site, torch.ones(1))
        except ValueError:
            allowed = False
        try:
            Lowering.model_validate({**said, "site": site})
        except ValueError:
            assert not allowed, site
        else:
            assert allowed, site


def test_a_model_whose_name_cannot_be_printed_has_an_identity(folders: Callable[[str], Path]) -> None:
    model = open_model(folders("sd1"))
    assert base_of(model, "my\u202emodel\n").name == r"'my\u202emodel\n'"
    assert base_of(model, "mein größtes 模型").name == "mein größtes 模型"


@pytest.mark.parametrize("key", ["version", "base", "edit", "edited", "files", "lowering", "validity", "tools"])
def test_a_missing_key_is_refused(written: Path, tmp_path: Path, key: str) -> None:
    said = json.loads((written / MANIFEST).read_text())
    del said[key]
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(InputError):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"version": 1, "recipe": ' + "[" * 900 + "]" * 900 + "}"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError):
        read_manifest(tmp_path)


def test_a_folder_without_one_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no artifact"):
        read_manifest(tmp_path)


def test_the_identity_is_the_same_however_the_files_are_cut(copied: Callable[[str], Path], folders: Any) -> None:
    from safetensors.torch import load_file, save_file

    whole = base_of(open_model(folders("sd1")), "x")
    folder = copied("sd1")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(dict(reversed(tensors.items())), path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    path.unlink()
    assert base_of(open_model(folder), "x") == whole
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)
    other = base_of(open_model(folder), "x")
    assert other.components["unet"] != whole.components["unet"]
    assert other.components["vae"] == whole.components["vae"]


def test_an_artifact_knows_its_base(written: Path, folders: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = Artifact.open(written)
    assert artifact.matches(open_model(folders("sd1")))
    assert not artifact.matches(artifact.model)
    assert not artifact.matches(open_model(folders("sdxl")))
    shutil.copytree(folders("sd1"), tmp_path / "copy")
    assert artifact.matches(open_model(tmp_path / "copy"))


@pytest.mark.usefixtures("tiny_configs")
def test_the_same_weights_in_a_single_file_are_another_base(
    written: Path, single_files: Callable[[str], Path], tmp_path: Path
) -> None:
    assert not Artifact.open(written).matches(open_model(single_files("sd1")))


@pytest.fixture(scope="module")
def served(written: Path) -> dict[str, Any]:
    """A manifest with a target of engines."""
    said = json.loads((written / MANIFEST).read_bytes())
    one = {"min": 1, "opt": 1, "max": 4}
    side = {"min": 512, "opt": 512, "max": 512}
    said["targets"].append("tensorrt")
    said["files"]["tensorrt/unet/model.engine"] = {"bytes": 10, "sha256": "0" * 64}
    said["tensorrt"] = {
        "precision": "fp16", "shapes": {"batch": one, "width": side, "height": side}, "shrink": 8, "widths": {},
        "version": "11.4.0.106", "gpu": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "driver": "580.95",
        "engines": {"unet": {"key": "0" * 64, "layers": 100, "plugins": 16, "doubt": "", "error": 1e-3}},
        "tools": {"onnx": "1"},
    }  # fmt: skip
    return said


def test_a_target_of_engines_is_read(served: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(served))
    manifest = read_manifest(tmp_path)
    assert manifest.tensorrt is not None
    assert (manifest.tensorrt.capability, manifest.tensorrt.shapes.batch.max) == ((9, 0), 4)
    assert json.loads(manifest.to_json()) == served


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tensorrt", None),
        ("targets", ["diffusers"]),
        ("tensorrt/precision", "int8"),
        ("tensorrt/shapes/batch/max", 0),
        ("tensorrt/shapes/batch/min", 5),
        ("tensorrt/shapes/width/max", 10**9),
        ("tensorrt/capability", [9]),
        ("tensorrt/capability", [0, 0]),
        ("tensorrt/engines", {}),
        ("tensorrt/engines/unet/key", "short"),
        ("tensorrt/engines/unet/error", -1.0),
        ("tensorrt/engines/unet/plugins", -1),
        ("tensorrt/gpu", "a\x1b[2Jb"),
        ("tensorrt/widths", {"unet.mid.attn.0.block.0.ffn2": {"kept": 7, "of": 8}}),
        ("files/tensorrt~unet~..~model.engine", {"bytes": 1, "sha256": "0" * 64}),
    ],
)
def test_a_hostile_target_of_engines_is_refused(
    served: dict[str, Any], tmp_path: Path, path: str, value: object
) -> None:
    said = json.loads(json.dumps(served))
    change(said, path, value)
    said["files"] = {name.replace("~", "/"): file for name, file in said["files"].items()}
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(InputError, match="is not a whole manifest"):
        read_manifest(tmp_path)
