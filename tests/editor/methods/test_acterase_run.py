"""How a calibration of ActErase runs: what the UNet does, what is kept in memory and in files, what is left behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bakeout.editor.calibrate import PROMPTS_PER_RUN
from bakeout.editor.errors import InputError
from bakeout.editor.methods import acterase
from bakeout.editor.methods.acterase import Settings, calibrate
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair

# More than the networks draw at a time, and not a multiple of it.
PAIRS = tuple(
    Pair(f"a {word} in the style of ink", f"a photo of a {word}") for word in ("cat", "dog", "car", "bag", "owl")
)
QUICK: dict[str, Any] = {"steps": 3, "tau": 0.1}


def test_the_unet_runs_no_more_than_it_must(tiny: tuple[Model, Any], unet_rows: Any) -> None:
    model, pipeline = tiny
    drawn = [2 * PROMPTS_PER_RUN] * 3 * 2
    for options, looks in (
        ({}, [4, 1]), ({"mask_time": "mean"}, [4, 1] * 3), ({"mask_time": "union", "pairs": "union"}, [1] * 3 * 5),
    ):  # fmt: skip
        with unet_rows(pipeline) as seen:
            calibrate(model, pipeline, "ink", PAIRS, Settings(**{**QUICK, **options}))
        assert seen == drawn + 2 * looks
    with unet_rows(pipeline) as seen:
        calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK, trajectory="independent", guidance=1))
    assert seen == [PROMPTS_PER_RUN] * 3 * 4 + 2 * [4, 1]


@pytest.mark.parametrize(
    "options", [{}, {"mask_time": "union"}, {"mask_time": "per_step", "guidance": 1.0}, {"trajectory": "independent"}]
)
def test_progress_adds_up_to_one(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    parts: list[float] = []
    calibrate(*tiny, "ink", PAIRS, Settings(**{**QUICK, **options}), progress=parts.append)
    assert sum(parts) == pytest.approx(1)
    assert min(parts) > 0


def stop_after(part: float, parts: list[float]) -> Callable[[float], None]:
    def tell(more: float) -> None:
        parts.append(more)
        if sum(parts) > part:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("options", [{}, {"trajectory": "independent", "mask_time": "per_step"}], ids=str)
def test_an_interrupted_calibration_goes_on_where_it_was(
    tiny: tuple[Model, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    unet_rows: Any,
) -> None:
    model, pipeline = tiny
    chosen = Settings(**{**QUICK, "steps": 2, "mask_time": "union", "pairs": "union", **options})
    expected = calibrate(model, pipeline, "ink", PAIRS, chosen)
    # As if saving took no time: every mask is saved.
    monkeypatch.setattr(acterase, "monotonic", lambda: 0.0)
    with unet_rows(pipeline) as whole:
        calibrate(model, pipeline, "ink", PAIRS, chosen)
    run, drawn = chosen.steps * 2 * PROMPTS_PER_RUN, sum(rows for rows in whole if rows > 1)
    for number, part in enumerate((0.45, 0.7, 0.9)):
        work = tmp_path / str(number)
        parts: list[float] = []
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, pipeline, "ink", PAIRS, chosen, work=work, progress=stop_after(part, parts))
        parts.clear()
        with unet_rows(pipeline) as seen:
            resumed = calibrate(model, pipeline, "ink", PAIRS, chosen, work=work, progress=parts.append)
        assert resumed == expected
        assert sum(parts) == pytest.approx(1)
        left, lost = (1 - part) * sum(whole), run if part * sum(whole) < drawn else 2
        assert 0 < sum(seen) <= left + lost


def test_a_finished_calibration_runs_no_network_and_its_drawing_serves_other_masks(
    tiny: tuple[Model, Any], tmp_path: Path, unet_rows: Any
) -> None:
    model, pipeline = tiny
    calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path)
    saved = {it.name for it in tmp_path.iterdir()}
    for options, rows in (
        ({}, []), ({"profile": "paper", "rows": "conditional"}, []), ({"tau": 0.2}, 2 * [4, 1]),
        ({"compare": "target"}, 2 * [4, 1]),
    ):  # fmt: skip
        chosen = Settings(**{**QUICK, **options})
        with unet_rows(pipeline) as seen:
            again = calibrate(model, pipeline, "ink", PAIRS, chosen, work=tmp_path)
        assert seen == rows
        assert again == calibrate(model, pipeline, "ink", PAIRS, chosen)
    # One drawing, and the masks of three readings.
    assert len(saved) == 2
    assert len({*tmp_path.iterdir()}) == 4


def test_concepts_with_the_same_sources_share_their_drawing(
    tiny: tuple[Model, Any], tmp_path: Path, unet_rows: Any
) -> None:
    model, pipeline = tiny
    others = tuple(Pair(f"{pair.target} and oil", pair.reference) for pair in PAIRS)
    calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path)
    with unet_rows(pipeline) as seen:
        found = calibrate(model, pipeline, "oil", others, Settings(**QUICK), work=tmp_path)
    assert seen == 2 * [4, 1]
    assert found == calibrate(model, pipeline, "oil", others, Settings(**QUICK))


@pytest.mark.parametrize(
    "change",
    ["seed", "size", "steps", "guidance", "site", "granularity", "scheduler", "mask_time", "trajectory", "calls",
     "pairs", "signed", "tau_scope", "compare", "targets", "sources", "weights", "the model's scheduler", "broken"],
)  # fmt: skip
def test_what_was_kept_of_something_else_is_not_used(
    tiny_model: Path, tmp_path: Path, change: str, unet_rows: Any
) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float64)
    options, pairs = {**QUICK, "steps": 2, "mask_time": "per_step"}, PAIRS[:2]
    changes: dict[str, Any] = {
        "seed": 1, "size": (24, 16), "steps": 5, "guidance": 2.0, "site": "ffn1_input", "granularity": "feature",
        "scheduler": "model", "mask_time": "union", "trajectory": "independent", "calls": (1, 2), "pairs": "union",
        "signed": True, "tau_scope": "token", "compare": "target",
    }  # fmt: skip
    calibrate(model, pipeline, "ink", pairs, Settings(**options), work=tmp_path)
    if change in changes:
        options[change] = changes[change]
    elif change == "targets":
        pairs = tuple(Pair(f"{pair.target}!", pair.reference) for pair in pairs)
    elif change == "sources":
        pairs = tuple(Pair(pair.target, f"{pair.reference}!") for pair in pairs)
    elif change == "the model's scheduler":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02)
    elif change == "weights":
        with torch.no_grad():
            pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    else:
        for saved in tmp_path.iterdir():
            saved.write_bytes(saved.read_bytes()[:-1])
    with unet_rows(pipeline) as seen:
        found = calibrate(model, pipeline, "ink", pairs, Settings(**options), work=tmp_path)
    assert len(seen) > 0
    assert found == calibrate(model, pipeline, "ink", pairs, Settings(**options))


def test_saving_takes_a_small_part_of_the_time(tiny: tuple[Model, Any], tmp_path: Path, monkeypatch: Any) -> None:
    model, pipeline = tiny
    chosen = Settings(**QUICK, mask_time="union", pairs="union")
    clock, saved = [0.0], []

    def save(path: Path, done: int, tensors: Mapping[str, Tensor]) -> None:
        clock[0] += 1.0
        saved.append(done)

    monkeypatch.setattr(acterase, "save_sums", save)
    # Each of the fifteen masks takes five seconds, saving them one.
    monkeypatch.setattr(acterase, "monotonic", lambda: clock[0])
    monkeypatch.setattr(acterase, "patch_mask", slowed(acterase.patch_mask, clock, len(model.sites_of("ffn2"))))
    calibrate(model, pipeline, "ink", PAIRS, chosen, work=tmp_path)
    assert saved == [1, 5, 9, 13, 15]


def slowed(function: Callable[..., Any], clock: list[float], sites: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        clock[0] += 5 / sites
        return function(*args)

    return run


def test_a_folder_that_cannot_be_written_is_refused(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*: make room there, or choose another output folder$"):
        calibrate(*tiny, "ink", PAIRS, Settings(**QUICK), work=tmp_path / "file")


def test_activations_that_overflow_are_refused_and_not_kept(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", torch.float16)
    with torch.no_grad():
        model.module(pipeline, model.sites_of("ffn1")[0]).weight.mul_(1e4)
    for _again in range(2):
        with pytest.raises(InputError, match=r"unet\.down.*ffn2 are not finite: calibrate in fp32"):
            calibrate(model, pipeline, "ink", PAIRS[:1], Settings(**QUICK), work=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_target_that_overflows_is_refused(tiny: tuple[Model, Any]) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", torch.float32)
    start = pipeline.tokenizer("@").input_ids[1]
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[start] = torch.nan
    with pytest.raises(InputError, match="are not finite: this model draws nothing with these settings"):
        calibrate(model, pipeline, "ink", [Pair("a cat @", "a cat")], Settings(**QUICK))


def state_of(pipeline: Any) -> Any:
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    weights = [value.clone() for network in networks for value in network.state_dict().values()]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for it in networks for module in it.modules()]
    return weights, hooks, dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler)), torch.get_rng_state()


@pytest.mark.parametrize("stops", [0.2, 0.95, 2])
def test_a_pipeline_comes_out_as_it_went_in(tiny_model: Path, stops: float) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    pipeline.scheduler.set_timesteps(7)
    before = state_of(pipeline)
    options = {**QUICK, "trajectory": "independent", "site": "ffn_output"}
    try:
        calibrate(model, pipeline, "ink", PAIRS, Settings(**options), progress=stop_after(stops, []))
    except KeyboardInterrupt:
        assert stops < 1
    after = state_of(pipeline)
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert repr(before[3]) == repr(after[3])
    assert torch.equal(before[4], after[4])


def held(model: Model, pipeline: Any, options: Mapping[str, Any]) -> int:
    """The most bytes of tensors that a calibration holds when the UNet is called, beyond what was there before."""
    most = [0]

    def look(*_: object) -> None:
        tensors = [it for it in gc.get_objects() if type(it) is Tensor]
        most[0] = max(
            most[0], sum({it.untyped_storage().data_ptr(): it.untyped_storage().nbytes() for it in tensors}.values())
        )

    gc.collect()
    # Of what is frozen the collector tells nothing.
    gc.freeze()
    try:
        with pipeline.unet.register_forward_pre_hook(look):
            calibrate(model, pipeline, "ink", PAIRS, Settings(**{**QUICK, **options}))
    finally:
        gc.unfreeze()
    return most[0]


@pytest.mark.parametrize(("mask_time", "pairs"), [("last", "mean"), ("union", "union"), ("mean", "mean")])
def test_of_activations_only_three_sums_and_the_masks_are_kept(tiny_model: Path, mask_time: str, pairs: str) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    options = {"mask_time": mask_time, "pairs": pairs, "size": (64, 64), "guidance": 1.0}
    few, many = (held(model, pipeline, {**options, "steps": steps}) for steps in (2, 4))
    sums = sum(4 * (64 if ".mid." in site.name else 256) * site.d_in for site in model.sites_of("ffn2"))
    # Twice the latents of each call and pair, and texts.
    latents, texts = 2 * len(PAIRS) * 4 * 256 * 4, 100_000
    assert 2 * sums < few < 3.25 * sums + 2 * latents + texts
    assert many - few < (2 * latents if mask_time != "last" else 0) + sums / 8
