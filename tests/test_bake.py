"""From a recipe to an artifact that anyone can load, in Python and on the command line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import bakeout
from bakeout import Artifact, InputError, Recipe, open_model, plot
from bakeout.cli import main
from bakeout.describe import headline
from bakeout.editor import calibrate, methods
from bakeout.editor.edit import Edit, Origin, PatchWeightInput
from bakeout.editor.methods import conceptprune
from bakeout.export.artifact import making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower
from bakeout.export.manifest import base_of
from bakeout.generate import recommended_settings
from bakeout.recipe import open_any, recommended_for
from bakeout.validate.reference import applied

PROMPT = "a plain red circle on grass"


def recipe_text(model: Path | str, concept: str = "star", **settings: object) -> str:
    settings = {"steps": 3, "first_calls": 2, "sparsity": 0.1, **settings}
    return "\n".join(
        [
            f'model = "{model}"',
            "[[edits]]",
            'method = "conceptprune"',
            f'concept = "{concept}"',
            'prompts = { target = "a {concept} {it}", reference = "a thing {it}", lists = { it = ["in", "at"] } }',
            f"settings = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in settings.items())} }}",
        ]
    )


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(tiny_model))
    return path


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An artifact of the tiny model, baked once; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "recipe.toml").write_text(recipe_text(tiny_model))
    Recipe.load(folder / "recipe.toml").bake(folder / "made", device="cpu")
    return folder / "made"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="bakeout")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_recipe_bakes_what_its_method_found(recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    done: list[float] = []
    loaded = Recipe.load(recipe)
    artifact = loaded.bake(tmp_path / "made", device="cpu", progress=done.append)
    assert isinstance(artifact, bakeout.Artifact)
    assert entries(tmp_path) == ["made", "recipe.toml"]
    assert sum(done) == pytest.approx(1)
    artifact.verify()
    base = open_model(tiny_model)
    (wanted,) = loaded.edits
    pairs, settings = wanted.pairs(loaded.folder), wanted.method_settings()
    found = conceptprune.calibrate(base, base.pipeline("cpu", torch.float32), "star", pairs, settings)
    assert found.operations
    assert artifact.edit == found
    own, reference = artifact.load().unet.state_dict(), base.pipeline().unet.state_dict()
    masks = {base.site(it.site).module + ".weight": it.mask for it in found.operations}
    for name, weight in reference.items():
        expected = weight.masked_fill(masks[name], 0) if name in masks else weight
        assert torch.equal(own[name], expected), name
        assert torch.signbit(own[name][own[name] == 0]).equal(torch.signbit(expected[expected == 0]))


def test_the_manifest_has_the_recipe_and_no_folder_of_the_machine(once: Path, tiny_model: Path) -> None:
    manifest = Artifact.open(once).manifest
    assert manifest.recipe["model"] == manifest.base.name == tiny_model.name
    assert manifest.calibration == {"device": "cpu", "dtype": "fp32"}
    assert manifest.tools.keys() >= {"bakeout", "python", "torch", "diffusers", "transformers", "safetensors"}
    (origin,) = manifest.edits
    assert (origin.method, origin.concept, origin.pairs, origin.settings["sparsity"]) == (
        "conceptprune",
        "star",
        2,
        0.1,
    )
    said = (once / "bakeout.json").read_text()
    assert str(tiny_model.parent) not in said
    assert str(once.parent) not in said


def test_the_same_recipe_gives_the_same_bytes_also_in_another_process(once: Path, recipe: Path, tmp_path: Path) -> None:
    Recipe.load(recipe).bake(tmp_path / "again", device="cpu")
    assert content(tmp_path / "again") == content(once)
    command = [sys.executable, "-m", "bakeout", "bake", recipe, "-o", tmp_path / "elsewhere", "--device", "cpu"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert content(tmp_path / "elsewhere") == content(once)
    recipe.write_text(recipe.read_text().replace("star", "ring"))
    Recipe.load(recipe).bake(tmp_path / "other", device="cpu")
    assert content(tmp_path / "other") != content(once)


def test_the_order_of_the_edits_changes_no_byte(tmp_path: Path, tiny_model: Path) -> None:
    one, two = recipe_text(tiny_model, "star"), recipe_text(tiny_model, "ring")
    head, first = one.split("\n", 1)
    second = two.split("\n", 1)[1]
    for name, edits in (("a", [first, second]), ("b", [second, first])):
        (tmp_path / f"{name}.toml").write_text("\n".join([head, *edits]))
        Recipe.load(tmp_path / f"{name}.toml").bake(tmp_path / name, device="cpu")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert {it.concept for it in Artifact.open(tmp_path / "a").manifest.edits} == {"ring", "star"}


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_is_refused_before_anything_is_calibrated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr(conceptprune, "calibrate", lambda *_, **__: pytest.fail("it was calibrated"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").touch()
    with pytest.raises(InputError, match="never overwritten"):
        Recipe.load(recipe).bake(tmp_path / "there", device="cpu", force=force)
    assert entries(tmp_path / "there") == ["precious"]


def test_an_interrupted_bake_goes_on(recipe: Path, once: Path, tmp_path: Path) -> None:
    class Stop(KeyboardInterrupt):
        pass

    done: list[float] = []

    def stop_past_the_middle(part: float) -> None:
        done.append(part)
        if sum(done) > 0.6:
            raise Stop

    with pytest.raises(Stop):
        Recipe.load(recipe).bake(tmp_path / "made", device="cpu", progress=stop_past_the_middle)
    assert entries(tmp_path) == [".made.baking", "recipe.toml"]
    again: list[float] = []
    Recipe.load(recipe).bake(tmp_path / "made", device="cpu", progress=again.append)
    assert again[0] == 0.5, "it began anew"
    assert entries(tmp_path) == ["made", "recipe.toml"]
    assert content(tmp_path / "made") == content(once)


def two_edits(model: Path, *second: tuple[str, object]) -> str:
    return recipe_text(model) + "\n" + recipe_text(model, "ring", **dict(second)).split("\n", 1)[1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [(("sparsity", 1e-4), "sparsity 0.0001 is too small"), (("first_calls", 4), "first_calls is 4, which takes 4")],
)
def test_every_edit_is_checked_before_any_is_calibrated(
    recipe: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[str, object], why: str
) -> None:
    monkeypatch.setattr(calibrate, "observe", lambda *_, **__: pytest.fail("a network ran"))
    recipe.write_text(two_edits(tiny_model, bad))
    done = invoke("bake", recipe, "-o", tmp_path / "made", "--device", "cpu")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: edits[1] (concept 'ring'): {why}")
    assert done.stderr.count("\n") == 1
    assert entries(tmp_path) == ["recipe.toml"]


def test_edits_for_other_sizes_are_refused_before_any_is_calibrated(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "observe", lambda *_, **__: pytest.fail("a network ran"))
    sizes = ({"size": [32, 64]}, {"size": [64, 32]}, {"size": [96, 96], "granularity": "feature"})
    texts = [recipe_text(tiny_model, str(number), steps=2, tau=0.1, **it) for number, it in enumerate(sizes)]
    text = "\n".join([texts[0], *(text.split("\n", 1)[1] for text in texts[1:])])
    text = text.replace('"conceptprune"', '"acterase"')
    for setting in ("first_calls = 2", "sparsity = 0.1"):
        text = text.replace(f", {setting}", "")
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match="the edits are for pictures of 64x32 and 32x64 alone: give all of them one"):
        Recipe.load(tmp_path / "recipe.toml").bake(tmp_path / "made", device="cpu")
    assert entries(tmp_path) == ["recipe.toml"]


def test_a_refusal_while_calibrating_is_that_of_an_edit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("no")

    monkeypatch.setattr(conceptprune, "_mask", refuse)
    with pytest.raises(InputError, match=r"^edits\[0\] \(concept 'star'\): no\b"):
        Recipe.load(recipe).bake(tmp_path / "made", device="cpu")


def test_prompts_that_are_not_there_are_those_of_an_edit(recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    head, _, tail = two_edits(tiny_model).rpartition("prompts = ")
    recipe.write_text(head + 'prompts = { file = "none.csv" }\n' + tail.split("\n", 1)[1])
    with pytest.raises(InputError, match=r"edits\[1\] \(concept 'ring'\): .*none\.csv"):
        Recipe.load(recipe).bake(tmp_path / "made", device="cpu")


@pytest.mark.parametrize("where", ["Model.pipeline", "calibrate.observe", "methods.conceptprune._mask"])
@pytest.mark.parametrize(("dtype", "cure"), [("fp32", "--dtype fp16 or --device cpu"), ("bf16", "--device cpu")])
def test_full_memory_is_one_sentence_wherever_it_happens(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, dtype: str, cure: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bakeout.editor." + where.replace("Model", "model.Model"), full)
    done = invoke("bake", recipe, "-o", tmp_path / "made", "--device", "cpu", "--dtype", dtype)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == (f"Error: the GPU's memory is full: free some of it, or bake with {cure}")


def test_another_sparsity_uses_what_was_calibrated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conceptprune, "_mask", stop)
        with pytest.raises(KeyboardInterrupt):
            Recipe.load(recipe).bake(tmp_path / "made", device="cpu")
    monkeypatch.setattr(calibrate, "observe", lambda *_, **__: pytest.fail("a network ran"))
    recipe.write_text(recipe.read_text().replace("0.1", "0.2"))
    artifact = Recipe.load(recipe).bake(tmp_path / "made", device="cpu")
    assert artifact.manifest.edits[0].settings["sparsity"] == 0.2
    assert entries(tmp_path) == ["made", "recipe.toml"]


def test_an_interrupted_user_is_told_what_is_kept_only_if_it_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = "The same bake, run again, goes on from what was calibrated.\n"

    def ended(where: str, by: BaseException) -> tuple[int, str]:
        def end(*_: object, **__: object) -> None:
            raise by

        with monkeypatch.context() as patched:
            patched.setattr(where, end)
            done = invoke("bake", recipe, "-o", tmp_path / "made", "--device", "cpu")
        assert entries(tmp_path)[-1] == "recipe.toml"
        return done.exit_code, done.stderr

    for early in ("bakeout.editor.model.Model.pipeline", "bakeout.editor.calibrate.observe"):
        assert ended(early, KeyboardInterrupt()) == (130, "Interrupted.\n")
        assert entries(tmp_path) == ["recipe.toml"]
    # The second time it is what the first kept.
    for _ in range(2):
        late = ended("bakeout.editor.methods.conceptprune._mask", KeyboardInterrupt())
        assert late == (130, "Interrupted.\n" + goes_on)
    code, said = ended("bakeout.recipe.write_artifact", OSError(28, "No space left on device"))
    assert (code, said.splitlines(keepends=True)[1:]) == (2, [goes_on])
    # What another recipe kept is of no use.
    recipe.write_text(recipe.read_text().replace("steps = 3", "steps = 4"))
    assert ended("bakeout.editor.calibrate.observe", KeyboardInterrupt()) == (130, "Interrupted.\n")


def test_warnings_come_before_what_ended_the_bake(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(tiny_model, "thing"))
    done = invoke("bake", tmp_path / "recipe.toml", "-o", tmp_path / "made", "--device", "cpu")
    assert done.exit_code == 2
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("Warning: no weight is skilled for 'thing'")
    assert second.startswith("Error: edits[0] (concept 'thing'): there is nothing to erase")


def test_another_method_bakes_as_well(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        Settings = conceptprune.Settings

        @staticmethod
        def unfoldable(settings: Any) -> str | None:
            return None

        @staticmethod
        def latents(pipeline: Any, settings: Any) -> None:
            return None

        @staticmethod
        def check(model: Any, pipeline: Any, settings: Any, *, folder: Path) -> None:
            assert (folder / "recipe.toml").is_file()

        @staticmethod
        def calibrate(model: Any, pipeline: Any, concept: str, pairs: Any, settings: Any, **_: object) -> Edit:
            site = model.sites_of("attn_key")[0]
            mask = torch.zeros(site.d_out, site.d_in, dtype=torch.bool)
            mask[0] = True
            return Edit((PatchWeightInput(site.name, mask),), (Origin("other", concept),))

    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "other": "other_method"})
    monkeypatch.setitem(sys.modules, "other_method", Other)
    recipe.write_text(recipe.read_text().replace('"conceptprune"', '"other"'))
    artifact = Recipe.load(recipe).bake(tmp_path / "made", device="cpu")
    assert [it.method for it in artifact.manifest.edits] == ["other"]
    assert len(artifact.manifest.edited) == 1


def test_on_the_command_line(recipe: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = invoke("bake", recipe, "-o", made, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"{made}: tiny (sd1) without 'star' (conceptprune, 2 pairs)"
    manifest = Artifact.open(made).manifest
    for it in manifest.lowering:
        (line,) = [line for line in lines if line.startswith(f"{it.site} ")]
        assert f" {it.touched:,} " in line
        assert f"{it.touched / it.of:.2%}" in line
        assert re.search(f"folded: {re.escape(it.reason)} +{re.escape(it.cost)}$", line)
    touched, of = (sum(getattr(it, name) for it in manifest.lowering) for name in ("touched", "of"))
    assert lines[len(manifest.lowering) + 3].split() == [
        "in", "all", f"{touched:,}", f"{of:,}", "weights", f"{touched / of:.2%}"
    ]  # fmt: skip
    assert lines[-1] == f"The artifact is {made}; diffusers' from_pretrained loads {made / 'diffusers'}"
    again = invoke("bake", recipe, "-o", made, "--device", "cpu")
    assert again.exit_code == 2
    assert again.stderr.startswith("Error: ")
    assert again.stderr.count("\n") == 1
    assert invoke("bake", recipe, "-o", made, "--device", "cpu", "--force").exit_code == 0


def test_what_is_left_out_and_a_variant_are_told(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "v1-5-pruned.ckpt").touch()
    (base / "x\x1b[2J").touch()
    for path in list(base.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    (tmp_path / "recipe.toml").write_text(recipe_text("base"))
    done = invoke("bake", tmp_path / "recipe.toml", "-o", tmp_path / "made", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "Left out of the base's folder: v1-5-pruned.ckpt, 'x\\x1b[2J'." in done.stdout
    assert 'with variant="fp16"' in done.stdout


def test_nothing_to_erase_is_no_artifact(tiny_model: Path, tmp_path: Path) -> None:
    other = recipe_text(tiny_model, "thing").split("\n", 1)[1]
    for text in (recipe_text(tiny_model, "thing"), "\n".join([recipe_text(tiny_model), other])):
        (tmp_path / "recipe.toml").write_text(text)
        done = invoke("bake", tmp_path / "recipe.toml", "-o", tmp_path / "made", "--device", "cpu")
        assert done.exit_code == 2
        assert done.stderr.startswith("Warning: ")
        assert "(concept 'thing'): there is nothing to erase by these prompts and settings" in done.stderr
        assert not (tmp_path / "made").exists()


def test_an_artifact_is_no_base(once: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(once))
    done = invoke("bake", tmp_path / "recipe.toml", "-o", tmp_path / "made", "--device", "cpu")
    assert done.exit_code == 2
    assert f"is an artifact of bakeout: give {once / 'diffusers'} to edit it further, or" in done.stderr


def test_inspect_draws_a_chart(once: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    done = invoke("inspect", once, "-o", chart)
    assert done.exit_code == 0, done.output
    assert "without 'star'" in done.stdout
    assert done.stdout.endswith(f"The chart is {chart}\n")
    first = chart.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert b"tEXt" not in first
    assert invoke("inspect", once, "-o", chart).exit_code == 2
    assert invoke("inspect", once, "-o", chart, "--force").exit_code == 0
    assert chart.read_bytes() == first
    assert invoke("inspect", once, "-o", tmp_path / "no" / "chart.png").exit_code == 2


def test_a_chart_that_cannot_be_finished_leaves_the_one_that_was_there(
    once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_halfway(lowering: object, title: str, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    chart = tmp_path / "chart.png"
    chart.write_bytes(b"whole")
    monkeypatch.setattr(plot, "draw_touched", stop_halfway)
    done = invoke("inspect", once, "-o", chart, "--force")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr
    assert chart.read_bytes() == b"whole"
    assert entries(tmp_path) == ["chart.png"]
    with pytest.raises(InputError, match=r"is a folder: name a file in it with -o, for example .*chart\.png"):
        plot.write_chart(Artifact.open(once).manifest, tmp_path, force=True)


def test_one_pair_is_no_pairs(once: Path) -> None:
    manifest = Artifact.open(once).manifest
    one = manifest.edits[0].model_copy(update={"pairs": 1})
    assert headline(manifest.model_copy(update={"edits": (one,)})) == "tiny (sd1) without 'star' (conceptprune, 1 pair)"
    assert headline(manifest).endswith("2 pairs)")


def bars(path: Path) -> list[int]:
    """The length in pixels of each bar of a chart, from the top."""
    blue = (np.asarray(Image.open(path).convert("RGB")) == (0x44, 0x77, 0xAA)).all(2).sum(1)
    starts = np.flatnonzero((blue[1:] > 0) & (blue[:-1] == 0)) + 1
    return [int(blue[start + 2]) for start in starts]


def test_the_bars_are_as_long_as_the_shares(tmp_path: Path) -> None:
    from bakeout.export.manifest import Lowering
    from bakeout.plot import draw_touched

    touched = [1, 2, 4, 8]
    lowering = [
        Lowering(
            site=f"unet.down.{n}.ffn2", operation="PatchWeightInput", touched=count, of=100, unit="weights",
            how="folded", reason="", cost="", rounding=0.0,
        )
        for n, count in enumerate(touched)
    ]  # fmt: skip
    draw_touched(lowering, "a $5 bill, 星 and \\alpha_", tmp_path / "chart.png")
    lengths = bars(tmp_path / "chart.png")
    assert len(lengths) == 4
    assert np.allclose(np.array(lengths) / lengths[-1], np.array(touched) / touched[-1], atol=0.02)


def test_prompts_are_read_before_the_model(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bakeout.recipe.open_model", lambda _: pytest.fail("the model was opened"))
    text = recipe.read_text()
    start, end = text.index("prompts = "), text.index("settings = ")
    recipe.write_text(f'{text[:start]}prompts = {{ file = "none.csv" }}\n{text[end:]}')
    with pytest.raises(InputError, match=r"edits\[0\].*none\.csv does not exist"):
        Recipe.load(recipe).bake(tmp_path / "made", device="cpu")


def test_a_chart_is_called_what_it_is(once: Path, tmp_path: Path) -> None:
    done = invoke("inspect", once, "-o", tmp_path / "chart.jpg")
    assert done.exit_code == 2
    assert "let it end in .png" in done.stderr
    assert entries(tmp_path) == []


def test_a_model_has_no_chart(tiny_model: Path, tmp_path: Path) -> None:
    done = invoke("inspect", tiny_model, "-o", tmp_path / "chart.png")
    assert done.exit_code == 2
    assert "is no artifact" in done.stderr


def test_an_artifact_draws_and_one_that_was_changed_does_not(once: Path, tmp_path: Path) -> None:
    def draw(folder: Path) -> Any:
        return invoke(
            "generate", folder, "--prompt", "a", "--steps", 1, "--device", "cpu", "-o", tmp_path / f"{folder.name}-png"
        )

    assert draw(once).exit_code == 0
    assert recommended_for(open_any(once)) == {}
    copy = Path(shutil.copytree(once, tmp_path / "copy"))
    (copy / "diffusers" / "unet" / "diffusion_pytorch_model.bin").touch()
    assert draw(copy).exit_code == 2


def test_what_is_baked_from_a_built_in_model_draws_with_its_settings(tmp_path: Path) -> None:
    model, plan = open_model("shapes"), plan_diffusers(open_model("shapes"))
    with making(tmp_path / "made", plan, force=False) as place:
        nothing = Edit(())
        facts: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}
        write_artifact(place, plan, base_of(model, "shapes"), nothing, lower(nothing, {}, {}), facts)
    opened = open_any(tmp_path / "made")
    assert isinstance(opened, Artifact)
    assert recommended_for(opened) == recommended_for(model) == recommended_settings(model)
    assert recommended_for(opened)["steps"] == 20


def test_a_built_in_name_is_no_artifact(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(once, tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert invoke("inspect", "shapes").stdout.startswith("shapes: sd1, opened as builtin")
    assert "without 'star'" in invoke("inspect", "./shapes").stdout


# Draws one picture as whoever downloads the artifact does, and stops if bakeout is ever imported.
DOWNLOADER = f"""
import sys
class NoBakeout:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bakeout":
            raise SystemExit("bakeout was imported")
sys.meta_path.insert(0, NoBakeout())
import numpy, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True, dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
picture = pipeline({PROMPT!r}, num_inference_steps=4, guidance_scale=4.0, output_type="np",
                   generator=torch.Generator().manual_seed(1)).images
numpy.save(sys.argv[2], picture)
"""


@pytest.fixture
def shapes_edit() -> Callable[[float], Edit]:
    def make(share: float) -> Edit:
        generator = torch.Generator().manual_seed(0)
        operations = [
            PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < share)
            for site in open_model("shapes").sites_of("ffn2")
        ]
        return Edit(tuple(operations), (Origin("conceptprune", "by hand"),))

    return make


def relative_rms(found: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(((found - reference) ** 2).mean() / (reference**2).mean()))


def test_shapes_without_bakeout_draws_what_the_eager_reference_draws(
    shapes_edit: Callable[[float], Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shapes_edit(0.4)
    monkeypatch.setattr(conceptprune, "calibrate", lambda *_, **__: made)
    (tmp_path / "recipe.toml").write_text(recipe_text("shapes"))
    artifact = Recipe.load(tmp_path / "recipe.toml").bake(tmp_path / "made", device="cpu")
    assert artifact.edit == made
    program = tmp_path / "downloader.py"
    program.write_text(DOWNLOADER)
    subprocess.run([sys.executable, program, artifact.folder / "diffusers", tmp_path / "picture.npy"], check=True)
    found = np.load(tmp_path / "picture.npy")

    model = open_model("shapes")
    pipeline = model.pipeline(dtype=torch.float32)

    def draw() -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(1)
        drawn: np.ndarray[Any, Any] = pipeline(
            PROMPT, num_inference_steps=4, guidance_scale=4.0, output_type="np", generator=generator
        ).images
        return drawn

    base = draw()
    with applied(made, model, pipeline):
        reference = draw()
    assert relative_rms(found, reference) < 1e-4
    assert relative_rms(reference, base) > 0.05
    assert relative_rms(found, base) > 0.05
    with applied(shapes_edit(0.2), model, pipeline):
        assert relative_rms(found, draw()) > 0.05
