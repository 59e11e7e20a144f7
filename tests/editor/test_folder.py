"""Diffusers folders: variants, shards, old names, and every way in which they are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor.architecture import describe
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model

Folders = Callable[[str], Path]
Modules = Callable[[str], dict[str, torch.nn.Module]]
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def shard(folder: Path, stem: str, variant: str = "") -> Path:
    """Split a component's weights into two shards with an index, as save_pretrained names them."""
    tensors = load_file(folder / f"{stem}.safetensors")
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}{variant}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{stem}.safetensors").unlink()
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def assert_loads(folder: Path, written: dict[str, torch.nn.Module]) -> None:
    pipeline = open_model(folder).pipeline()
    for name, module in written.items():
        state = getattr(pipeline, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("variant", [".fp16", ".bf16"])
def test_a_folder_of_one_variant(copied: Folders, modules: Modules, variant: str) -> None:
    folder = copied("sd1")
    for component, name in WEIGHTS.items():
        path = folder / component / name
        path.rename(path.with_name(name.replace(".safetensors", f"{variant}.safetensors")))
    assert_loads(folder, modules("sd1"))


def test_full_precision_is_preferred_to_a_variant(copied: Folders, modules: Modules) -> None:
    folder = copied("sd1")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert_loads(folder, modules("sd1"))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_sharded_folder(copied: Folders, modules: Modules, variant: str) -> None:
    folder = copied("sdxl")
    shard(folder / "unet", "diffusion_pytorch_model", variant)
    shard(folder / "text_encoder_2", "model", variant)
    assert len(open_model(folder).components["unet"].files) == 2
    assert_loads(folder, modules("sdxl"))


def test_shards_and_variants_are_named_as_diffusers_names_them(copied: Folders, modules: Modules) -> None:
    folder = copied("sd1")
    shutil.rmtree(folder / "unet")
    modules("sd1")["unet"].save_pretrained(folder / "unet", max_shard_size="100KB", variant="fp16")  # type: ignore[operator]
    assert len(open_model(folder).components["unet"].files) > 2
    assert_loads(folder, modules("sd1"))


def test_a_vae_with_the_attention_names_of_early_diffusers(copied: Folders, modules: Modules) -> None:
    folder = copied("sd1")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            for new, early in old.items():
                if f".attentions.0.{new}." in name:
                    tensors[name.replace(f".{new}.", f".{early}.")] = tensors.pop(name)

    change_tensors(folder / "vae" / WEIGHTS["vae"], rename)
    model = open_model(folder)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in model.components["vae"].tensors
    assert_loads(folder, modules("sd1"))


def test_a_text_encoder_under_the_names_of_the_other_transformers(copied: Folders, modules: Modules) -> None:
    folder = copied("sd1")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        nested = any(name.startswith("text_model.") for name in tensors)
        for name in list(tensors):
            tensors[name.removeprefix("text_model.") if nested else f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    before = open_model(folder).site("text_encoder.layer.1.ffn2")
    change_tensors(folder / "text_encoder" / "model.safetensors", rename)
    after = open_model(folder).site("text_encoder.layer.1.ffn2")
    assert after.weight != before.weight
    assert after.module == before.module
    assert_loads(folder, modules("sd1"))


def test_optional_components_may_be_there_null_or_missing(copied: Folders, modules: Modules) -> None:
    folder = copied("sd1")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
    )
    assert_loads(folder, modules("sd1"))
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert_loads(folder, modules("sd1"))


def test_a_latent_consistency_model_is_a_stable_diffusion_with_one_more_input(copied: Folders) -> None:
    folder = copied("sd1")
    edit(folder / "unet" / "config.json", time_cond_proj_dim=12)
    edit(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    change_tensors(
        folder / "unet" / WEIGHTS["unet"],
        lambda t: t.update({"time_embedding.cond_proj.weight": torch.ones(16, 12).half()}),
    )
    model = open_model(folder)
    assert model.family == "sd1"
    assert len(model.sites_of("ffn2")) == 16
    pipeline = model.pipeline(dtype=torch.float32)
    assert pipeline("a", num_inference_steps=1, height=32, width=32, output_type="pt").images.shape == (1, 3, 32, 32)


def test_a_tokenizer_of_vocab_and_merges(copied: Folders) -> None:
    from bakeout.editor.single_file import TOKENIZER

    folder = copied("sd1")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    assert open_model(folder).pipeline().tokenizer("a photo of a cat").input_ids[1:4] == [320, 1125, 539]


SITE = "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2.weight"
Change = Callable[[Path], object]


def tensors(change: Callable[[dict[str, torch.Tensor]], object], component: str = "unet") -> Change:
    return lambda folder: change_tensors(folder / component / WEIGHTS[component], change)


def config(component: str, **change: Any) -> Change:
    return lambda folder: edit(folder / component / "config.json", **change)


def index(**change: Any) -> Change:
    return lambda folder: edit(folder / "model_index.json", **change)


def content(path: str, value: bytes) -> Change:
    return lambda folder: (folder / path).write_bytes(value)


def directory(path: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).mkdir()

    return apply


def sharded(**change: Any) -> Change:
    return lambda folder: edit(shard(folder / "unet", "diffusion_pytorch_model"), **change)


def shard_map(change: Callable[[dict[str, str]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = shard(folder / "unet", "diffusion_pytorch_model")
        value = json.loads(path.read_text())
        change(value["weight_map"])
        path.write_text(json.dumps(value))

    return apply


def only(*names: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / "unet" / WEIGHTS["unet"]).unlink()
        for name in names:
            (folder / "unet" / name).write_bytes(b"x")

    return apply


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN: dict[str, tuple[Change, str]] = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "model_index a list": (content("model_index.json", b"[]"), "is not a JSON object"),
    "model_index no JSON": (content("model_index.json", b"{"), "is not JSON"),
    "model_index deep": (content("model_index.json", b"[" * 100_000), "is not JSON"),
    "model_index huge": (content("model_index.json", b" " * 16_000_001), "too large"),
    "model_index a pointer": (content("model_index.json", LFS), "git lfs pull"),
    "no class": (index(_class_name=None), "custom pipeline, whose code is never run"),
    "custom pipeline": (index(_class_name=["my_pipeline", "MyPipeline"]), "custom pipeline, whose code is never run"),
    "custom component": (index(unet=["my_unet", "UNet2DConditionModel"]), "code that is never run"),
    "module path": (index(unet=["diffusers.models", "UNet2DConditionModel"]), "code that is never run"),
    "class no string": (index(vae=["diffusers", ["AutoencoderKL"]]), "code that is never run"),
    "other UNet": (index(unet=["diffusers", "UNet2DModel"]), "makes unet a 'UNet2DModel'"),
    "other VAE": (index(vae=["diffusers", "AutoencoderTiny"]), "makes vae a 'AutoencoderTiny'"),
    "T5": (index(text_encoder=["transformers", "T5EncoderModel"]), "makes text_encoder a 'T5EncoderModel'"),
    "transformer": (index(transformer=["diffusers", "SD3Transformer2DModel"]), "a diffusion transformer"),
    "ControlNet": (index(controlnet=["diffusers", "ControlNetModel"]), "with a component 'controlnet'"),
    "traversal": (index(**{"../../etc": ["diffusers", "AutoencoderKL"]}), r"with a component '../../etc'"),
    "UNet not named": (index(unet=[None, None]), "no unet in its model_index"),
    "no text encoder named": (index(text_encoder=[None, None]), "no text_encoder in its model_index"),
    "tokenizer not named": (index(tokenizer=[None, None]), "a text_encoder but no tokenizer"),
    "unknown scheduler": (index(scheduler=["diffusers", "MagicScheduler"]), "scheduler 'MagicScheduler', which"),
    "scheduler no scheduler": (index(scheduler=["diffusers", "AutoencoderKL"]), "scheduler 'AutoencoderKL', which"),
    "scheduler a module": (index(scheduler=["diffusers", "__builtins__"]), "which this diffusers lacks"),
    "other tokenizer": (index(tokenizer=["transformers", "T5Tokenizer"]), "tokenizer class 'T5Tokenizer'"),
    "no scheduler file": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "vocab.json is missing"),
    "no VAE": (lambda f: shutil.rmtree(f / "vae"), "vae is missing"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), "config.json is missing"),
    "config a folder": (directory("unet/config.json"), "cannot be read"),
    "no weights": (only(), r"no weights \(diffusion_pytorch_model.safetensors is missing\)"),
    "pickle": (only("diffusion_pytorch_model.bin"), r"only as a pickle; .*safe_serialization=True"),
    "other variant": (only("diffusion_pytorch_model.non_ema.safetensors"), "but 'diffusion_pytorch_model.non_ema"),
    "LFS pointer": (content("unet/" + WEIGHTS["unet"], LFS), "git lfs pull"),
    "empty weights": (content("vae/" + WEIGHTS["vae"], b""), "is empty"),
    "missing tensor": (tensors(lambda t: t.pop(SITE)), f"tensor '{SITE}' is missing"),
    "left over": (tensors(lambda t: t.update({"x.lora_A.weight": torch.ones(2)})), "'x.lora_A.weight'.* no place"),
    "shape": (tensors(lambda t: t.update({SITE: t[SITE][:8]})), rf"'{SITE}' with shape \[8, 64\] where .* \[16, 64\]"),
    "dtype": (tensors(lambda t: t.update({SITE: t[SITE].to(torch.uint8)})), f"'{SITE}' as U8"),
    "VAE with two names for one": (
        tensors(lambda t: t.update({"encoder.mid_block.attentions.0.query.weight": torch.ones(16, 16)}), "vae"),
        "query.weight'.*no place",
    ),
    "config and weights differ": (config("unet", cross_attention_dim=48), r"where .*config.json needs \[\d+, 48\]"),
    "layers without end": (config("text_encoder", num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "blocks without end": (config("unet", layers_per_block=[2, 2, 10**9, 2]), "asks for 1000000000 layers"),
    "deep blocks": (config("unet", transformer_layers_per_block=[[1, 10**9]] * 4), "asks for 1000000000 layers"),
    "huge width": (config("text_encoder", hidden_size=2**30, num_attention_heads=1), "needs"),
    "overflowing width": (config("text_encoder", hidden_size=2**70), "does not describe a working CLIPTextModel"),
    "nonsense": (config("unet", block_out_channels="many"), "does not describe a working UNet2DConditionModel"),
    "no heads": (config("text_encoder", num_attention_heads=0), "does not describe a working CLIPTextModel"),
    "inpainting": (config("unet", in_channels=9), r"needs \[16, 9, 3, 3\]"),
    "unknown block": (config("unet", mid_block_type="UNetMidBlock2D"), "mid_block.attentions.*no place"),
    "sharded outside": (sharded(weight_map={"a": "../../secret.safetensors"}), "outside its folder"),
    "sharded absolute": (sharded(weight_map={"a": "/etc/passwd.safetensors"}), "outside its folder"),
    "sharded pickle": (sharded(weight_map={"a": "x.bin"}), "outside its folder"),
    "no weight_map": (sharded(weight_map=None), "no weight_map"),
    "empty weight_map": (sharded(weight_map={}), "no weight_map"),
    "weight_map of numbers": (sharded(weight_map={"a": 1}), "no weight_map"),
    "shard missing": (sharded(weight_map={"a": "x-00003-of-00003.safetensors"}), "does not exist"),
    "promised tensor": (shard_map(lambda m: m.update(extra=m[SITE])), "promises tensor 'extra'"),
    "unlisted tensor": (shard_map(lambda m: m.pop(SITE)), f"does not list tensor '{SITE}'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_sentence(copied: Folders, case: str) -> None:
    change, message = BROKEN[case]
    folder = copied("sd1")
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def reshaped(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t.update({name: torch.zeros(shape).half()})


def unet(change: Callable[[dict[str, torch.Tensor]], object], **settings: Any) -> Change:
    return lambda folder: (tensors(change)(folder), config("unet", **settings)(folder))


def widen(stored: dict[str, torch.Tensor]) -> None:
    for name, value in stored.items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            stored[name] = torch.zeros(value.shape[0], 48).half()


def refiner(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])


@pytest.mark.parametrize("value", [None, 0, 9, "x", [], [1], {}])
def test_an_sdxl_whose_size_embedding_does_not_fit_is_refused(copied: Folders, value: object) -> None:
    folder = copied("sdxl")
    edit(folder / "unet" / "config.json", addition_time_embed_dim=value)
    with pytest.raises(InputError, match="size and crop embedding does not fit"):
        open_model(folder)


# Consistent in themselves, so only their structure says that they are something else.
OTHERS: dict[str, tuple[str, Change, str]] = {
    "inpainting": ("sd1", unet(reshaped("conv_in.weight", 16, 9, 3, 3), in_channels=9), "an inpainting model"),
    "instruct-pix2pix": ("sd1", unet(reshaped("conv_in.weight", 16, 8, 3, 3), in_channels=8), "instruct-pix2pix"),
    "upscaler": ("sd1", unet(reshaped("conv_in.weight", 16, 7, 3, 3), in_channels=7), "an upscaler"),
    "class labels": ("sd1", unet(reshaped("class_embedding.weight", 5, 64), num_class_embeds=5), "num_class_embeds"),
    "refiner": ("sdxl", refiner, "SDXL refiner"),
    "half an SDXL": ("sdxl", index(text_encoder_2=[None, None]), "wants text_encoder and text_encoder_2"),
    "mixed widths": ("sd1", unet(widen, cross_attention_dim=48), "of width 32 but a UNet for width 48"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_kind_of_model_says_what_it_is(copied: Folders, case: str) -> None:
    family, change, message = OTHERS[case]
    folder = copied(family)
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_model(folder)
    assert "SDXL" in str(caught.value) or "one model" in str(caught.value)


def test_a_vae_of_another_latent_space_is_refused(copied: Folders, modules: Modules) -> None:
    from diffusers import AutoencoderKL

    folder = copied("sd1")
    settings = {**modules("sd1")["vae"].config, "latent_channels": 16}  # type: ignore[dict-item]
    AutoencoderKL.from_config(settings).save_pretrained(folder / "vae")
    with pytest.raises(InputError, match="a VAE with 16 latent channels but a UNet for 4"):
        open_model(folder)


def test_what_only_loading_finds_is_one_sentence_too(copied: Folders) -> None:
    folder = copied("sd1")
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="magic")
    with pytest.raises(InputError, match="does not describe a working PNDMScheduler"):
        open_model(folder).pipeline()
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="linear")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer in .* does not load"):
        open_model(folder).pipeline()


def test_a_folder_that_is_no_pipeline_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save_pretrained wrote"):
        open_model(tmp_path)
    (tmp_path / "anime.safetensors").touch()
    with pytest.raises(InputError, match=r"if 'anime.safetensors' in it is the checkpoint, give its path"):
        open_model(tmp_path)
    (tmp_path / "anime.ckpt").touch()
    with pytest.raises(InputError, match="only a pickle checkpoint"):
        open_model(tmp_path)


def test_a_description_is_its_caller_s_own(root):
    """Built once for a configuration, and never changed by whoever asked first."""
    config = json.loads((root / "editor" / "configs" / "sd15" / "text_encoder" / "config.json").read_text())
    shapes, effective = describe("CLIPTextModel", config, "config.json", None)
    wanted = dict(shapes), dict(effective)
    shapes.clear()
    effective.clear()
    assert describe("CLIPTextModel", dict(reversed(config.items())), "config.json", None) == wanted
    other = describe("CLIPTextModel", {**config, "num_hidden_layers": 2}, "config.json", None)
    assert other[1]["num_hidden_layers"] == 2
    assert len(other[0]) < len(wanted[0])
