"""An artifact whose edit differs from token to token, from end to end: it draws at one size, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from bakeout.artifact import Artifact
from bakeout.cli import main
from bakeout.describe import describe_artifact
from bakeout.editor.edit import Edit, Origin, PatchActivation, PatchWeightInput
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export.artifact import Artifact as Exported
from bakeout.export.artifact import making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.graphs import graphs_of
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import Resolution, base_of
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.export.steer import edits_of
from bakeout.kernels.errors import KernelUnavailable
from bakeout.runtime import runtime_for
from bakeout.validate.reference import applied

# Height and width; the model's own are 4 and 4, with 4 pixels each.
LATENTS = (4, 8)
ONE_THREAD = SessionSettings(threads=1)


def patches(model: Model) -> Edit:
    """A third of the hidden units at a constant, others at each token, and some weights of the text encoder pruned."""
    generator = torch.Generator().manual_seed(0)
    operations: list[Any] = []
    for site in model.sites_of("ffn2"):
        height, width = (side // 2 if ".mid." in site.name else side for side in LATENTS)
        mask = torch.rand(height * width, site.d_in, generator=generator) < 0.3
        value = torch.randn(mask.shape, generator=generator)
        operations.append(PatchActivation(site.name, "input", mask, value, LATENTS))
    site = model.sites_of("text_ffn2")[0]
    operations.append(PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < 0.3))
    return Edit(tuple(operations), (Origin("acterase", "a star", {"profile": "paper"}, "0" * 64, 3),))


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of `tiny_model` for pictures of 32x16."""
    model = open_model(tiny_model)
    edit, plan = patches(model), plan_diffusers(model)
    home = tmp_path_factory.mktemp("one-size") / "artifact"
    facts: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}
    with making(home, plan, force=False, targets=("onnx",)) as place:
        base = base_of(model, "tiny")
        write_artifact(place, plan, base, edit, lower_onto(edit, model), facts, ("onnx",))
    return home


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return Artifact.open(folder).load("onnxruntime", sessions=ONE_THREAD)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="bakeout")


def generate(folder: Path, output: Path, *arguments: object) -> Any:
    return invoke("generate", folder, "--prompt", "a", "--steps", 2, "--threads", 1, "-o", output, *arguments)


def values(path: Path) -> NDArray[np.int16]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


def with_resolution(artifact: Artifact, said: Literal["any"] | tuple[int, int]) -> Artifact:
    """The artifact with a manifest that names another size."""
    at = said if said == "any" else Resolution(latent_height=said[0], latent_width=said[1])
    validity = artifact.manifest.validity.model_copy(update={"resolutions": at})
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"validity": validity}))


def test_it_says_its_size(folder: Path) -> None:
    artifact = Artifact.open(folder)
    assert artifact.size == (32, 16)
    assert json.loads((folder / "bakeout.json").read_text())["validity"]["resolutions"] == {
        "latent_height": 4, "latent_width": 8,
    }  # fmt: skip
    # Two sides there are more than all pipelines of diffusers can read.
    assert json.loads((folder / "onnx" / "unet" / "config.json").read_text())["sample_size"] == 4
    said = describe_artifact(artifact)
    assert "\nIt holds at 32x16 pixels only and with any schedule.\nIts limits:\n  - latents of any other size" in said
    assert "any resolution" in describe_artifact(with_resolution(artifact, "any"))


@pytest.mark.parametrize(("latents", "side"), [((8, 8), 8), ((4, 8), 4), (None, 4)])
def test_other_loaders_draw_a_square_size_by_default(tiny_model: Path, latents: Any, side: int) -> None:
    model = open_model(tiny_model)
    site = model.sites_of("ffn2")[0]
    mask = torch.ones((64 if latents == (8, 8) else 32, site.d_in) if latents else (site.d_in,), dtype=torch.bool)
    edit = Edit((PatchActivation(site.name, "input", mask, mask.float(), latents),))
    edits = edits_of(lower_onto(edit, model).remaining, model)
    configs = {graph.name: graph.config for graph in graphs_of(model, edits)}
    assert configs["unet"]["sample_size"] == side


def test_it_draws_at_its_size_what_the_reference_draws(folder: Path, pipeline: Any, tiny_model: Path) -> None:
    settings = {"num_inference_steps": 3, "output_type": "np"}

    def drawn(drawing: Any, **size: int) -> NDArray[np.float64]:
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return np.asarray(drawing(["a", "bc"], generator=seeds, **settings, **size).images, np.float64)

    found = drawn(pipeline)
    assert found.shape == (2, 16, 32, 3)
    model = open_model(tiny_model)
    eager = model.pipeline("cpu", torch.float32)
    base = drawn(eager, height=16, width=32)
    with applied(Artifact.open(folder).edit, model, eager):
        reference = drawn(eager, height=16, width=32)
    scale = np.sqrt(np.square(base - reference).mean())
    assert np.sqrt(np.square(found - reference).mean()) < 1e-4 * scale


@pytest.mark.parametrize("said", [(8, 4), (4, 4), "any"])
def test_a_manifest_that_says_another_size_is_not_loaded(folder: Path, said: Any) -> None:
    wanted = "any size" if said == "any" else f"{said[1]}x{said[0]}"
    with pytest.raises(InputError, match=rf"takes latents of 8x4, and the artifact is for latents of {wanted}; export"):
        with_resolution(Artifact.open(folder), said).load("onnxruntime", sessions=ONE_THREAD)


def test_a_graph_for_any_size_is_not_loaded(exported: Path) -> None:
    artifact = Artifact.open(exported)
    with pytest.raises(InputError, match="takes latents of several sizes, and the artifact is for latents of 8x4"):
        with_resolution(artifact, LATENTS).load("onnxruntime", sessions=ONE_THREAD)
    assert artifact.size is None
    artifact.load("onnxruntime", sessions=ONE_THREAD)


@pytest.mark.parametrize("blocks", [None, [], 3, "abc", [16] * 1000])
def test_a_size_in_pixels_is_not_made_up(folder: Path, blocks: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bakeout.export.artifact.read_json", lambda _: {"block_out_channels": blocks})
    with pytest.raises(InputError, match=r"onnx/vae_decoder/config\.json is not as it was baked"):
        _ = Artifact.open(folder).size


def test_there_are_no_weights_to_load(folder: Path) -> None:
    why = r"has no diffusers/, because its edit is an operation in the graphs, which weights cannot hold: draw with"
    with pytest.raises(InputError, match=why + " what it has, onnx/$"):
        _ = Artifact.open(folder).model


def torch_draws(folder: Path, output: Path, *arguments: object) -> Any:
    return invoke(
        "generate", folder, "--prompt", "a", "--steps", 2, "--runtime", "torch", "--device", "cpu", "-o", output,
        *arguments,
    )  # fmt: skip


def test_torch_draws_the_same_with_the_base(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert generate(folder, tmp_path / "graphs").exit_code == 0
    done = torch_draws(folder, tmp_path / "torch", "--base", tiny_model, "--compare")
    assert done.exit_code == 0, done.output
    assert "drawn by torch (cpu; kernels: reference), each beside" in done.output
    assert np.abs(values(tmp_path / "torch" / "1-0.png") - values(tmp_path / "graphs" / "1-0.png")).max() <= 1
    said = json.loads((tmp_path / "torch" / "pictures.json").read_text())
    assert {name: said[name] for name in ("runtime", "device", "dtype", "kernels")} == {
        "runtime": "torch", "device": "cpu", "dtype": "torch.float32", "kernels": "reference",
    }  # fmt: skip
    # Had the edit been lost, it would be the base's.
    plain = invoke(
        "generate",
        tiny_model,
        "--prompt",
        "a",
        "--steps",
        2,
        "--size",
        "32x16",
        "--device",
        "cpu",
        "-o",
        tmp_path / "base",
    )
    assert plain.exit_code == 0, plain.output
    assert np.abs(values(tmp_path / "base" / "1-0.png") - values(tmp_path / "torch" / "1-0.png")).max() > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a folder of which it knows no place; give that model as the base (--base)"),
        (["--base", "shapes"], "this Edit was made for another model"),
        (["--kernels", "triton"], "the kernels 'triton' need an NVIDIA GPU, and torch draws on cpu"),
        (["--kernels", "library"], "--kernels library belongs to ONNX Runtime, and torch draws"),
        (["--size", "16x32"], "32x16"),
    ],
)
def test_what_torch_cannot_draw_is_one_sentence(
    folder: Path, tiny_model: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    known = ["--base", tiny_model] if arguments and "--base" not in arguments else []
    done = torch_draws(folder, tmp_path / "none", *known, *arguments)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert words in done.output
    assert not (tmp_path / "none").exists()


def test_generate_draws_at_its_size(folder: Path, tmp_path: Path) -> None:
    drawn = []
    for number, arguments in enumerate(([], ["--size", "32x16"], ["--guidance", 1.0, "-n", 3])):
        done = generate(folder, tmp_path / str(number), *arguments)
        assert done.exit_code == 0, done.output
        drawn.append(values(tmp_path / str(number) / "1-0.png"))
        assert drawn[-1].shape == (16, 32, 3)
    assert np.array_equal(drawn[0], drawn[1])


# As many tokens, the model's own, and what no size of the model is.
@pytest.mark.parametrize("size", ["16x32", "16", "17"])
def test_generate_refuses_another_size_before_it_draws(folder: Path, tmp_path: Path, size: str) -> None:
    done = generate(folder, tmp_path / "out", "--size", size)
    asked = size if "x" in size else f"{size}x{size}"
    why = "this edit is for pictures of 32x16 only (latents of 8x4), so leave it out\n"
    assert (done.exit_code, done.output.partition(f"size is {asked}: ")[2]) == (2, why)
    assert not (tmp_path / "out").exists()


def test_a_picture_to_begin_with_becomes_its_size(folder: Path, tmp_path: Path) -> None:
    Image.effect_noise((24, 40), 120).convert("RGB").save(tmp_path / "start.png")
    start = ("--image", tmp_path / "start.png", "--strength", 0.6)
    assert generate(folder, tmp_path / "out", *start).exit_code == 0
    assert values(tmp_path / "out" / "1-0.png").shape == (16, 32, 3)
    assert generate(folder, tmp_path / "other", *start, "--size", "16x32").exit_code == 2


def test_base_and_reference_are_drawn_at_its_size(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = generate(folder, tmp_path, "--compare", "--base", tiny_model)
    assert done.exit_code == 0, done.output
    sheet = values(tmp_path / "1-0-compared.png")
    # Each 32x16, enlarged eight times.
    base, reference, artifact = (
        sheet[43 : 43 + 128, left : left + 256][4::8, 4::8] for left in (16, 32 + 256, 48 + 512)
    )
    assert np.array_equal(artifact, values(tmp_path / "1-0.png"))
    assert np.abs(artifact - reference).max() <= 1
    assert np.abs(artifact - base).max() > 1


def test_validate_draws_at_its_size(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("target,reference\na star,a\nstar b,b\n")
    settings: dict[str, Any] = {
        "base": tiny_model, "prompts": tmp_path / "pairs.csv", "count": 4, "steps": 2, "sessions": ONE_THREAD,
        "device": "cpu",
    }  # fmt: skip
    report = Artifact.open(folder).validate(tmp_path / "report", **settings)
    assert report.settings["size"] == [32, 16]
    components = [it for it in report.checks if it.name == "components"]
    assert [it.verdict for it in components] == ["pass"], components
    # Batches of other sizes and no other latents.
    when = {it.call for it in report.tensors if it.component == "unet"}
    assert any(it.endswith("in a batch of one more") for it in when)
    assert any(it.endswith("the first row alone") for it in when)
    assert not any("half as high" in it for it in when)
    assert any("half as high" in it.call for it in report.tensors if it.component == "vae_decoder")
    with pytest.raises(InputError, match=r"size is 16x32: this edit is for pictures of 32x16 only"):
        Artifact.open(folder).validate(tmp_path / "other", **settings, size=(16, 32))
    assert not (tmp_path / "other").exists()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(kind: str) -> Path:
        raise KernelUnavailable(f"there is no compiler for {kind}; install one")

    monkeypatch.setattr("bakeout.export.op_library.library", unavailable)


@pytest.mark.parametrize(("asked", "used"), [("auto", "library"), ("library", "library"), ("function", "function")])
def test_what_computed_the_patches_is_recorded(folder: Path, tmp_path: Path, asked: str, used: str) -> None:
    done = generate(folder, tmp_path, "--kernels", asked)
    assert done.exit_code == 0, done.output
    assert done.output == f"1 picture in {tmp_path}, drawn by onnxruntime (CPUExecutionProvider; kernels: {used})\n"
    assert json.loads((tmp_path / "pictures.json").read_text())["kernels"] == used
    with Image.open(tmp_path / "1-0.png") as picture:
        assert picture.info["kernels"] == used


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_generate_says_so_and_draws(folder: Path, tmp_path: Path) -> None:
    done = generate(folder, tmp_path / "auto")
    assert done.exit_code == 0
    why = "there is no compiler for cpu; install one"
    assert done.stderr == f"Warning: the edit's operators run as plain ONNX, which can be slower: {why}\n"
    assert json.loads((tmp_path / "auto" / "pictures.json").read_text())["kernels"] == "function"
    done = generate(folder, tmp_path / "asked", "--kernels", "library")
    assert (done.exit_code, done.stderr) == (2, f"Error: {why}; else choose the kernels 'function'\n")
    assert not (tmp_path / "asked").exists()
    done = generate(folder, tmp_path / "function", "--kernels", "function")
    assert (done.exit_code, done.stderr) == (0, "")


def test_kernels_of_the_other_runtime_are_refused(folder: Path, exported: Path, tmp_path: Path) -> None:
    done = generate(folder, tmp_path, "--kernels", "triton")
    assert done.exit_code == 2
    assert "--kernels triton belongs to torch, and onnxruntime draws: leave it out" in done.stderr
    with pytest.raises(InputError, match="--kernels library belongs to ONNX Runtime, and torch draws: leave it out"):
        runtime_for(Artifact.open(exported), "torch", device="cpu", kernels="library")


@pytest.mark.parametrize("kernels", ["auto", "function", "library"])
def test_validate_judges_function_bodies_unless_told_otherwise(
    folder: Path, tiny_model: Path, tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.csv").write_text("target,reference\na star,a\n")
    loaded = []

    def load(artifact: Artifact, runtime: str, *, sessions: SessionSettings) -> Any:
        loaded.append(sessions.kernels)
        return original(artifact, runtime, sessions=sessions)

    original = Exported.load
    monkeypatch.setattr(Exported, "load", load)
    report = Artifact.open(folder).validate(
        tmp_path / "report", base=tiny_model, prompts=tmp_path / "pairs.csv", count=2, steps=1, device="cpu",
        sessions=replace(ONE_THREAD, kernels=kernels),
    )  # fmt: skip
    used = "library" if kernels == "library" else "function"
    assert (report.settings["kernels"], loaded) == (used, [used])
    assert [it.verdict for it in report.checks if it.name == "components"] == ["pass"]


@pytest.mark.usefixtures("no_compiler")
def test_validate_does_not_judge_with_a_library_that_is_not_there(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = invoke("validate", folder, "--base", tiny_model, "--kernels", "library", "-o", tmp_path / "report")
    assert done.exit_code == 2
    assert "there is no compiler for cpu; install one; else choose the kernels 'function'" in done.stderr
    assert not (tmp_path / "report").exists()


def test_inspect_shows_the_patches(folder: Path, tmp_path: Path) -> None:
    done = invoke("inspect", folder, "-o", tmp_path / "chart.png")
    assert done.exit_code == 0, done.output
    edit = Artifact.open(folder).edit
    rows = {line.split()[0]: line for line in done.output.splitlines() if line.startswith(("unet.", "text_encoder."))}
    assert len(rows) == len(edit.operations)
    for operation in edit.operations:
        touched, of, unit = operation.touched
        assert f" {touched:,} " in rows[operation.site]
        assert f" {of:,}  {unit} " in rows[operation.site]
        assert f"  {touched / of:.2%}  " in rows[operation.site]
        assert ("  graph: " in rows[operation.site]) == operation.site.startswith("unet.")
    assert "tokens x features" in done.output
    assert values(tmp_path / "chart.png").size > 0
