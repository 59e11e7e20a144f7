"""The ONNX folder: the directory contract, the weights by name, and ONNX Runtime against eager PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export import graph_file
from bakeout.export import onnx as module
from bakeout.export.checkpoint import plan_diffusers, write_diffusers
from bakeout.export.graphs import graphs_of
from bakeout.export.onnx import OPSET, size_of_onnx, write_onnx
from bakeout.export.tokenizer import as_json

Sizes = tuple[int, int, int, int]
# Batch, height and width in the smallest units, tokens; none of them as when it was traced.
SIZES: tuple[Sizes, ...] = ((1, 1, 1, 77), (3, 2, 3, 9), (5, 3, 1, 77))
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sd1", "sd2", "shapes")]
FAMILIES = ["tiny", "sdxl", *SLOW]


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    folders: Callable[[str], Path],
    onnx_folders: Callable[[str], Path],
) -> Callable[[str], tuple[Model, Path]]:
    """A model and its ONNX folder, written once."""
    root = tmp_path_factory.mktemp("own")

    def write(name: str) -> tuple[Model, Path]:
        if name.startswith("sd"):
            return open_model(folders(name)), onnx_folders(name)
        model = open_model(tiny_model if name == "tiny" else name)
        if not (root / name).exists():
            write_onnx(model, root / name)
        return model, root / name

    return write


def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])


def relative_rms(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).square().mean().sqrt() / expected.double().square().mean().sqrt())


def eager(model: Model, sizes: Sizes) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Each network's inputs, and the outputs that diffusers' and transformers' own modules give for them."""
    pipeline = model.pipeline(dtype=torch.float32)
    batch, height, width, tokens = sizes
    random = torch.Generator().manual_seed(batch)
    unet, vae, xl = pipeline.unet.config, pipeline.vae, model.family == "sdxl"

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
        encoder, tokenizer = getattr(pipeline, name), getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        ids = torch.randint(0, encoder.config.vocab_size, (batch, tokens), generator=random)
        ids[:, tokens // 2 :] = tokenizer.eos_token_id
        output = encoder(ids, output_hidden_states=True)
        first = ("text_embeds", "last_hidden_state") if name[-1] == "2" else ("last_hidden_state", "pooler_output")
        states = {f"hidden_states.{layer}": it for layer, it in enumerate(output.hidden_states)} if xl else {}
        yield name, {"input_ids": ids}, {**{it: output[it] for it in first}, **states}
    unit = 2 ** (len(unet.block_out_channels) - 1)
    sample, text = noise(batch, 4, height * unit, width * unit), noise(batch, tokens, unet.cross_attention_dim)
    timestep, more = torch.tensor(317.0), {}
    if xl:
        more = {"text_embeds": noise(batch, 40), "time_ids": torch.tensor([[16.0, 32, 0, 1, 16, 48]] * batch)}
    out = pipeline.unet(sample, timestep, text, added_cond_kwargs=more or None).sample
    yield "unet", {"sample": sample, "timestep": timestep, "encoder_hidden_states": text, **more}, {"out_sample": out}
    unit = 2 ** (len(vae.config.block_out_channels) - 1)
    picture, latents = noise(batch, 3, height * unit, width * unit), noise(batch, 4, height, width)
    yield "vae_encoder", {"sample": picture}, {"latent_parameters": vae.encode(picture).latent_dist.parameters}
    yield "vae_decoder", {"latent_sample": latents}, {"sample": vae.decode(latents).sample}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_onnx_runtime_computes_what_eager_pytorch_computes(name: str, written: Any) -> None:
    model, folder = written(name)
    sessions = {path.parent.name: session(folder, path.parent.name) for path in folder.glob("*/model.onnx")}
    for sizes in SIZES:
        for network, inputs, outputs in eager(model, sizes):
            ours = sessions[network]
            assert [it.name for it in ours.get_inputs()] == list(inputs)
            assert [it.name for it in ours.get_outputs()] == list(outputs)
            found = ours.run(None, {key: value.numpy() for key, value in inputs.items()})
            for key, value in zip(outputs, found, strict=True):
                assert relative_rms(torch.from_numpy(value), outputs[key]) <= 1e-5, (network, key, sizes)
        assert {network for network, _, _ in eager(model, sizes)} == sessions.keys()


SIDES = {"unet": ("height", "width"), "vae_encoder": ("sample_height", "sample_width"),
         "vae_decoder": ("latent_height", "latent_width")}  # fmt: skip


def test_dimensions_have_the_names_of_the_contract(written: Any) -> None:
    _, folder = written("sdxl")
    shapes = {
        path.parent.name: {it.name: it.shape for it in (*ours.get_inputs(), *ours.get_outputs())}
        for path in folder.glob("*/model.onnx") for ours in [session(folder, path.parent.name)]
    }  # fmt: skip
    rows = ["batch_size", "sequence_length"]
    states = {f"hidden_states.{layer}": [*rows, 48] for layer in range(4)}
    assert shapes["text_encoder_2"] == {
        "input_ids": rows, "text_embeds": ["batch_size", 40], "last_hidden_state": [*rows, 48], **states
    }  # fmt: skip
    picture = ["batch_size", 4, "height", "width"]
    assert shapes["unet"] == {
        "sample": picture, "timestep": [], "encoder_hidden_states": [*rows, 80], "text_embeds": ["batch_size", 40],
        "time_ids": ["batch_size", 6], "out_sample": picture,
    }  # fmt: skip
    assert shapes["vae_decoder"] == {
        "latent_sample": ["batch_size", 4, "latent_height", "latent_width"],
        "sample": ["batch_size", 3, "latent_height * 4", "latent_width * 4"],
    }
    assert shapes["vae_encoder"] == {
        "sample": ["batch_size", 3, "sample_height", "sample_width"],
        "latent_parameters": ["batch_size", 8, "sample_height / 4", "sample_width / 4"],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stored_tensor_is_an_initializer_of_its_name_and_values(name: str, written: Any) -> None:
    from safetensors.torch import load_file

    model, folder = written(name)
    for component in model.components.values():
        (file,) = component.files
        stored = load_file(file)
        graphs = ["vae_encoder", "vae_decoder"] if component.name == "vae" else [component.name]
        found = [it for graph in graphs for it in onnx.load(folder / graph / "model.onnx").graph.initializer]
        weights = {it.name: numpy_helper.to_array(it) for it in found if "." in it.name}
        assert len(weights) == sum("." in it.name for it in found), "a weight is in both graphs"
        assert weights.keys() == stored.keys()
        for key, tensor in stored.items():
            assert np.array_equal(weights[key], tensor.float().numpy()), key


def test_a_weight_is_replaced_by_its_name(written: Any, tmp_path: Path) -> None:
    _, folder = written("tiny")
    shutil.copytree(folder / "unet", tmp_path / "unet")
    graph = onnx.load(tmp_path / "unet" / "model.onnx")
    (weight,) = (it for it in graph.graph.initializer if it.name == "conv_in.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(graph, tmp_path / "unet" / "model.onnx")
    inputs = {"sample": np.ones((1, 4, 4, 4), "f"), "timestep": np.array(1, "f"),
              "encoder_hidden_states": np.ones((1, 3, 16), "f")}  # fmt: skip
    ours, other = (torch.from_numpy(session(home, "unet").run(None, inputs)[0]) for home in (folder, tmp_path))
    assert relative_rms(other, ours) > 1e-4


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
def test_nothing_is_in_a_graph_that_it_does_not_need(name: str, written: Any) -> None:
    _, folder = written(name)
    for path in folder.glob("*/model.onnx"):
        graph = onnx.load(path)
        onnx.checker.check_model(path, full_check=True)
        assert [(it.domain, it.version) for it in graph.opset_import] == [("", OPSET)]
        assert not graph.metadata_props
        assert not graph.functions
        nodes = graph.graph.node
        assert not any(it.doc_string or it.metadata_props for it in nodes)
        assert not {it.op_type for it in nodes} & {"Dropout", "Identity", "Constant"}
        used = {name for it in nodes for name in it.input}
        needed = used | {it.name for it in graph.graph.output}
        assert {it.name for it in graph.graph.initializer} <= used
        assert all(needed & set(it.output) for it in nodes)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_in_another_process(written: Any, tiny_model: Path, tmp_path: Path) -> None:
    _, folder = written("tiny")
    program = (
        "import sys; from pathlib import Path; from bakeout.editor.model import open_model; "
        "from bakeout.export.onnx import write_onnx; write_onnx(open_model(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, tiny_model, tmp_path / "again"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert digests(tmp_path / "again") == digests(folder)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_the_folder_has_what_pipelines_look_for_and_no_folder_of_the_machine(written: Any) -> None:
    model, folder = written("sdxl")
    parts = {"scheduler": {"scheduler_config.json"}}
    tokenizer = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    graphs = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2"), tokenizer)
    parts |= {name: {"config.json", "model.onnx"} for name in graphs}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"model_index.json", *(f"{home}/{file}" for home, files in parts.items() for file in files)}
    said = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for local in (str(model.path), str(folder.parent), str(Path(module.__file__).parent), sys.prefix):
        assert local.encode() not in said
    config = json.loads((folder / "text_encoder" / "config.json").read_bytes())
    assert (config["num_hidden_layers"], "dtype" in config) == (3, False)
    assert json.loads((folder / "unet" / "config.json").read_bytes())["time_cond_proj_dim"] is None


def test_the_index_names_no_part_that_is_left_out(copied: Callable[[str], Path]) -> None:
    path = copied("sd1")
    index = json.loads((path / "model_index.json").read_bytes())
    said = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "_name_or_path": "/home/me/model"}
    (path / "model_index.json").write_bytes(as_json({**index, **said, "requires_safety_checker": True}))
    ours = module._index(open_model(path))
    assert (ours["safety_checker"], ours["requires_safety_checker"]) == ([None, None], False)
    assert ours["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert "_name_or_path" not in ours


def test_a_large_graph_has_its_weights_beside_it_and_all_else_is_the_same(
    written: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = written("tiny")
    unet = sum(module._bytes(model.components["unet"], it) for it in model.components["unet"].locations)
    monkeypatch.setattr(graph_file, "MAX_INLINE", unet - 1)
    done: list[float] = []
    begun: list[str] = []
    write_onnx(model, tmp_path / "large", done.append, begun.append)
    assert begun == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    before, after = digests(folder), digests(tmp_path / "large")
    assert after.keys() - before.keys() == {"unet/model.onnx_data"}
    assert {name for name, digest in before.items() if after[name] != digest} == {"unet/model.onnx"}
    small, large = (
        {it.name: numpy_helper.to_array(it) for it in onnx.load(path / "unet" / "model.onnx").graph.initializer}
        for path in (folder, tmp_path / "large")
    )
    assert small.keys() == large.keys()
    assert all(np.array_equal(value, large[name]) for name, value in small.items())
    session(tmp_path / "large", "unet")
    assert sum(done) == pytest.approx(1)
    assert len(done) == sum(len(component.locations) for component in model.components.values())


def changed_of(model: Model) -> dict[str, dict[str, Tensor]]:
    """A tensor of each way in which a parameter lies on the disk, and a few more, with other values."""
    from safetensors.torch import load_file

    changed: dict[str, dict[str, Tensor]] = {}
    for component in model.components.values():
        ways = {location.change: location.tensor for location in component.locations.values()}
        stored = {name: tensor for file in component.files for name, tensor in load_file(file).items()}
        changed[component.name] = {name: stored[name] * -2 for name in ways.values()}
    return changed


def test_replaced_tensors_are_written_as_from_a_folder_that_has_them(
    written: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model, base = written("tiny")
    changed = changed_of(model)
    write_diffusers(plan_diffusers(model), changed, tmp_path / "diffusers")
    for folder, source, new in (("whole", open_model(tmp_path / "diffusers"), {}), ("made", model, changed)):
        text = {"text_encoder": source.components["text_encoder"]}
        write_onnx(replace(source, components=text), tmp_path / folder, changed={key: new[key] for key in text if new})
    assert digests(tmp_path / "made") == digests(tmp_path / "whole")
    name = "text_encoder/model.onnx"
    assert digests(tmp_path / "made")[name] != digests(base)[name]


@pytest.mark.usefixtures("tiny_configs")
def test_replaced_tensors_of_a_single_file_are_cut_and_turned_as_its_own(
    single_files: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(single_files("sdxl"))
    wanted = ("text_encoder_2", "vae")
    model = replace(model, components={name: model.components[name] for name in wanted}, parts={})
    changed = changed_of(model)
    ways = {location.change for component in model.components.values() for location in component.locations.values()}
    assert ways == {"same", "transposed", "third", "pointwise"}
    write_onnx(model, tmp_path / "base")
    write_onnx(model, tmp_path / "made", changed=changed)
    for component in model.components.values():
        names = {module._initializer(component, name): it.tensor for name, it in component.locations.items()}
        graphs = ["vae_encoder", "vae_decoder"] if component.name == "vae" else [component.name]
        for graph in graphs:
            before, after = (
                {
                    it.name: numpy_helper.to_array(it)
                    for it in onnx.load(tmp_path / folder / graph / "model.onnx").graph.initializer
                }
                for folder in ("base", "made")
            )
            for name in before.keys() & names.keys():
                factor = -2 if names[name] in changed[component.name] else 1
                assert np.array_equal(after[name], factor * before[name]), name


def test_what_does_not_fit_is_no_replacement(written: Any, tmp_path: Path) -> None:
    model, _ = written("tiny")
    with pytest.raises(ValueError, match="no parameter of the unet is read from conv_on"):
        write_onnx(model, tmp_path / "made", changed={"unet": {"conv_on": torch.ones(1)}})
    with pytest.raises(ValueError, match="is stored as F32"):
        write_onnx(model, tmp_path / "other", changed={"text_encoder": {"final_layer_norm.bias": torch.ones(1)}})


def test_the_size_is_told(written: Any) -> None:
    model, folder = written("tiny")
    size = sum(path.stat().st_size for path in folder.glob("*/model.onnx"))
    assert size_of_onnx(model) < size < size_of_onnx(model) + 1_000_000


def test_a_parameter_without_a_graph_is_refused(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = written("tiny")
    parameters = model.components["unet"].locations.keys()
    monkeypatch.setattr(module, "_write_graph", lambda *_: parameters - {"conv_in.bias"})
    with pytest.raises(InputError, match=r"the text_encoder of this model has \S+, which bakeout cannot export"):
        write_onnx(model, tmp_path / "made")


@pytest.mark.parametrize("limit", [0, graph_file.MAX_INLINE])
@pytest.mark.parametrize("error", [InputError("it became shorter"), OSError(5, "Input/output error")])
def test_what_reading_a_weight_raises_is_not_hidden(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, limit: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    model, _ = written("tiny")
    monkeypatch.setattr(module, "read_parameter", fail)
    monkeypatch.setattr(graph_file, "MAX_INLINE", limit)
    with pytest.raises(type(error)) as caught:
        write_onnx(model, tmp_path / "made")
    assert caught.value is error


def test_what_the_configuration_leaves_out_is_filled_in(copied: Callable[[str], Path]) -> None:
    """Early configurations lack what the libraries have defaults for."""
    path = copied("sdxl")
    for name in ("text_encoder", "unet", "vae"):
        config: Mapping[str, Any] = json.loads((path / name / "config.json").read_bytes())
        left = {key: value for key, value in config.items()
                if key not in ("max_position_embeddings", "in_channels", "latent_channels")}  # fmt: skip
        assert len(left) < len(config)
        (path / name / "config.json").write_bytes(as_json(left))
    graphs = {graph.name: graph for graph in graphs_of(open_model(path))}
    assert graphs["text_encoder"].inputs["input_ids"].shape == (2, 77)
    assert [graphs[name].inputs[key].shape[1] for name, key in (
        ("unet", "sample"), ("vae_encoder", "sample"), ("vae_decoder", "latent_sample"),
    )] == [4, 3, 4]  # fmt: skip
