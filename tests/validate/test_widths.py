"""FFNs of fewer hidden units: what a target may be without, and what must not pass for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bakeout.builtin.shapes.routing import GROUPS, group_of
from bakeout.editor.edit import Edit, Origin, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import MANIFEST, Width, read_manifest
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.export.shrink import cuts_of, kept_units
from bakeout.validate.audit import Parameter, check_weights, names_of, parameters
from bakeout.validate.report.schema import Check
from bakeout.validate.validation import validate
from bakeout.validate.widths import units_of

SITE = "unet.down.0.attn.0.block.0.ffn2"
OTHER = "unet.up.1.attn.0.block.0.ffn2"
WIDTH, MULTIPLE = 64, 8
# Six of those that are constant stay: 0, 1, 4, 5, 8 and 9.
VARYING = [unit for unit in range(WIDTH) if unit % 4 >= 2 and unit < 36]
KEPT = sorted([*VARYING, 0, 1, 4, 5, 8, 9])

Target = dict[Parameter, Tensor]
Sabotage = Callable[[Target], None]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Model:
    return open_model(tiny_model)


def patch(mask: Tensor, site: str = SITE, at: Any = "input", **more: Any) -> PatchActivation:
    value = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    return PatchActivation(site, at, mask, value, **more)


def constant() -> Tensor:
    mask = torch.ones(WIDTH, dtype=torch.bool)
    mask[VARYING] = False
    return mask


def edit_of(base: Model) -> Edit:
    """Two thirds of one FFN's units constant, and some weights of the same FFN pruned."""
    pruned = torch.rand(base.site(SITE).d_out, WIDTH, generator=torch.Generator().manual_seed(2)) < 0.2
    return Edit((patch(constant()), PatchWeightInput(SITE, pruned)))


def place(site: str, name: str) -> Parameter:
    module = f"{site.removesuffix('ffn2')}".replace("unet.", "")
    side, number, _, attention, _, block, _ = module.split(".")
    home = f"{side}_blocks.{number}.attentions.{attention}.transformer_blocks.{block}.ff.net"
    return "unet", f"{home}.{name}"


FFN1, BIAS1 = place(SITE, "0.proj.weight"), place(SITE, "0.proj.bias")
FFN2, BIAS2 = place(SITE, "2.weight"), place(SITE, "2.bias")


def folded(base: Model, edit: Edit) -> Target:
    """Every parameter, as the diffusers folder has it."""
    changed = lower_onto(edit, base).state
    with parameters(base) as read:
        return {
            (component, name): changed.get(component, {}).get(it.locations[name].tensor, read((component, name)))
            for component, it in base.components.items()
            for name in it.locations
        }


def take(target: Target, wide: Target, units: list[int], halves: tuple[list[int], list[int]] | None = None) -> None:
    """Give one FFN certain units of the wide one, or of FFN-1 others for a unit and its gate."""
    values, gates = halves or (units, units)
    rows = torch.tensor([*values, *(unit + WIDTH for unit in gates)])
    target[FFN1], target[BIAS1] = wide[FFN1][rows], wide[BIAS1][rows]
    target[FFN2] = wide[FFN2][:, units]


@pytest.fixture
def wide(base: Model) -> Target:
    return folded(base, edit_of(base))


@pytest.fixture
def target(wide: Target) -> Target:
    """As it must be."""
    narrow = dict(wide)
    take(narrow, wide, KEPT)
    return narrow


def judged(base: Model, target: Target, edit: Edit | None = None, multiple: int = MULTIPLE) -> Check:
    edit = edit_of(base) if edit is None else edit
    units = units_of(edit, base, multiple)
    return check_weights("onnx", base, edit, names_of(base), target.__getitem__, units=units)


def test_what_must_be_there_passes_and_is_told(base: Model, target: Target) -> None:
    check = judged(base, target)
    assert (check.verdict, check.measured) == ("pass", 0)
    assert f"{WIDTH - len(KEPT)} hidden units that are constant are gone, of 1 FFN" in check.summary


def test_the_target_of_the_exporter_is_the_one_of_these_tests(base: Model, target: Target) -> None:
    edit = edit_of(base)
    cuts = cuts_of(kept_units(edit, {it.name: it for it in base.sites}, MULTIPLE), base)["unet"]
    exported = {
        key: cuts[key[1]].of(it) if key[0] == "unet" and key[1] in cuts else it
        for key, it in folded(base, edit).items()
    }
    assert all(torch.equal(it, target[key]) for key, it in exported.items())


@pytest.mark.parametrize("multiple", [0, 1, 64])
def test_another_multiple_is_another_width(base: Model, target: Target, wide: Target, multiple: int) -> None:
    assert judged(base, target, multiple=multiple).verdict == "fail"
    assert judged(base, wide, multiple=multiple).verdict == ("fail" if multiple == 1 else "pass")


def keep(units: list[int]) -> Callable[[Target, Target], None]:
    return lambda target, wide: take(target, wide, units)


def swapped(one: int, other: int) -> list[int]:
    order = list(KEPT)
    order[one], order[other] = order[other], order[one]
    return order


def one_weight_is_back(target: Target, _: Target) -> None:
    target[FFN2][3, KEPT.index(5)] = 1e-6


def a_constant_is_lost(target: Target, _: Target) -> None:
    target[BIAS2] -= 0.01


def only_ffn1_is_narrow(target: Target, wide: Target) -> None:
    target[FFN2] = wide[FFN2]


def only_ffn2_is_narrow(target: Target, wide: Target) -> None:
    target[FFN1], target[BIAS1] = wide[FFN1], wide[BIAS1]


def the_bias_is_wide(target: Target, wide: Target) -> None:
    target[BIAS1] = wide[BIAS1]


def gates_of_other_units(target: Target, wide: Target) -> None:
    take(target, wide, KEPT, (KEPT, [*KEPT[1:], KEPT[0]]))


def units_of_halves(target: Target, wide: Target) -> None:
    """As if FFN-1 had no halves."""
    rows = torch.tensor([*KEPT, *range(WIDTH, WIDTH + len(KEPT))])
    target[FFN1], target[BIAS1] = wide[FFN1][rows], wide[BIAS1][rows]


def another_ffn_is_narrow(target: Target, wide: Target) -> None:
    rows = torch.tensor([*KEPT, *(unit + WIDTH for unit in KEPT)])
    for name in ("0.proj.weight", "0.proj.bias"):
        target[place(OTHER, name)] = wide[place(OTHER, name)][rows]
    target[place(OTHER, "2.weight")] = wide[place(OTHER, "2.weight")][:, KEPT]


def scaled(target: Target, _: Target) -> None:
    """The same function to rounding: what a unit gives is doubled and its column halved."""
    row = KEPT.index(VARYING[0])
    target[FFN1][row] *= 2
    target[BIAS1][row] *= 2
    target[FFN2][:, row] /= 2


SABOTAGES = {
    "a unit too many is gone": keep([unit for unit in KEPT if unit != VARYING[-1]]),
    "a constant unit too many is gone": keep([unit for unit in KEPT if unit != 9]),
    "a unit too few is gone": keep(sorted([*KEPT, 12])),
    "a multiple too few is gone": keep(sorted([*KEPT, 12, 13, 16, 17, 20, 21, 24, 25])),
    "a unit that varies is gone for a constant one": keep(sorted([*(set(KEPT) - {VARYING[0]}), 12])),
    "another constant unit fills up": keep(sorted([*(set(KEPT) - {9}), 12])),
    "the first units": keep(list(range(len(KEPT)))),
    "another order": keep(swapped(0, -1)),
    "a unit twice": keep([KEPT[0], *KEPT[:-1]]),
    "the weight of a constant unit is back": one_weight_is_back,
    "the constant is not in the bias": a_constant_is_lost,
    "FFN-2 is wide": only_ffn1_is_narrow,
    "FFN-1 is wide": only_ffn2_is_narrow,
    "FFN-1's bias is wide": the_bias_is_wide,
    "gates of other units": gates_of_other_units,
    "FFN-1 cut as if it had no halves": units_of_halves,
    "an FFN that is not edited is narrow": another_ffn_is_narrow,
    "other values of the same function": scaled,
}


@pytest.mark.parametrize("sabotage", SABOTAGES.values(), ids=SABOTAGES.keys())
def test_no_other_units_pass(
    base: Model, target: Target, wide: Target, sabotage: Callable[[Target, Target], None]
) -> None:
    assert judged(base, target).verdict == "pass"
    broken = {key: it.clone() for key, it in target.items()}
    sabotage(broken, wide)
    check = judged(base, broken)
    assert check.verdict == "fail"
    assert "ff.net" in check.summary
    assert check.measured


def test_another_edit_fails(base: Model, target: Target) -> None:
    for mask in (constant().roll(1), torch.zeros(WIDTH, dtype=torch.bool)):
        assert judged(base, target, Edit((patch(mask), edit_of(base).operations[0]))).verdict == "fail"
    for operation in edit_of(base).operations:
        assert judged(base, target, Edit((operation,))).verdict == "fail"


STAYING: dict[str, tuple[Any, ...]] = {
    "tokens": (patch(torch.ones(16, WIDTH, dtype=torch.bool), latents=(4, 4)),),
    "rows": (patch(constant(), rows="conditional"),),
    "calls": (patch(constant(), calls=(0, 2)),),
    "in some calls another value": (patch(constant()), patch(constant(), calls=(0, 2))),
    "at the output": (patch(constant()[:16], at="output"),),
    "another kind": (patch(constant()[:16], "unet.down.0.attn.0.block.0.attn_key"),),
    "of a text encoder": (patch(constant()[:32], "text_encoder.layer.0.ffn2"),),
    "FFN-1's output is patched": (patch(constant()), patch(constant().repeat(2), SITE[:-1] + "1", "output")),
    "FFN-1's output is shifted": (patch(constant()), ShiftActivation(SITE[:-1] + "1", torch.ones(2 * WIDTH))),
    "pruned": (PatchWeightInput(SITE, constant().expand(16, -1)),),
}


@pytest.mark.parametrize("operations", STAYING.values(), ids=STAYING.keys())
def test_nothing_may_go_for(base: Model, operations: tuple[Any, ...]) -> None:
    edit = Edit(operations)
    assert units_of(edit, base, 1) == {} == kept_units(edit, {it.name: it for it in base.sites}, 1)
    assert units_of(Edit((patch(constant()),)), base, 1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from((0.05, 0.5, 0.95, 1.1)),
    multiple=st.sampled_from((0, 1, 8, 64)),
)
def test_the_units_are_those_that_an_export_keeps(base: Model, seed: int, share: float, multiple: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edit = Edit(tuple(
        patch(torch.rand(it.d_in, generator=generator) < share, it.name) for it in base.sites_of("ffn2")
    ))  # fmt: skip
    mine, theirs = units_of(edit, base, multiple), kept_units(edit, {it.name: it for it in base.sites}, multiple)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def starless() -> Edit:
    """What units of the UNet of `shapes` that are meant for stars give is a constant."""
    star = GROUPS.index("star")
    return Edit(
        tuple(patch(group_of(torch.arange(it.d_in)) == star, it.name) for it in open_model("shapes").sites_of("ffn2")),
        (Origin("acterase", "star"),),
    )


@pytest.mark.slow
def test_a_whole_validation_of_a_narrow_graph(tmp_path: Path, bake: Callable[..., Path]) -> None:
    folder = bake("shapes", tmp_path / "artifact", starless(), ("onnx",))

    def verdicts(made: Path) -> dict[str, str]:
        report = validate(made, count=2, steps=2, device="cpu", sessions=SessionSettings(threads=1))[0]
        return {it.name: it.verdict for it in report.checks}

    manifest = read_manifest(folder)
    assert manifest.onnx is not None
    assert len(manifest.onnx.widths) == len(open_model("shapes").sites_of("ffn2"))
    honest = verdicts(folder)
    assert {honest[name] for name in ("files", "validity", "weights", "interface", "components", "step-parity")} == {
        "pass"
    }
    name, width = next(iter(manifest.onnx.widths.items()))
    lies = {
        "another multiple": (manifest.onnx.model_copy(update={"shrink": 1}), {"validity", "weights"}),
        "all units": (manifest.onnx.model_copy(update={"shrink": 0, "widths": {}}), {"weights"}),
        "another width": (
            manifest.onnx.model_copy(update={"widths": {**manifest.onnx.widths, name: Width(kept=8, of=width.of)}}),
            {"validity"},
        ),
    }  # fmt: skip
    for number, (claim, caught) in enumerate(lies.values()):
        liar = Path(shutil.copytree(folder, tmp_path / str(number)))
        (liar / MANIFEST).write_bytes(manifest.model_copy(update={"onnx": claim}).to_json())
        found = verdicts(liar)
        assert {check for check in honest if honest[check] == "pass" and found.get(check) != "pass"} == caught
