"""The settings of ActErase: profiles, what does not go together, what does not fit a model, what cannot be baked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bakeout.editor.errors import InputError
from bakeout.editor.methods import acterase, method
from bakeout.editor.methods.acterase import Settings, calibrate
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair

PAIRS = (Pair("a cat in the style of ink", "a photo of a cat"),)
QUICK: dict[str, Any] = {"steps": 3, "tau": 0.1}
FEATURE: dict[str, Any] = {"granularity": "feature"}


def test_settings_take_a_profile_and_what_is_given_wins() -> None:
    paper, portable = Settings(), Settings(profile="portable")
    assert paper.model_dump() == {
        "profile": "paper", "site": "ffn2_input", "importance": "column", "signed": False, "tau": 0.01,
        "tau_mode": "fraction", "tau_scope": "layer", "compare": "source", "granularity": "token", "mask_time": "last",
        "pairs": "mean", "trajectory": "shared", "rows": "all", "calls": None, "steps": 30, "guidance": 7.5, "seed": 0,
        "scheduler": "dpm-solver", "size": None,
    }  # fmt: skip
    assert portable == Settings(**{**paper.model_dump(), "profile": "portable", "granularity": "feature"})
    assert Settings(profile="portable", granularity="token").granularity == "token"
    assert Settings(site="ffn_output").importance == "row"
    assert Settings(size=[512, 768], calls=[0, 3]) == Settings(size=(512, 768), calls=(0, 3))
    assert method("acterase").Settings is Settings


@pytest.mark.parametrize(
    "bad",
    [
        {"profile": "mine"}, {"profile": ["paper"]}, {"tau": 0}, {"tau": -1}, {"tau": float("nan")}, {"tau": "0.1"},
        {"tau": float("inf"), "tau_mode": "absolute"}, {"site": "ffn2"}, {"rows": "both"}, {"steps": 0},
        {"guidance": -1}, {"guidance": float("inf")}, {"seed": -1}, {"seed": 2**63}, {"calls": [1]},
        {"calls": [0.0, 2]}, {"size": 512}, {"size": [512.0, 512]}, {"size": [512, 512, 512]},
        {"signed": 1}, {"tao": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Settings(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"importance": "row"}, 'importance is "row", .* take "column" or "edge"'),
        ({"site": "ffn_output", "importance": "column"}, 'importance is "column", .* take "row"'),
        ({"site": "ffn_output", "importance": "edge", **FEATURE}, 'take "row"'),
        ({"importance": "edge"}, 'a weight is the same at every token: take granularity "feature"'),
        ({"importance": "edge", **FEATURE, "rows": "conditional"}, 'take importance "column", or rows "all"'),
        ({"importance": "edge", **FEATURE, "calls": [0, 1]}, "no calls"),
        ({"importance": "edge", **FEATURE, "mask_time": "per_step"}, "another mask_time"),
        ({"tau_scope": "token", **FEATURE}, 'take granularity "token"'),
        ({"tau_scope": "token", "tau_mode": "absolute"}, 'tau_mode "fraction"'),
        ({"tau": 1.5}, 'take at most 1, or tau_mode "absolute"'),
        ({"calls": [2, 2]}, "calls holds no call"),
        ({"calls": [-1, 2]}, "calls holds no call"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0001}, r"tau 0\.0001 is too small: of \d+ importances of unet\.\S+ it takes none; take at least"),
        ({"tau": 0.01, **FEATURE}, r"of 64 importances of unet\.\S+ it takes none; take at least 0\.015625"),
        ({"tau": 0.01, "tau_scope": "token"}, "of 64 importances"),
        ({"tau": 0.01, "site": "ffn_output", **FEATURE}, "of 16 importances"),
        ({"tau": 0.0001, "importance": "edge", **FEATURE}, "of 1024 importances"),
        ({"steps": 5000}, "steps is 5000: this model was trained with 1000, so use at most as many"),
        ({"size": [20, 16]}, "size is 20 x 16, .* in multiples of 8 pixels up to 2048: take 16 x 16"),
        ({"size": [0, 16]}, "take 8 x 16"),
        ({"size": [16, -16]}, "take 16 x 8"),
        ({"size": [4096, 16]}, "take 2048 x 16"),
        ({"calls": [0, 5]}, "calls ends at 5, but 3 steps make 3 calls of the UNet"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    tiny: tuple[Model, Any], options: dict[str, Any], message: str, unet_rows: Any
) -> None:
    chosen = Settings(**{**QUICK, **options})
    with unet_rows(tiny[1]) as seen:
        with pytest.raises(InputError, match=message):
            calibrate(*tiny, "ink", PAIRS, chosen)
        if "calls" not in options:
            with pytest.raises(InputError, match=message):
                acterase.check(*tiny, chosen)
    assert seen == []


def test_no_pairs_are_refused(tiny: tuple[Model, Any]) -> None:
    with pytest.raises(InputError, match="no prompt pairs"):
        calibrate(*tiny, "ink", (), Settings(**QUICK))


@pytest.mark.parametrize("options", [{"mask_time": "per_step"}, {"calls": [0, 3]}, {"rows": "conditional"}], ids=str)
def test_what_no_artifact_can_hold_is_not_baked(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} is for experiments in Python: an artifact does the same in every"):
        acterase.check(*tiny, Settings(**{**QUICK, **options}))


def test_what_can_be_baked_is_not_refused(
    tiny: tuple[Model, Any], folders: Callable[[str], Path], unet_rows: Any
) -> None:
    with unet_rows(tiny[1]) as seen:
        acterase.check(*tiny, Settings(tau=0.02, size=(2048, 8)))
        acterase.check(*tiny, Settings(tau=1e-9, tau_mode="absolute", **FEATURE))
    assert seen == []
    xl = open_model(folders("sdxl"))
    acterase.check(xl, xl.pipeline("cpu", torch.float32), Settings(site="attn", tau=0.1))


def test_only_features_at_every_token_fold() -> None:
    assert acterase.unfoldable(Settings()) == "its mask differs from token to token"
    assert acterase.unfoldable(Settings(site="ffn_output")) is not None
    assert acterase.unfoldable(Settings(profile="portable")) is None
    assert acterase.unfoldable(Settings(importance="edge", **FEATURE)) is None


@pytest.mark.parametrize("kind", acterase.PUBLISHED)
def test_published_settings_are_settings(kind: str) -> None:
    assert acterase.PUBLISHED[kind]
    assert all(Settings(**given) for given in acterase.PUBLISHED[kind].values())
