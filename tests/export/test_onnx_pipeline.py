"""ONNX Runtime behind diffusers' pipelines: it draws what torch draws, and broken folders are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.pipeline import image_to_image
from bakeout.export.onnx_pipeline import OnnxGraph, SessionSettings, load_onnx_pipeline
from bakeout.generate import SCHEDULERS, Request, complete, scheduler_for

FAMILIES = ("sd1", "sd2", "sdxl")
ONE_THREAD = SessionSettings(threads=1)
# Measured: 2e-7 to 2e-6.
LIMIT = 1e-5


@pytest.fixture(scope="module")
def pipelines(onnx_folders, folders) -> Callable[[str], tuple[Any, Any]]:
    """The pipelines of a family: ONNX Runtime's, and torch's in float32."""

    @cache
    def both(family: str) -> tuple[Any, Any]:
        eager = open_model(folders(family)).pipeline("cpu", torch.float32)
        return load_onnx_pipeline(onnx_folders(family), ONE_THREAD), eager

    return both


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative RMS; infinite for another shape or dtype, or what is not finite."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype or not found.isfinite().all():
        return float("inf")
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@contextmanager
def watched(pipeline: Any) -> Iterator[list[dict[str, Tensor]]]:
    """What the UNet of a pipeline is given, call by call, and `out`, what it returns."""
    calls: list[dict[str, Tensor]] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        added = kwargs["added_cond_kwargs"] or {}
        step = torch.as_tensor(args[1], dtype=torch.float32)
        calls.append(
            {"sample": args[0], "timestep": step, "text": kwargs["encoder_hidden_states"], **added, "out": output[0]}
        )

    hook = pipeline.unet.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def drawn(pipeline: Any, **settings: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The calls of the UNet, and the pictures [batch, 3, height, width] in 0 … 1."""
    prompts = settings.setdefault("prompt", ["a", "bc"])
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with watched(pipeline) as calls:
        output = pipeline(**{"num_inference_steps": 3, "output_type": "pt", "generator": generators, **settings})
    return calls, output.images


def largest_error(
    found: tuple[list[dict[str, Tensor]], Tensor], wanted: tuple[list[dict[str, Tensor]], Tensor]
) -> float:
    (calls, pictures), (wanted_calls, wanted_pictures) = found, wanted
    assert len(calls) == len(wanted_calls) > 0
    errors = [error(pictures, wanted_pictures)]
    for call, wanted_call in zip(calls, wanted_calls, strict=True):
        assert call.keys() == wanted_call.keys()
        errors += [error(call[name], wanted_call[name]) for name in wanted_call if wanted_call[name].any()]
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": ["c", "dd"]},
        {"prompt": ["a"], "num_inference_steps": 1},
        {"prompt": ["a", "b", "c"], "height": 32, "width": 64},
    ],
)
def test_it_draws_what_torch_draws(pipelines, family, settings):
    ours, eager = pipelines(family)
    assert type(ours) is type(eager)
    assert largest_error(drawn(ours, **settings), drawn(eager, **settings)) < LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_another_prompt_seed_or_guidance_is_seen(pipelines, family):
    ours, eager = pipelines(family)
    right = drawn(eager)
    for settings in ({"prompt": ["a", "bd"]}, {"negative_prompt": ["c", ""]}, {"generator": [torch.Generator()] * 2}):
        assert largest_error(drawn(ours, **settings), right) > 10 * LIMIT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"strength": 0.7}, {"strength": 1.0, "guidance_scale": 1.0}])
def test_it_begins_with_a_picture_as_torch_does(pipelines, family, settings):
    ours, eager = map(image_to_image, pipelines(family))
    assert type(ours) is type(eager)
    settings["image"] = [Image.effect_noise((32, 64), 90).convert("RGB")] * 2
    first, second = drawn(ours, **settings), drawn(eager, **settings)
    assert largest_error(first, second) < LIMIT
    from_noise = drawn(pipelines(family)[0], height=64, width=32)[0]
    assert error(first[0][0]["sample"], from_noise[0]["sample"]) > 0.1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_it_draws_with_torch(pipelines, scheduler):
    results = []
    for pipeline in pipelines("sd1"):
        own = pipeline.scheduler
        pipeline.scheduler = scheduler_for(pipeline, scheduler)
        results.append(drawn(pipeline, num_inference_steps=4))
        pipeline.scheduler = own
    assert largest_error(*results) < LIMIT


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_batch_is_its_pictures_one_by_one(pipelines, family):
    ours, _ = pipelines(family)
    _, together = drawn(ours, prompt=["a", "b", "c"])
    for seed, prompt in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        alone = ours(prompt, num_inference_steps=3, output_type="pt", generator=generator).images
        assert error(together[seed : seed + 1], alone) < LIMIT


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_noise_is_that_of_diffusers_to_the_bit(pipelines, family):
    first = [drawn(pipeline, guidance_scale=1.0)[0][0]["sample"] for pipeline in pipelines(family)]
    assert torch.equal(*first)
    size = pipelines(family)[1].unet.config.sample_size
    noise = [torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    scheduler = pipelines(family)[0].scheduler
    wanted = scheduler.scale_model_input(torch.cat(noise) * scheduler.init_noise_sigma, scheduler.timesteps[0])
    scheduler.set_timesteps(3)
    wanted = scheduler.scale_model_input(torch.cat(noise) * scheduler.init_noise_sigma, scheduler.timesteps[0])
    assert torch.equal(first[0], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_of_every_network_has_its_name(pipelines, family):
    ours, eager = pipelines(family)
    generator = torch.Generator().manual_seed(0)
    for network in (eager.unet, eager.vae, eager.text_encoder, getattr(eager, "text_encoder_2", eager.vae)):
        network.requires_grad_(False)
    ids = torch.randint(5, 500, (3, 77), generator=generator)
    for name in ("text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        found = getattr(ours, name).run({"input_ids": ids})
        wanted = getattr(eager, name)(ids, output_hidden_states=True)
        first = ["text_embeds"] if name == "text_encoder_2" else ["pooler_output"]
        assert {"last_hidden_state", *first} <= found.keys()
        for output, value in found.items():
            kind, _, layer = output.partition(".")
            assert error(value, wanted[kind][int(layer)] if layer else wanted[kind]) < LIMIT
        assert sum(output.startswith("hidden_states.") for output in found) == (4 if family == "sdxl" else 0)
    sample = torch.randn(3, 3, 32, 64, generator=generator)
    parameters = ours.vae.encoder.run({"sample": sample})["latent_parameters"]
    assert error(parameters, eager.vae.encode(sample).latent_dist.parameters) < LIMIT
    latents = torch.randn(3, 4, 8, 16, generator=generator)
    assert error(ours.vae.decoder.run({"latent_sample": latents})["sample"], eager.vae.decode(latents).sample) < LIMIT
    for ways in ({"return_dict": True}, {"return_dict": False}):
        assert torch.equal(ours.vae.decode(latents, **ways)[0], ours.vae.decode(latents)[0])


def test_the_configurations_are_those_of_torch(pipelines):
    for family in FAMILIES:
        ours, eager = pipelines(family)
        for name in ("unet", "vae"):
            mine, other = dict(getattr(ours, name).config), dict(getattr(eager, name).config)
            assert {key: mine[key] for key in mine if key[0] != "_"} == {k: other[k] for k in other if k[0] != "_"}
        assert dict(ours.scheduler.config) == dict(eager.scheduler.config)
        assert ours.dtype is torch.float32
        assert ours.device == torch.device("cpu")
        request = complete(Request(("a",)), ours)
        assert request == complete(Request(("a",)), eager)


def test_a_request_for_what_is_not_exported_is_refused(pipelines):
    sd1, sdxl = pipelines("sd1")[0], pipelines("sdxl")
    with pytest.raises(InputError, match="leave clip_skip out"):
        drawn(sd1, clip_skip=1)
    assert largest_error(drawn(sdxl[0], clip_skip=1), drawn(sdxl[1], clip_skip=1)) < LIMIT
    assert largest_error(drawn(sdxl[0], clip_skip=1), drawn(sdxl[1])) > 10 * LIMIT
    with pytest.raises(InputError, match="takes no attention mask"):
        sd1.text_encoder(torch.ones(1, 77, dtype=torch.int64), attention_mask=torch.ones(1, 77))
    with pytest.raises(InputError, match="takes no cross_attention_kwargs"):
        sd1.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 32), cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(InputError, match=r"multiples of 8, not 16x12; choose another picture size"):
        drawn(sd1, height=48, width=64)
    with pytest.raises(InputError, match=r"unet/model.onnx has no input 'text_embeds'"):
        sd1.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 32), added_cond_kwargs={"text_embeds": torch.ones(1)})


def test_what_the_edit_does_not_reach_is_not_read(onnx_folders, pipelines):
    """Of three layers SDXL reads by itself the output of the second, which is hidden state 2."""
    usual = pipelines("sdxl")[0]
    for first, refused in ((1, False), (2, True)):
        edited = load_onnx_pipeline(onnx_folders("sdxl"), ONE_THREAD, {"text_encoder_2": first})
        assert largest_error(drawn(edited), drawn(usual)) == 0
        if refused:
            for pipeline in (edited, image_to_image(edited)):
                start = {} if pipeline is edited else {"image": [Image.new("RGB", (32, 32))] * 2}
                with pytest.raises(InputError, match="clip_skip 1 reads a hidden state of text_encoder_2"):
                    drawn(pipeline, clip_skip=1, **start)
        else:
            assert largest_error(drawn(edited, clip_skip=1), drawn(usual, clip_skip=1)) == 0
            with pytest.raises(InputError, match="use at most 1, or leave it out"):
                drawn(edited, clip_skip=2)
        # Asked by name, a graph gives all that it has.
        states = edited.text_encoder_2.run({"input_ids": torch.ones(1, 77, dtype=torch.int64)})
        assert sum(name.startswith("hidden_states.") for name in states) == 4
    with pytest.raises(InputError, match="'text_encoder_2', which is no text encoder of this model"):
        load_onnx_pipeline(onnx_folders("sd1"), ONE_THREAD, {"text_encoder_2": 1})
    with pytest.raises(InputError, match="gives no hidden states, so no layer can be skipped; leave clip_skip out"):
        drawn(load_onnx_pipeline(onnx_folders("sd1"), ONE_THREAD, {"text_encoder": 1}), clip_skip=1)


def small_graph(path: Path, **changes: Any) -> Path:
    """`doubled` [batch, 2] = 2 · `x` [batch, 2]."""
    settings = {"input": "x", "output": "doubled", "kind": TensorProto.FLOAT, **changes}
    shape = ["batch", 2]
    x = helper.make_tensor_value_info(settings["input"], settings["kind"], shape)
    y = helper.make_tensor_value_info(settings["output"], settings["kind"], shape)
    node = helper.make_node("Add", [x.name, x.name], [y.name])
    graph = helper.make_graph([node], "small", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_graph_is_called_by_name(tmp_path):
    graph = OnnxGraph(small_graph(tmp_path / "model.onnx"), ("x",), ("doubled",), ONE_THREAD)
    x = torch.arange(8.0).reshape(2, 4)[:, ::2]
    for given in (x, x.double(), x.half(), x.to(torch.int32), x.clone().requires_grad_()):
        found = graph.run({"x": given})
        assert found.keys() == {"doubled"}
        assert found["doubled"].dtype is torch.float32
        assert torch.equal(found["doubled"], 2 * x)
    found["doubled"].add_(1)
    for inputs, words in (
        ({}, "lacks 'x'; give it x"),
        ({"x": x, "y": x}, "has no input 'y'"),
        ({"x": x[:, :1]}, r"of shape \[any, 2\] only, not \[2, 1\]"),
        ({"x": x[0]}, r"only, not \[2\]"),
    ):
        with pytest.raises(InputError, match=words):
            graph.run(inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": "z"}, "has no input x"),
        ({"output": "z"}, "has no output doubled"),
        ({"kind": TensorProto.BFLOAT16}, "does not load|as tensor.bfloat16"),
    ],
)
def test_another_graph_is_refused(tmp_path, changes, words, capfd):
    with pytest.raises(InputError, match=words):
        OnnxGraph(small_graph(tmp_path / "model.onnx", **changes), ("x",), ("doubled",), ONE_THREAD)
    assert capfd.readouterr().err == ""


def test_a_graph_that_fails_is_one_sentence(tmp_path, capfd):
    path = tmp_path / "model.onnx"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "columns"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "square", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    square = OnnxGraph(path, ("x",), ("y",), ONE_THREAD)
    assert torch.equal(square.run({"x": torch.eye(2)})["y"], torch.eye(2))
    with pytest.raises(InputError, match=r"failed in .*model.onnx \(.*\); if memory is short") as refused:
        square.run({"x": torch.ones(2, 3)})
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_output(path: Path) -> None:
    model = onnx.load(path)
    old = model.graph.output[-1].name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == old else name for name in names]
    model.graph.output[-1].name = "renamed"
    onnx.save(model, path)


def add_input(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    onnx.save(model, path)


def put_weights_outside(path: Path) -> None:
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=1024)
    (path.parent / "weights").rename(path.parent.parent / "weights")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    path.write_bytes(model.SerializeToString())


SABOTAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda it: (it / "model_index.json").unlink(), "model_index.json is missing"),
    "no UNet": (lambda it: shutil.rmtree(it / "unet"), "unet/config.json is missing"),
    "no graph": (lambda it: (it / "vae_encoder/model.onnx").unlink(), "vae_encoder/model.onnx is missing; export"),
    "no second encoder": (lambda it: shutil.rmtree(it / "text_encoder_2"), "text_encoder_2/config.json is missing"),
    "no tokenizer": (lambda it: shutil.rmtree(it / "tokenizer_2"), "tokenizer_2/vocab.json is missing"),
    "no scheduler": (lambda it: shutil.rmtree(it / "scheduler"), "scheduler_config.json is missing"),
    "foreign scheduler": (
        lambda it: edit_json(it / "model_index.json", scheduler=["elsewhere", "Evil"]), "wants the scheduler 'Evil'"
    ),
    "unnamed scheduler": (lambda it: edit_json(it / "model_index.json", scheduler="x"), "wants the scheduler ''"),
    "output": (lambda it: rename_output(it / "unet/model.onnx"), "unet/model.onnx has no output out_sample"),
    "hidden state": (lambda it: rename_output(it / "text_encoder/model.onnx"), "no output hidden_states.3"),
    "input": (lambda it: add_input(it / "vae_decoder/model.onnx"), "wants an input 'mask'"),
    "swapped": (
        lambda it: shutil.copy(it / "vae_decoder/model.onnx", it / "unet/model.onnx"),
        "unet/model.onnx has no input sample",
    ),
    "cut": (
        lambda it: (it / "unet/model.onnx").write_bytes((it / "unet/model.onnx").read_bytes()[:-500]),
        "unet/model.onnx does not load in ONNX Runtime",
    ),
    "not ONNX": (lambda it: (it / "unet/model.onnx").write_bytes(b"hello"), "does not load in ONNX Runtime"),
    "outside": (lambda it: put_weights_outside(it / "text_encoder/model.onnx"), "model.onnx does not load .*escapes"),
    "other kind": (
        lambda it: shutil.copy(it / "vae_decoder/config.json", it / "unet/config.json"),
        "config.json is of a 'AutoencoderKL', not a UNet2DConditionModel",
    ),
    "no kind": (lambda it: (it / "text_encoder/config.json").write_text("{}"), "of a None, not a clip_text_model"),
    "scaling": (lambda it: edit_json(it / "vae_encoder/config.json", scaling_factor=1.0), "different configurations"),
    "endless": (lambda it: edit_json(it / "unet/config.json", layers_per_block=10**9), "more than any model"),
    "widths": (lambda it: edit_json(it / "text_encoder/config.json", hidden_size=64), "text encoders of width"),
    "guidance": (lambda it: edit_json(it / "unet/config.json", time_cond_proj_dim=32), "guidance as an input"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SABOTAGE)
def test_a_folder_that_is_not_whole_is_refused(onnx_folders, tmp_path, fault, capfd):
    folder = Path(shutil.copytree(onnx_folders("sdxl"), tmp_path / "onnx"))
    break_it, words = SABOTAGE[fault]
    break_it(folder)
    with pytest.raises(InputError, match=words) as refused:
        load_onnx_pipeline(folder, ONE_THREAD)
    assert "\n" not in str(refused.value)
    assert "onnxruntime" not in capfd.readouterr().err.lower()


def test_weights_beside_the_graph_are_read(onnx_folders, tmp_path, pipelines):
    folder = Path(shutil.copytree(onnx_folders("sd1"), tmp_path / "onnx"))
    path = folder / "unet" / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=1024)
    assert (path.parent / "model.onnx_data").stat().st_size > path.stat().st_size / 10
    assert largest_error(drawn(load_onnx_pipeline(folder, ONE_THREAD)), drawn(pipelines("sd1")[0])) == 0


def test_settings_reach_every_session(onnx_folders, monkeypatch):
    settings = SessionSettings(threads=3, arena=False, memory_pattern=True)
    pipeline = load_onnx_pipeline(onnx_folders("sdxl"), settings)
    graphs = [getattr(pipeline, name).graph for name in ("text_encoder", "text_encoder_2", "unet")]
    for graph in (*graphs, pipeline.vae.encoder, pipeline.vae.decoder):
        options = graph.session.get_session_options()
        found = (options.intra_op_num_threads, options.enable_cpu_mem_arena, options.enable_mem_pattern)
        assert found == (3, False, True)
        assert graph.session.get_providers() == ["CPUExecutionProvider"]
    asked = []

    def spied(path: Path, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback
        asked.append(providers)
        raise RuntimeError("enough")

    monkeypatch.setattr(onnxruntime, "InferenceSession", spied)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    options = {"CUDAExecutionProvider": {"device_id": "1"}}
    with pytest.raises(InputError, match="enough"):
        load_onnx_pipeline(onnx_folders("sdxl"), SessionSettings(("CUDAExecutionProvider",), options))
    assert asked == [[("CUDAExecutionProvider", {"device_id": "1"})]]


def test_a_provider_that_is_not_there_is_refused(onnx_folders, monkeypatch):
    with pytest.raises(InputError, match=r"no 'NoExecutionProvider'; choose from .*CPUExecutionProvider"):
        load_onnx_pipeline(onnx_folders("sdxl"), SessionSettings(("CPUExecutionProvider", "NoExecutionProvider")))
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(InputError, match="has CPUExecutionProvider but could not start it"):
        load_onnx_pipeline(onnx_folders("sdxl"), ONE_THREAD)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"providers": ()}, "no execution provider"),
        ({"threads": 0}, "threads is 0"),
        ({"provider_options": {"CUDAExecutionProvider": {}}}, "options for 'CUDAExecutionProvider'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SessionSettings(**settings)


def test_without_onnx_runtime_the_cure_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'bakeout\[cpu\]'"):
        load_onnx_pipeline(tmp_path)
