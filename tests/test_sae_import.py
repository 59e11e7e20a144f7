"""`bakeout sae import`: what it writes, what it measures, and that a mistake leaves nothing."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from bakeout.cli import main
from bakeout.editor.sae.model import SparseAutoencoder

SITE = "text_encoder.layer.9"


def run(*arguments):
    return CliRunner().invoke(main, ["sae", "import", *(str(it) for it in arguments)], prog_name="bakeout")


@pytest.fixture
def foreign(tmp_path):
    """A folder as SAELens writes it, of `shapes`' width: ReLU of ±x reconstructs everything, times `factor`."""

    def write(factor=1.0, offset=0.0, **said):
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        both = torch.cat((torch.eye(96), -torch.eye(96)))
        tensors = {
            "W_enc": both.T.contiguous(), "b_enc": torch.zeros(192), "W_dec": factor * both,
            "b_dec": torch.full((96,), offset),
        }  # fmt: skip
        save_file(tensors, folder / "sae_weights.safetensors")
        config = {
            "d_in": 96, "d_sae": 192, "architecture": "standard", "apply_b_dec_to_input": False,
            "normalize_activations": "none", "metadata": {"hook_name": "blocks.9.hook_resid_post"}, **said,
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config))
        (tmp_path / "prompts.txt").write_text("a red star on grass\na blue ring at night\na moon\n")
        return folder

    return write


def test_it_writes_what_it_read(foreign, tmp_path):
    output = tmp_path / "sae.safetensors"
    done = run(foreign(), "-o", output)
    assert done.exit_code == 0, done.output
    autoencoder = SparseAutoencoder.load(output)
    assert (autoencoder.site, autoencoder.source_format, autoencoder.activation) == (SITE, "saelens", "relu")
    assert autoencoder.digest in done.output
    before = output.read_bytes()
    assert run(foreign(), "-o", output).exit_code == 2
    assert run(foreign(), "-o", output, "--force").exit_code == 0
    assert output.read_bytes() == before


def test_it_is_measured_on_prompts(foreign, tmp_path):
    done = run(
        foreign(), "-o", tmp_path / "sae.safetensors", "--model", "shapes", "--prompts", tmp_path / "prompts.txt"
    )
    assert done.exit_code == 0, done.output
    assert "On 3 prompts (231 tokens): variance explained 1.0000" in done.output


def test_an_error_that_is_everywhere_the_same_is_a_warning(foreign, tmp_path):
    output = tmp_path / "sae.safetensors"
    done = run(foreign(offset=50.0), "-o", output, "--model", "shapes", "--prompts", tmp_path / "prompts.txt")
    assert done.exit_code == 0, done.output
    assert "Warning: the variance explained is -" in done.output
    assert "1.0000 but for a constant" in done.output
    assert output.exists()


@pytest.mark.parametrize(
    ("made", "arguments", "sentence"),
    [
        (
            {"factor": 3.0},
            ["--model", "shapes", "--prompts", "prompts.txt"],
            "not the activations",
        ),
        ({}, ["--model", "shapes"], "give --model and --prompts, or neither"),
        ({}, ["--prompts", "prompts.txt"], "give --model and --prompts, or neither"),
        ({}, ["--site", "layer 9"], "is no site of a text encoder's layer"),
        ({}, ["--site", "text_encoder.layer.8"], "leave --site out"),
        ({"metadata": {}}, [], "name the site with --site"),
        ({"architecture": "jumprelu"}, [], "thresholds of their own"),
        ({"d_in": 97}, [], "has 96 features and its configuration says 97"),
        ({}, ["-o", "sae.pt"], "let it end in .safetensors"),
        ({}, ["-o", "."], "is a folder"),
        ({}, ["-o", f"{'s' * 300}.safetensors"], "File name too long"),
        ({}, ["-o", "nowhere/sae.safetensors"], "cannot write"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(foreign, tmp_path, monkeypatch, made, arguments, sentence):
    source = foreign(**made)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run(source, "-o", "sae.safetensors", *arguments)
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert done.output.count("\n") == 1
    assert sentence in done.output
    assert sorted(tmp_path.rglob("*")) == before
