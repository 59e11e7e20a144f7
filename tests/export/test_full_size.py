"""SD 1.5 at full size with random weights: written in the real format, exported, run, held against eager PyTorch."""

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
