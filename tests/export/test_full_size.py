"""Full size with random weights: written in the real format, exported, run, held against eager PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
