"""A graph with an operator of ours in OpenVINO, which takes no functions of a model: they are inlined first.

OpenVINO is no dependency, so that it has an environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from numpy.typing import NDArray

from bakeout.editor.edit import Edit, PatchActivation
from bakeout.editor.model import Model, open_model
from bakeout.export.onnx import write_onnx
from bakeout.validate.reference import applied

VERSION = "openvino==2026.4.1"

# Runs in the other environment, of which this one imports nothing.
PROGRAM = """
import sys
import numpy, openvino

graph, given, out = sys.argv[1:]
core = openvino.Core()
# Left to itself it computes in bfloat16 where the processor can.
compiled = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
numpy.save(out, compiled(dict(numpy.load(given)))[0])
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with OpenVINO, installed from the package index that pip is configured for."""
    home = tmp_path_factory.mktemp("openvino")
    venv.create(home, with_pip=True)
    interpreter = home / "bin" / "python"
    command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", VERSION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return interpreter


def patched(model: Model) -> Edit:
    """A third of the values at the input of every FFN's second Linear, at latents of 4x8."""
    made = []
    for seed, site in enumerate(model.sites_of("ffn2")):
        generator = torch.Generator().manual_seed(seed)
        # Half of each side is left in the middle.
        mask = torch.rand(8 if ".mid." in site.name else 32, site.d_in, generator=generator) < 0.3
        made.append(PatchActivation(site.name, "input", mask, torch.randn(mask.shape, generator=generator), (4, 8)))
    return Edit(tuple(made))


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's programs lie elsewhere there")
@torch.no_grad()
def test_openvino_computes_what_hooks_on_the_base_do(python, tiny_model, tmp_path):
    model = open_model(tiny_model)
    edit = patched(model)
    write_onnx(replace(model, components={"unet": model.components["unet"]}), tmp_path / "onnx", remaining=edit)
    made = onnx.load(tmp_path / "onnx" / "unet" / "model.onnx")
    assert {node.op_type for node in made.graph.node if node.domain} == {"MaskedGeglu"}
    onnx.save(onnx.inliner.inline_local_functions(made), tmp_path / "inlined.onnx")
    generator = torch.Generator().manual_seed(9)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 8), (2, 77, 16)))
    np.savez(tmp_path / "given.npz", sample=sample, timestep=np.array(317, np.float32), encoder_hidden_states=text)
    command = [python, "-c", PROGRAM, *(tmp_path / it for it in ("inlined.onnx", "given.npz", "theirs.npy"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "theirs.npy")
    pipeline = model.pipeline(dtype=torch.float32)

    def hooked(operations: tuple[PatchActivation, ...]) -> NDArray[np.float32]:
        with applied(Edit(operations), model, pipeline):
            return pipeline.unet(sample, 317.0, text).sample.numpy()

    assert relative_error(theirs, hooked(edit.operations)) <= 1e-5
    for other in ((), edit.operations[1:], edit.operations[:-1]):
        assert relative_error(theirs, hooked(other)) > 1e-4
