"""Whole validations of `shapes` with weights pruned by hand: what passes, what fails, what cannot be judged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor.edit import Edit, Origin, PatchWeightInput
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export.artifact import making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower, touched_tensors
from bakeout.export.manifest import base_of, file_digest
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.generate import SCHEDULERS
from bakeout.validate import runners, validation
from bakeout.validate.report.schema import Report
from bakeout.validate.tolerances import TABLE
from bakeout.validate.validation import validate

UNET = Path("diffusers/unet")
DRAWN = {
    "components", "runs", "step-parity", "step-parity-worst-prompt", "final-parity", "final-parity-worst-prompt",
    "step-rounding", "drift", "pictures", "detector",
}  # fmt: skip


WHOLE = {
    "files", "edit", "validity", "edit-is-seen", "preservation", "preservation-detector", "reference-pictures",
    "configuration", "weights",
}  # fmt: skip
SOMETIMES = {"interface", "edit-in-graph", "engines", "kept-prompts", "reference"}


def pruned(model: Model, share: float, kinds: tuple[str, ...] = ("ffn2",), concept: str = "star") -> Edit:
    """Weights of every site of some kinds pruned at random."""
    generator = torch.Generator().manual_seed(0)
    operations = tuple(
        PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < share)
        for kind in kinds
        for site in model.sites_of(kind)
    )
    return Edit(operations, (Origin("conceptprune", concept, {"sparsity": share}, "0" * 64, 3),))


def bake(model: Model, name: str, edit: Edit, folder: Path, recipe: dict[str, Any] | None = None) -> Path:
    """Write the artifact of a model and an Edit, for torch."""
    sites = {site.name: site for site in model.sites}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for component, names in touched_tensors(edit, sites).items():
        stored = model.components[component].tensors
        state[component] = {it: load_file(stored[it].file)[it] for it in names}
    plan = plan_diffusers(model)
    facts: dict[str, Any] = {"recipe": recipe or {}, "calibration": {}, "tools": {}}
    with making(folder, plan, force=False) as place:
        write_artifact(place, plan, base_of(model, name), edit, lower(edit, sites, state), facts)
    return folder


def test_the_documentation_names_every_check(root: Path) -> None:
    text = (root / "docs" / "report.md").read_text(encoding="utf-8")
    table = text[text.index("## The checks") : text.index("## In CI")]
    heads = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([a-z-]+)`", " ".join(heads))) == DRAWN | WHOLE | SOMETIMES


def rehash(folder: Path) -> None:
    """Make the manifest say that the files are as they are now: only the maths can tell."""
    path = folder / "bakeout.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for it in manifest["edited"]:
        tensor = load_file(folder / it["file"])[it["name"]]
        it["sha256"] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def shapes_artifact(tmp_path_factory: pytest.TempPathFactory, without: Callable[[str], Edit]) -> Path:
    """`shapes` without stars, for torch; tests that change it work on a copy."""
    model = open_model("shapes")
    return bake(model, "shapes", without("star"), tmp_path_factory.mktemp("baked") / "artifact")


@pytest.fixture
def copy(shapes_artifact: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(shapes_artifact, tmp_path / "artifact")
    return tmp_path / "artifact"


def judge(folder: Path, count: int | None = 2, steps: int = 2, **options: Any) -> Report:
    """The report on as few pictures as there may be."""
    return validate(folder, count=count, steps=steps, device="cpu", **options)[0]


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> Path:
    """An artifact with both targets that is drawn with at once, and may be changed; its Edit moves next to nothing."""
    shutil.copytree(exported, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def judge_small(tiny_model: Path, tmp_path: Path) -> Callable[..., Report]:
    """`judge`, for an artifact that does not know its base or prompts."""
    (tmp_path / "pairs.csv").write_text("a star,a thing\n")
    return partial(judge, base=tiny_model, prompts=tmp_path / "pairs.csv", sessions=SessionSettings(threads=1))


def verdicts(report: Report) -> dict[str, str]:
    return {it.name: it.verdict for it in report.checks}


def failed(report: Report) -> set[str]:
    return {it.name for it in report.checks if it.verdict == "fail"}


@pytest.fixture(scope="module")
def honest(shapes_artifact: Path) -> tuple[Report, dict[str, bytes], list[float]]:
    parts: list[float] = []
    report, pictures = validate(shapes_artifact, count=4, steps=3, seed=9, device="cpu", progress=parts.append)
    return report, pictures, parts


def test_an_honest_artifact_passes(honest, shapes_artifact):
    report, _, _ = honest
    assert set(verdicts(report).values()) == {"pass"}
    assert verdicts(report).keys() == DRAWN | WHOLE
    assert report.manifest == file_digest(shapes_artifact / "bakeout.json")
    assert (report.base, report.erased, report.profile) == ("shapes", ("star (conceptprune)",), "quick")
    assert report.tolerances == TABLE
    assert report.settings == {
        "steps": 3, "guidance": 4.0, "scheduler": "DPMSolverMultistepScheduler", "size": [64, 64], "seeds": "9 to 12",
        "negative_prompt": None, "device": "cpu", "providers": ["CPUExecutionProvider"], "kernels": None,
        "precisions": {"diffusers": "fp32"}, "engines": None,
    }  # fmt: skip


def test_every_model_draws_every_scene(honest):
    report, pictures, _ = honest
    assert [(it.kind, it.seed) for it in report.scenes] == [("erased", 9), ("erased", 10), ("kept", 11), ("kept", 12)]
    assert {tuple(it.drawn) for it in report.scenes} == {("base", "reference", "diffusers")}
    assert {it.file for scene in report.scenes for it in scene.drawn.values()} == pictures.keys()
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    first = report.scenes[0].drawn
    assert pictures[first["reference"].file] == pictures[first["diffusers"].file] != pictures[first["base"].file]


def test_curves_tensors_and_detections_are_told(honest):
    report, _, _ = honest
    assert {(it.model, it.forced, it.kind) for it in report.curves} == {
        (model, forced, kind)
        for model in ("base", "diffusers")
        for forced in (True, False)
        for kind in ("erased", "kept")
    }
    assert all(len(it.relative_rms) == 3 for it in report.curves)
    assert {it.component for it in report.tensors} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert any("one more" in it.call for it in report.tensors)
    assert {(it.model, it.kind) for it in report.detections} == {
        (model, kind) for model in ("base", "reference", "diffusers") for kind in ("erased", "kept")
    }


def test_progress_adds_up_to_one(honest):
    assert sum(honest[2]) == pytest.approx(1)


def test_weights_of_the_base_fail(copy):
    shutil.copy(next((open_model("shapes").path / "unet").glob("*.safetensors")), next((copy / UNET).glob("*.saf*")))
    rehash(copy)
    report = judge(copy)
    assert report.verdict == "fail"
    assert failed(report) >= {"weights", "components", "step-parity", "final-parity", "step-rounding", "pictures"}
    assert {"files", "configuration", "runs"} & failed(report) == set()
    ratio = next(it.measured for it in report.checks if it.name == "final-parity")
    assert ratio == pytest.approx(1)


def test_a_changed_file_fails_and_the_rest_is_still_judged(small, judge_small):
    (path,) = (small / UNET).glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    report = judge_small(small)
    assert failed(report) >= {"files", "weights", "components"}
    assert verdicts(report)["configuration"] == "pass"
    assert {it.verdict for it in report.checks if it.target == "onnx"} == {"pass"}
    assert str(small) not in report.to_json().decode()


@pytest.mark.slow
def test_a_target_that_does_not_load_fails(copy):
    (path,) = (copy / UNET).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    rehash_only_files(copy)
    report = judge(copy)
    assert failed(report) >= {"weights", "runs"}
    assert report.verdict == "fail"
    assert {tuple(it.drawn) for it in report.scenes} == {("base", "reference")}


def rehash_only_files(folder: Path) -> None:
    path = folder / "bakeout.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


@pytest.mark.slow
def test_another_number_of_steps_is_said(copy):
    for path in (copy / "diffusers" / "scheduler").glob("*.json"):
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "_class_name": "HeunDiscreteScheduler"}))
    index = copy / "diffusers" / "model_index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps({**said, "scheduler": ["diffusers", "HeunDiscreteScheduler"]}))
    rehash(copy)
    report = judge(copy)
    assert {"configuration", "runs"} <= failed(report)
    assert "its latents are [3" in next(it.summary for it in report.checks if it.name == "runs")


def test_a_manifest_that_claims_another_concept_fails(small, judge_small):
    path = small / "bakeout.json"
    manifest = json.loads(path.read_text())
    manifest["edits"] = [{"method": "conceptprune", "concept": "heart", "settings": {}, "prompts": "", "pairs": 0}]
    path.write_text(json.dumps(manifest))
    assert failed(judge_small(small, targets=["diffusers"])) == {"edit"}


def test_a_changed_edit_leaves_nothing_to_compare_with(small, judge_small, exported):
    (small / "edit.safetensors").write_bytes(b"x" * 100)
    report = judge_small(small)
    assert report.verdict == "fail"
    assert verdicts(report) == {"files": "fail", "edit": "unjudged"}
    assert report.scenes == ()
    given = judge_small(small, edit=exported / "edit.safetensors", targets=["diffusers"])
    assert failed(given) == {"files"}


def test_an_edit_that_was_left_out_is_asked_for(small, judge_small, exported, tmp_path):
    (small / "edit.safetensors").unlink()
    with pytest.raises(InputError, match="--edit"):
        judge_small(small)
    assert failed(judge_small(small, edit=exported / "edit.safetensors", targets=["diffusers"])) == set()
    pruned(open_model("shapes"), 0.1).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is not the Edit of"):
        judge_small(small, edit=tmp_path / "other.safetensors")


def test_an_edit_that_does_nothing_is_not_judged(tmp_path):
    model = open_model("shapes")
    site = model.sites_of("ffn2")[0]
    mask = torch.zeros(site.d_out, site.d_in, dtype=torch.bool)
    mask[0, 0] = True
    edit = Edit((PatchWeightInput(site.name, mask),), (Origin("conceptprune", "star"),))
    report = judge(bake(model, "shapes", edit, tmp_path / "artifact"))
    assert report.verdict == "unjudged"
    assert [it.name for it in report.checks if it.verdict != "pass"] == ["edit-is-seen"]


@pytest.mark.slow
def test_an_edit_that_was_not_baked_fails_where_it_does_nothing_too(tmp_path):
    model = open_model("shapes")
    folder = bake(model, "shapes", pruned(model, 0.0005), tmp_path / "artifact")
    shutil.copy(next((model.path / "unet").glob("*.safetensors")), next((folder / UNET).glob("*.safetensors")))
    rehash(folder)
    assert "weights" in failed(judge(folder))


@pytest.mark.parametrize(
    "scheduler", ["euler_a", *(pytest.param(it, marks=pytest.mark.slow) for it in SCHEDULERS if it != "euler_a")]
)
def test_any_scheduler_can_be_chosen(shapes_artifact, scheduler):
    report = judge(shapes_artifact, steps=4, guidance=1.0, scheduler=scheduler)
    assert failed(report) == set()
    assert report.settings["scheduler"] == SCHEDULERS[scheduler][0]
    assert report.settings["guidance"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 1}, "count is 1"),
        ({"targets": ["tensorrt"]}, "has no target 'tensorrt'"),
        ({"targets": ["onnx"]}, "run `bakeout export"),
        ({"size": (48, 33)}, "multiples of 16 pixels, for example 48x32"),
        ({"size": (0, 16)}, "must be 1 pixel or more"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5000}, "trained with 1000"),
        ({"scheduler": "none such"}, "no scheduler"),
        ({"seed": -1}, "seed is -1"),
        ({"prompts": "missing.csv"}, "missing.csv"),
        ({"sessions": SessionSettings(("NoProvider",))}, "no 'NoProvider'"),
        ({"base": "no/where.safetensors"}, "does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused(shapes_artifact, options, said):
    with pytest.raises(InputError, match=said):
        judge(shapes_artifact, **options)


def test_another_model_is_no_base(shapes_artifact, tiny_model):
    with pytest.raises(InputError, match="is not the model 'shapes'"):
        judge(shapes_artifact, base=tiny_model)


def test_without_a_manifest_there_is_no_artifact(tmp_path):
    with pytest.raises(InputError, match="is no artifact"):
        judge(tmp_path)


def test_the_profile_is_the_recipe_s_unless_told_otherwise(small, judge_small, monkeypatch):
    path = small / "bakeout.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": {"validation": {"profile": "release"}}}))
    monkeypatch.setattr(validation, "PROFILES", {"quick": 2, "release": 4})
    report = judge_small(small, count=None, targets=["diffusers"])
    assert (report.profile, len(report.scenes)) == ("release", 4)
    assert len(judge_small(small, count=None, profile="quick", targets=["diffusers"]).scenes) == 2


@pytest.mark.slow
def test_of_many_prompts_only_some_are_followed_step_by_step(shapes_artifact, monkeypatch):
    monkeypatch.setattr(validation, "_TRACKED", 1)
    monkeypatch.setattr(validation, "_BATCH", 2)
    report = judge(shapes_artifact, count=6)
    assert report.verdict == "pass"
    assert len(report.scenes) == 6


def test_too_little_memory_for_the_reference_is_no_verdict(shapes_artifact, monkeypatch):
    def short(*_: object) -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(Model, "pipeline", short)
    report = judge(shapes_artifact)
    assert report.verdict == "unjudged"
    assert [it.name for it in report.checks if it.verdict == "unjudged"] == ["reference"]
    assert verdicts(report)["weights"] == "pass"


def test_too_little_memory_for_a_target_is_no_verdict(small, judge_small, monkeypatch):
    def short(*_: object, **__: object) -> None:
        raise InputError("it failed") from RuntimeError("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(validation._Validation, "_load", short)
    report = judge_small(small)
    assert (report.verdict, verdicts(report)["runs"]) == ("unjudged", "unjudged")


def test_without_onnx_runtime_its_target_is_not_judged(small, judge_small, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    report = judge_small(small)
    (check,) = (it for it in report.checks if it.target == "onnx")
    assert (check.name, check.verdict) == ("runs", "unjudged")
    assert "pip install" in check.summary
    assert {it.name for it in report.checks if it.target == "diffusers"} >= {"runs", "components"}


@pytest.mark.parametrize("gives_way", [True, False])
def test_a_provider_that_cannot_start_is_no_verdict(small, judge_small, monkeypatch, gives_way):
    """ONNX Runtime lists a provider whose libraries are missing: then it raises, or the CPU computes in its place."""
    session = onnxruntime.InferenceSession

    def start(path: Path, options: Any, providers: Any) -> Any:
        if not gives_way:
            raise RuntimeError("libcudnn.so.9: cannot open shared object file")
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    report = judge_small(small, targets=["onnx"], sessions=SessionSettings(("CUDAExecutionProvider",)))
    # What the files say needs no provider.
    verdicts = {it.name: it.verdict for it in report.checks if it.target == "onnx"}
    assert verdicts == {"configuration": "pass", "interface": "pass", "weights": "pass", "runs": "unjudged"}
    assert report.verdict == "unjudged"
    (check,) = (it for it in report.checks if it.name == "runs")
    assert "cannot compute in fp32 with CUDAExecutionProvider on this machine" in check.summary


def test_an_edit_that_moves_much_and_erases_nothing_is_not_judged(tmp_path):
    """Every picture is another, and every star is still there."""
    model = open_model("shapes")
    folder = bake(model, "shapes", pruned(model, 0.05), tmp_path / "artifact")
    report = judge(folder)
    assert report.verdict == "unjudged"
    (check,) = (it for it in report.checks if it.verdict != "pass")
    assert check.name == "edit-is-seen"
    assert "does not see that anything was erased" in check.summary


def test_another_size_can_be_drawn(shapes_artifact):
    report = judge(shapes_artifact, size=(48, 64))
    assert failed(report) == set()
    assert report.settings["size"] == [48, 64]


def test_both_targets_of_another_model_are_compared(small, judge_small, tiny_model, tmp_path):
    report = judge_small(small)
    assert failed(report) == set()
    assert report.detector is None
    for target in ("diffusers", "onnx"):
        names = {it.name for it in report.checks if it.target == target}
        assert names >= DRAWN - {"detector"} | {"weights", "configuration"}
    with pytest.raises(InputError, match="--base"):
        judge(small, prompts=tmp_path / "pairs.csv")
    with pytest.raises(InputError, match="--prompts"):
        judge(small, base=tiny_model)


def test_a_reference_that_draws_nothing_is_no_reference(small, judge_small, monkeypatch):
    monkeypatch.setattr(runners, "problem_of_picture", lambda _pixels: "one colour all over")
    report = judge_small(small, targets=["diffusers"])
    assert verdicts(report)["reference-pictures"] == "unjudged"
    assert verdicts(report)["pictures"] == "pass"
    assert report.verdict == "unjudged"
