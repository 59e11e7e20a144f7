"""The ONNX folder in `optimum.onnxruntime`, in an environment of its own: it does not import beside transformers 5."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from bakeout.editor.model import open_model
from bakeout.export.onnx import write_onnx
from bakeout.export.onnx_pipeline import load_onnx_pipeline

VERSIONS = (
    "optimum-onnx==0.1.0",
    "optimum==2.1.0",
    "transformers==4.57.6",
    "diffusers==0.39.0",
    "huggingface_hub==0.36.2",
    f"onnxruntime=={onnxruntime.__version__}",
)
PROMPTS = ["a striped red star on grass", "a plain blue ring at night"]
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 4.0}
SEEDS = (3, 4)

# Runs in the other environment, of which this one imports nothing.
PROGRAM = """
import json, sys
import numpy, torch
from optimum.onnxruntime import ORTStableDiffusionPipeline

folder, out, prompts, seeds, settings = json.loads(sys.argv[1])
pipeline = ORTStableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
generators = [torch.Generator().manual_seed(seed) for seed in seeds]
numpy.save(out, pipeline(prompts, generator=generators, output_type="np", **settings).images)
"""


@pytest.fixture(scope="module")
def python(root, tmp_path_factory) -> Path:
    """The interpreter of an environment with optimum, installed from the package index that pip is configured for."""
    home = tmp_path_factory.mktemp("optimum")
    venv.create(home, with_pip=True)
    interpreter = home / "bin" / "python"
    torch_first = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    for packages in (torch_first, VERSIONS):
        command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return interpreter


def drawn(pipeline, prompts=PROMPTS) -> NDArray[np.float32]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(prompts, generator=generators, output_type="np", **SETTINGS).images


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's programs lie elsewhere there")
def test_optimum_draws_the_same_pictures(python, tmp_path):
    folder = tmp_path / "onnx"
    write_onnx(open_model("shapes"), folder)
    given = json.dumps([str(folder), str(tmp_path / "theirs.npy"), PROMPTS, SEEDS, SETTINGS])
    done = subprocess.run([python, "-c", PROGRAM, given], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "theirs.npy")
    ours = load_onnx_pipeline(folder)
    own, others = drawn(ours), drawn(ours, PROMPTS[::-1])
    assert theirs.shape == own.shape == (2, 64, 64, 3)
    # One grey level of 255; other prompts differ by far more.
    assert np.abs(theirs - own).max() <= 1 / 255
    assert np.abs(theirs - others).max() > 0.2
