"""Hidden units that are constant are left out: of the right ones, exactly, and of compiled targets only."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bakeout.cli import main
from bakeout.editor.architecture import build
from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.editor.sites import Site
from bakeout.export.artifact import EDIT, Artifact
from bakeout.export.lower import lower, lower_onto
from bakeout.export.manifest import MANIFEST, Width, read_manifest
from bakeout.export.onnx import write_onnx
from bakeout.export.shrink import Cut, cuts_of, kept_units, narrow
from bakeout.validate.reference import applied

MULTIPLES = (1, 8, 64)
FFN = "unet.down.0.attn.0.block.0"
properties = settings(derandomize=True, deadline=None, max_examples=100)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(share: float, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def patches(model: Model, share: float = 0.6, seed: int = 0) -> Edit:
    """Of every FFN a share of the hidden units at values of their own."""
    return Edit(tuple(
        PatchActivation(it.name, "input", chosen(share, it.d_in, seed=seed + number),
                        values(it.d_in, seed=seed + number).float())
        for number, it in enumerate(model.sites_of("ffn2"))
    ))  # fmt: skip


def sites_of(model: Model) -> dict[str, Site]:
    return {it.name: it for it in model.sites}


def ffn(width: int) -> dict[str, Site]:
    """The two Linears of an FFN from 4 features to 3."""
    return {
        f"{FFN}.ffn1": Site(f"{FFN}.ffn1", "ffn1", "unet", "net.0.proj", "w1", "b1", 4, 2 * width),
        f"{FFN}.ffn2": Site(f"{FFN}.ffn2", "ffn2", "unet", "net.2", "w2", "b2", width, 3),
    }


def patch(mask: Tensor, site: str = f"{FFN}.ffn2", at: Any = "input", **more: Any) -> PatchActivation:
    return PatchActivation(site, at, mask, values(*mask.shape).float(), **more)


@properties
@given(st.lists(st.booleans(), min_size=1, max_size=200), st.sampled_from(MULTIPLES))
def test_units_that_vary_stay_and_the_first_constant_ones_fill_the_width(mask: list[bool], multiple: int) -> None:
    kept = kept_units(Edit((patch(torch.tensor(mask)),)), ffn(len(mask)), multiple)
    varying = [unit for unit, constant in enumerate(mask) if not constant]
    width = max(multiple, math.ceil(len(varying) / multiple) * multiple)
    if width >= len(mask):
        assert kept == {}
        return
    spare = [unit for unit, constant in enumerate(mask) if constant][: width - len(varying)]
    assert {name: units.tolist() for name, units in kept.items()} == {f"{FFN}.ffn2": sorted(varying + spare)}
    assert kept[f"{FFN}.ffn2"].dtype == torch.int64


def test_several_edits_count_together() -> None:
    first, second = (torch.tensor([it in own for it in range(16)]) for own in ({0, 1, 5}, {1, 7}))
    for edit in (Edit((patch(first), patch(second))), merge([Edit((patch(second),)), Edit((patch(first),))])):
        assert kept_units(edit, ffn(16), 1)[f"{FFN}.ffn2"].tolist() == [2, 3, 4, 6, *range(8, 16)]


HALF = torch.arange(16) % 2 == 0
STAYING = {
    "nothing may go": (Edit((patch(HALF),)), 0),
    "less than one multiple goes": (Edit((patch(torch.arange(16) < 7),)), 8),
    "nothing is masked": (Edit((patch(torch.zeros(16, dtype=torch.bool)),)), 1),
    "its mask is of tokens": (Edit((patch(HALF.expand(9, 16), latents=(3, 3)),)), 1),
    "one of two masks is of tokens": (Edit((patch(HALF), patch(~HALF.expand(9, 16), latents=(3, 3)))), 1),
    "the prompts' rows only": (Edit((patch(HALF, rows="conditional"),)), 1),
    "some calls only": (Edit((patch(HALF, calls=(0, 3)),)), 1),
    "in some calls another value": (Edit((patch(HALF), patch(HALF, calls=(0, 3)))), 1),
    "at the output": (Edit((patch(HALF[:3], at="output"),)), 1),
    "at FFN-1": (Edit((patch(HALF[:4], f"{FFN}.ffn1"),)), 1),
    "weights are pruned": (Edit((PatchWeightInput(f"{FFN}.ffn2", HALF.expand(3, 16)),)), 1),
    "FFN-1's output is patched": (Edit((patch(HALF), patch(HALF.repeat(2), f"{FFN}.ffn1", "output"))), 1),
    "FFN-1's output is shifted": (Edit((patch(HALF), ShiftActivation(f"{FFN}.ffn1", values(9, 32)))), 1),
}


@pytest.mark.parametrize(("edit", "multiple"), STAYING.values(), ids=STAYING.keys())
def test_an_ffn_keeps_its_width_where(edit: Edit, multiple: int) -> None:
    assert kept_units(edit, ffn(16), multiple) == {}


def test_an_ffn_without_a_bias_keeps_its_width() -> None:
    sites = ffn(16)
    sites[f"{FFN}.ffn2"] = replace(sites[f"{FFN}.ffn2"], bias=None)
    assert kept_units(Edit((patch(HALF),)), sites, 1) == {}
    assert kept_units(Edit((patch(HALF),)), ffn(16), 1)


def test_what_else_is_at_an_ffn_does_not_keep_it_wide() -> None:
    others = (
        patch(HALF[:4], f"{FFN}.ffn1"), PatchWeightInput(f"{FFN}.ffn1", chosen(0.3, 32, 4)),
        PatchWeightInput(f"{FFN}.ffn2", chosen(0.3, 3, 16), values(16)), patch(HALF[:3], at="output"),
        ShiftActivation(f"{FFN}.ffn2", values(3)),
    )  # fmt: skip
    assert kept_units(Edit((patch(HALF), *others)), ffn(16), 8)[f"{FFN}.ffn2"].tolist() == list(range(1, 16, 2))


def test_the_edit_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"no site unet\.mid"):
        kept_units(Edit((patch(HALF, "unet.mid.attn.0.block.0.ffn2"),)), ffn(16), 1)
    with pytest.raises(InputError, match="made for another model"):
        kept_units(Edit((patch(HALF),)), ffn(17), 1)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    return open_model(tiny_model)


@pytest.mark.parametrize(
    ("site", "units"),
    [
        (f"{FFN}.ffn1", [0, 1]),
        ("text_encoder.layer.0.ffn2", [0, 1]),
        (f"{FFN}.ffn2", [1, 0]),
        (f"{FFN}.ffn2", [0, 0]),
        (f"{FFN}.ffn2", [-1, 0]),
        (f"{FFN}.ffn2", [0, 64]),
        (f"{FFN}.ffn2", []),
    ],
)
def test_units_that_no_ffn_has_are_refused(tiny: Model, tmp_path: Path, site: str, units: list[int]) -> None:
    with pytest.raises(ValueError, match=site.replace(".", r"\.")):
        write_onnx(tiny, tmp_path / "made", kept={site: torch.tensor(units, dtype=torch.int64)})
    assert not (tmp_path / "made").exists()


def naive(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """FFN-2 of the GEGLU of FFN-1, a feature at a time; x [n, d]."""
    y = []
    width = w2.shape[1]
    for row in x:
        both = w1 @ row + b1
        hidden = [float(both[j]) * float(both[width + j]) * 0.5 * (1 + math.erf(float(both[width + j]) / math.sqrt(2)))
                  for j in range(width)]  # fmt: skip
        y.append(w2 @ torch.tensor(hidden, dtype=torch.float64) + b2)
    return torch.stack(y)


@properties
@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from((1, 8)), st.sampled_from((0.1, 0.5, 0.9, 1.1)))
def test_a_narrow_ffn_computes_what_the_patch_means(seed: int, width: int, multiple: int, share: float) -> None:
    w1, b1, w2, b2 = values(2 * width, 4, seed=seed), values(2 * width), values(3, width, seed=seed + 1), values(3)
    mask, value, pruned = (
        chosen(share, width, seed=seed),
        values(width, seed=seed + 2),
        chosen(0.3, 3, width, seed=seed),
    )
    edit = Edit((PatchActivation(f"{FFN}.ffn2", "input", mask, value), PatchWeightInput(f"{FFN}.ffn2", pruned)))
    sites, state = ffn(width), {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    new = state | lower(edit, sites, {"unet": state}).state.get("unet", {})
    kept = kept_units(edit, sites, multiple).get(f"{FFN}.ffn2", torch.arange(width))
    both = torch.cat([kept, kept + width])
    x = values(5, 4, seed=seed + 3)
    gate = w1 @ x.T + b1[:, None]
    hidden = (gate[:width] * torch.nn.functional.gelu(gate[width:])).T
    expected = torch.where(mask, value, hidden) @ w2.masked_fill(pruned, 0).T + b2
    found = naive(x, w1[both], b1[both], new["w2"][:, kept], new["b2"])
    assert relative_error(found, expected) <= 1e-13


FAMILIES = ("sd1", "sd2", "sdxl")


def compositions(model: Model) -> dict[str, Edit]:
    """Patches of features alone, of two concepts, and with every other edit that folds in the same layers."""
    generator = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.2

    beside = [
        operation
        for ffn2 in model.sites_of("ffn2")
        for ffn1 in [model.site(ffn2.name.replace("ffn2", "ffn1"))]
        for operation in (
            PatchWeightInput(ffn2.name, some(ffn2.d_out, ffn2.d_in)),
            PatchWeightInput(ffn2.name, some(ffn2.d_out, ffn2.d_in), values(ffn2.d_in)),
            PatchActivation(ffn2.name, "output", some(ffn2.d_out), values(ffn2.d_out)),
            ShiftActivation(ffn2.name, values(ffn2.d_out)),
            PatchWeightInput(ffn1.name, some(ffn1.d_out, ffn1.d_in)),
            PatchActivation(ffn1.name, "input", some(ffn1.d_in), values(ffn1.d_in)),
        )
    ]
    return {
        "one concept": patches(model),
        "two concepts": Edit((*patches(model, 0.3).operations, *patches(model, 0.3, seed=99).operations)),
        "with others": Edit((*patches(model).operations, *beside)),
        "every unit": patches(model, 1.1),
    }


def evaluate(unet: Any, family: str) -> Tensor:
    config = unet.config
    more = None
    if family == "sdxl":
        more = {"text_embeds": values(2, 40), "time_ids": torch.tensor([[16.0, 32, 0, 1, 16, 48]] * 2).double()}
    with torch.no_grad():
        found: Tensor = unet(
            values(2, 4, 8, 8), 300, values(2, 77, config.cross_attention_dim), added_cond_kwargs=more
        )[0]
    return found


@cache
def in_fp64(folder: Path) -> tuple[Model, Any]:
    """A model and its pipeline, with values at which every unit matters."""
    model = open_model(folder)
    pipeline = model.pipeline(dtype=torch.float64)
    for number, parameter in enumerate(pipeline.unet.parameters()):
        parameter.data = parameter.data + 0.1 * values(*parameter.shape, seed=number)
    return model, pipeline


def narrowed(model: Model, state: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> Any:
    component = model.components["unet"]
    network = build(component.class_name, component.config).eval()
    narrow(network, cuts)
    part = {name: cuts[name].of(tensor) if name in cuts else tensor for name, tensor in state.items()}
    network.load_state_dict(part, assign=True)
    return network


@pytest.mark.parametrize("name", ["one concept", "two concepts", "with others", "every unit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_unet_computes_what_hooks_on_the_base_do(family: str, name: str, folders: Any) -> None:
    model, pipeline = in_fp64(folders(family))
    edit, sites = compositions(model)[name], sites_of(model)
    state = pipeline.unet.state_dict()
    stored = {location.tensor: state[key] for key, location in model.components["unet"].locations.items()}
    new = stored | lower(edit, sites, {"unet": stored}).state["unet"]
    folded = {key: new[location.tensor] for key, location in model.components["unet"].locations.items()}
    with applied(edit, model, pipeline):
        expected = evaluate(pipeline.unet, family)
    assert relative_error(evaluate(pipeline.unet, family), expected) > 1e-3
    for multiple in (1, 8):
        kept = kept_units(edit, sites, multiple)
        assert kept.keys() == {it.name for it in model.sites_of("ffn2")}
        found = evaluate(narrowed(model, folded, cuts_of(kept, model)["unet"]), family)
        assert relative_error(found, expected) <= 1e-13
        # As many units, but the first ones.
        others = {site: torch.arange(len(units)) for site, units in kept.items()}
        wrong = evaluate(narrowed(model, folded, cuts_of(others, model)["unet"]), family)
        assert (relative_error(wrong, expected) > 1e-6) == (name != "every unit")


def only_unet(model: Model) -> Model:
    return replace(model, components={"unet": model.components["unet"]}, parts={})


def graph(folder: Path) -> Any:
    return onnx.load(folder / "unet" / "model.onnx")


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "unet" / "model.onnx", providers=["CPUExecutionProvider"])


def feed(model: Model) -> dict[str, Tensor]:
    config, xl = model.components["unet"].config, model.family == "sdxl"
    more = {"text_embeds": values(3, 40), "time_ids": torch.tensor([[16.0, 32, 0, 1, 16, 48]] * 3)} if xl else {}
    given = {"sample": values(3, 4, 16, 8), "timestep": torch.tensor(300.0),
             "encoder_hidden_states": values(3, 77, config["cross_attention_dim"]), **more}  # fmt: skip
    return {name: it.float() for name, it in given.items()}


@torch.no_grad()
def answer(unet: Any, model: Model) -> Tensor:
    given = feed(model)
    more = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    found: Tensor = unet(*given.values(), added_cond_kwargs=more).sample
    return found


def run(folder: Path, model: Model) -> Tensor:
    (found,) = session(folder).run(None, {name: it.numpy() for name, it in feed(model).items()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("family", ["tiny", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_narrow_graph_is_the_same_graph_and_smaller(
    family: str, tiny_model: Path, folders: Any, tmp_path: Path
) -> None:
    model = open_model(tiny_model if family == "tiny" else folders(family))
    sites, edit = sites_of(model), compositions(model)["with others"]
    changed = lower_onto(edit, model).state
    write_onnx(only_unet(model), tmp_path / "wide", changed=changed)
    wide, expected = graph(tmp_path / "wide"), run(tmp_path / "wide", model)
    pipeline = model.pipeline(dtype=torch.float32)
    with applied(edit, model, pipeline):
        hooked = answer(pipeline.unet, model)
    # Half precision, in which one of them is stored, rounds the biases.
    assert (
        relative_error(expected, hooked)
        <= (1e-5 if family == "tiny" else 1e-3)
        < relative_error(answer(pipeline.unet, model), hooked)
    )
    size = (tmp_path / "wide/unet/model.onnx").stat().st_size
    for multiple in (64, 8) if family == "tiny" else (8,):
        kept = kept_units(edit, sites, multiple)
        done: list[float] = []
        write_onnx(only_unet(model), tmp_path / str(multiple), done.append, changed=changed, kept=kept)
        found = graph(tmp_path / str(multiple))
        assert [(it.op_type, it.name) for it in found.graph.node] == [(it.op_type, it.name) for it in wide.graph.node]
        assert [it.name for it in found.graph.initializer] == [it.name for it in wide.graph.initializer]
        shapes = {it.name: tuple(it.dims) for it in found.graph.initializer}
        for name, units in kept.items():
            ffn1, ffn2 = model.site(name.replace("ffn2", "ffn1")), model.site(name)
            assert len(units) % multiple == 0 < len(units) < ffn2.d_in
            assert shapes[str(ffn1.weight)] == (2 * len(units), ffn1.d_in)
            assert shapes[str(ffn1.bias)] == (2 * len(units),)
            assert shapes[str(ffn2.weight)] == (ffn2.d_out, len(units))
        assert relative_error(run(tmp_path / str(multiple), model), expected) <= 2e-6
        assert sum(done) == pytest.approx(1)
        smaller = (tmp_path / str(multiple) / "unet/model.onnx").stat().st_size
        gone = sum((sites[name].d_in - len(units)) * (3 * sites[name].d_out + 2) for name, units in kept.items())
        # Every site has as many features going in as out; what says the shapes takes some bytes, too.
        assert abs(size - smaller - 4 * gone) <= 4 * len(wide.graph.node)
        assert gone > 0


@pytest.fixture(scope="module")
def shrunk(
    tmp_path_factory: pytest.TempPathFactory, tiny: Model, tiny_model: Path, baked: Callable[..., Artifact]
) -> Path:
    """The artifact of patches, with both targets. Made once; who changes it takes a copy."""
    folder = tmp_path_factory.mktemp("shrunk") / "artifact"
    return baked(tiny_model, folder, patches(tiny), targets=("diffusers", "onnx")).folder


@pytest.fixture
def copy(shrunk: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shrunk, tmp_path / "artifact"))


def digests(folder: Path) -> dict[str, str]:
    return {name: it.sha256 for name, it in read_manifest(folder).files.items()}


def test_the_manifest_says_how_many_units_are_there(shrunk: Path, tiny: Model) -> None:
    how = read_manifest(shrunk).onnx
    assert how is not None
    kept = kept_units(patches(tiny), sites_of(tiny), 8)
    assert how.shrink == 8
    assert how.widths == {name: Width(kept=len(units), of=tiny.site(name).d_in) for name, units in kept.items()}
    assert how.widths.keys() == {it.name for it in tiny.sites_of("ffn2")}


def test_the_diffusers_folder_keeps_its_shapes(shrunk: Path, tiny: Model) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(shrunk / "diffusers", dtype=torch.float32)
    for site in tiny.sites_of("ffn2"):
        assert pipeline.unet.get_parameter(f"{site.module}.weight").shape == (site.d_out, site.d_in)
    config = json.loads((shrunk / "onnx/unet/config.json").read_text())
    assert config["block_out_channels"] == [16, 32]


def test_the_same_graph_comes_of_the_baked_model_and_of_base_and_edit(
    shrunk: Path, tiny: Model, tiny_model: Path, tmp_path: Path, baked: Callable[..., Artifact]
) -> None:
    again = baked(tiny_model, tmp_path / "again", patches(tiny), targets=("onnx",))
    own = {name: it for name, it in digests(shrunk).items() if name.startswith("onnx/")}
    assert digests(again.folder) == own


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What is written in place of graphs is nearly nothing; how many units of which FFN were to stay, each time."""
    asked: list[dict[str, int]] = []

    def write(model: Model, folder: Path, *_: object, kept: Mapping[str, Tensor], **__: object) -> None:
        asked.append({name: len(units) for name, units in kept.items()})
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps(asked[-1]))

    monkeypatch.setattr("bakeout.export.onnx.write_onnx", write)
    return asked


def test_an_export_shrinks_as_the_recipe_says_unless_told(copy: Path, tiny: Model, quick: list[dict[str, int]]) -> None:
    for told, multiple in ((64, 64), (1, 1), (0, 0), (None, 8)):
        how = Artifact.open(copy).export("onnx", shrink=told, force=True).manifest.onnx
        assert how is not None
        widths = {name: len(units) for name, units in kept_units(patches(tiny), sites_of(tiny), multiple).items()}
        assert (how.shrink, {name: it.kept for name, it in how.widths.items()}, quick[-1]) == (multiple, widths, widths)
    assert len({len(it) for it in quick}) == 3
    said = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**said, "recipe": {**said["recipe"], "shrink": 1}}))
    how = Artifact.open(copy).export("onnx", force=True).manifest.onnx
    assert how is not None
    assert how.shrink == 1


@pytest.mark.parametrize("bad", [2, -8, 128, True, 8.0, "8"])
def test_no_other_multiple_will_do(copy: Path, bad: Any) -> None:
    before = digests(copy)
    with pytest.raises(InputError, match="choose of 0, 1, 8, 64"):
        Artifact.open(copy).export("onnx", shrink=bad, force=True)
    said = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**said, "recipe": {"shrink": bad}}))
    with pytest.raises(InputError, match="choose of 0, 1, 8, 64"):
        Artifact.open(copy).export("onnx", force=True)
    assert digests(copy) == before


SITES = ("unet.down.0.attn.0.block.0.ffn2", "unet.mid.attn.0.block.0.ffn2")
CLAIMS: dict[str, dict[str, Any]] = {
    "another multiple": {"shrink": 2},
    "no number": {"shrink": True},
    "nothing": {"shrink": None},
    "a width that is no multiple": {"shrink": 64},
    "a width where none may go": {"shrink": 0},
    "all units": {"widths": {SITES[0]: {"kept": 64, "of": 64}}},
    "no unit": {"widths": {SITES[0]: {"kept": 0, "of": 64}}},
    "no site": {"widths": {"../ffn2": {"kept": 8, "of": 64}}},
    "another key": {"widths": {SITES[0]: {"kept": 8, "of": 64, "in": 4}}},
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_a_manifest_that_claims_otherwise_is_none(copy: Path, claim: dict[str, Any]) -> None:
    said = json.loads((copy / MANIFEST).read_text())
    assert read_manifest(copy).onnx is not None
    (copy / MANIFEST).write_text(json.dumps({**said, "onnx": {**said["onnx"], **claim}}))
    with pytest.raises(InputError, match="not a whole manifest"):
        read_manifest(copy)


def test_a_mask_of_tokens_elsewhere_stays_in_the_graph(tiny: Model, tmp_path: Path) -> None:
    """Of one FFN units are left out, in another the same graph patches some at some tokens."""
    first, other = (tiny.site(f"unet.{block}.attn.0.block.0.ffn2") for block in ("down.0", "up.1"))
    whole = PatchActivation(first.name, "input", chosen(0.6, first.d_in), values(first.d_in).float())
    tokens = PatchActivation(
        other.name, "input", chosen(0.3, 128, other.d_in), values(128, other.d_in).float(), latents=(16, 8)
    )
    edit = Edit((whole, tokens))
    lowered, kept = lower_onto(edit, tiny), kept_units(edit, sites_of(tiny), 8)
    assert kept.keys() == {first.name}
    assert [it.site for it in lowered.remaining.operations] == [other.name]
    write_onnx(only_unet(tiny), tmp_path / "made", changed=lowered.state, remaining=lowered.remaining, kept=kept)
    pipeline = tiny.pipeline(dtype=torch.float32)
    for part in ((whole,), (tokens,), (whole, tokens)):
        with applied(Edit(part), tiny, pipeline):
            error = relative_error(run(tmp_path / "made", tiny), answer(pipeline.unet, tiny))
        assert (error <= 1e-5) == (len(part) == 2)


def test_without_the_edit_nobody_knows_what_can_go(copy: Path, quick: list[dict[str, int]]) -> None:
    (copy / EDIT).unlink()
    with pytest.raises(InputError, match=r"released without its edit\.safetensors.* --shrink 0"):
        Artifact.open(copy).export("onnx", force=True)
    how = Artifact.open(copy).export("onnx", shrink=0, force=True).manifest.onnx
    assert how is not None
    assert how.widths == {} == quick[-1]


def test_the_command_line_tells_what_went(copy: Path, quick: object, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = capsys.readouterr()
        assert ended.value.code == (2 if "Error" in captured.err else 0)
        return captured.out + captured.err

    line = "hidden units of 4 FFNs, constant by the edit"
    assert line in said("inspect", str(copy))
    assert line in said("export", str(copy), "--target", "onnx", "--shrink", "1", "--force")
    assert line not in said("export", str(copy), "--target", "onnx", "--shrink", "0", "--force")
    assert line not in said("inspect", str(copy))
    assert "choose of 0, 1, 8, 64" in said("export", str(copy), "--target", "onnx", "--shrink", "3", "--force")
