"""Full size with random weights: written in the real format, exported, run, held against eager PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from bakeout.editor.edit import Edit, PatchActivation
from bakeout.editor.model import open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx

LIMIT_GB = 20


@pytest.mark.slow
def test_stable_diffusion_of_full_size_is_exported_and_run_in_little_memory(root):
    command = [sys.executable, root / "benchmarks" / "export.py", "sd15", "--side", "32", "--without-theirs", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    for graph, stages in found.items():
        assert stages.keys() == {"ours", "eager", "run"}, graph
        # Without any weights nothing at all was exported.
        assert all(0.3 < stage["peak_gb"] < LIMIT_GB for stage in stages.values()), graph
        assert 0 < stages["run"]["relative_rms"] < 2e-5, graph


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "encoders"), [("sd15", {"text_encoder"}), ("sdxl", {"text_encoder", "text_encoder_2"})]
)
def test_edited_text_encoders_of_full_size_compute_what_hooks_do(root, name, encoders):
    command = [sys.executable, root / "benchmarks" / "text_encoder.py", name, "--rounds", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["encoder"] for row in rows} == encoders
    for encoder in encoders:
        found = {row["realisation"]: row for row in rows if row["encoder"] == encoder}
        plain, folded = found.pop("plain"), found.pop("folded into a bias")
        assert found.pop("plain again")["nodes"] == folded["nodes"] == plain["nodes"]
        assert plain["parity"] <= 1e-5
        # Its bias is rounded to float16, in which the model is stored.
        assert folded["parity"] <= 1e-4
        assert len(found) == 8
        for realisation, row in [*found.items(), ("folded", folded)]:
            assert row["effect"] > 0.05, realisation
        for realisation, row in found.items():
            assert row["parity"] <= 1e-5, realisation


def _without_values(path: Path) -> bytes:
    graph = onnx.load(path).graph
    for it in graph.initializer:
        it.ClearField("raw_data")
    return graph.SerializeToString(deterministic=True)


def test_features_that_fold_leave_nodes_names_and_shapes_as_they_were(tiny_model, tmp_path):
    model = open_model(tiny_model)
    model = replace(model, components={"unet": model.components["unet"]}, parts={})
    masks = {site.name: torch.arange(site.d_in) % 3 == 0 for site in model.sites_of("ffn2")}
    edit = Edit(tuple(PatchActivation(name, "input", mask, mask.float()) for name, mask in masks.items()))
    lowered = lower_onto(edit, model)
    assert not lowered.remaining.operations
    write_onnx(model, tmp_path / "plain")
    write_onnx(model, tmp_path / "folded", changed=lowered.state, remaining=lowered.remaining)
    plain, folded = (tmp_path / name / "unet" / "model.onnx" for name in ("plain", "folded"))
    assert plain.read_bytes() != folded.read_bytes()
    assert _without_values(plain) == _without_values(folded)


@pytest.mark.slow
def test_patches_of_full_width_compute_what_hooks_do(root):
    command = [sys.executable, root / "benchmarks" / "unet.py", "sd15", "--quick", "--side", "16", "--rounds", "0"]
    for realisation in ("25% of the features, removed, multiples of 8", "1.0% of tokens x features"):
        command += ["--only", realisation]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, removed, patched = json.loads(done.stdout)
    assert removed["nodes"] == plain["nodes"]
    assert removed["onnx_gb"] < plain["onnx_gb"] < patched["onnx_gb"]
    assert plain["parity"] <= 1e-5
    assert patched["parity"] <= 1e-5
    # Its biases are rounded to float16, in which the model is stored.
    assert removed["parity"] <= 2e-4
    assert all(row["effect"] > 0.05 for row in (removed, patched))
