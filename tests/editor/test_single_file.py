"""Single-file checkpoints: names, what decides their configuration, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor import single_file
from bakeout.editor.architecture import build
from bakeout.editor.errors import InputError
from bakeout.editor.ldm_names import TEXT_PREFIXES, clip_location, open_clip_location, unet_location, vae_location
from bakeout.editor.model import open_model

Folders = Callable[[str], Path]
Modules = Callable[[str], dict[str, torch.nn.Module]]
Ldm = Callable[[str, Mapping[str, torch.nn.Module]], dict[str, torch.Tensor]]
FAMILIES = ("sd1", "sd2", "sdxl")
SHIPPED = {"sd15": "sd1", "sd21": "sd2", "sd21-base": "sd2", "sdxl": "sdxl"}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_same_values_under_our_names(
    single_files: Folders, modules: Modules, tmp_path: Path, family: str
) -> None:
    import diffusers

    from bakeout.editor.pipeline import pipeline_classes

    path = single_files(family)
    config = tmp_path / "config"
    config.symlink_to(path.with_suffix(""))
    for tokenizer in config.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            (tokenizer / name).write_bytes((single_file.TOKENIZER / name).read_bytes())
    diffusers.utils.logging.disable_progress_bar()
    pipeline = pipeline_classes()[family == "sdxl"].from_single_file(
        str(path), config=str(config), local_files_only=True
    )
    diffusers.utils.logging.enable_progress_bar()
    for name, written in modules(family).items():
        loaded = getattr(pipeline, name).state_dict()
        assert loaded.keys() == written.state_dict().keys()
        for key, value in written.state_dict().items():
            assert torch.equal(loaded[key], value.float()), key


def full_size(config: str) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a real checkpoint."""
    folder = single_file.CONFIGS / config
    family = SHIPPED[config]
    stored: dict[str, tuple[int, ...]] = {}
    index = json.loads((folder / "model_index.json").read_text())
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if component not in index:
            continue
        module = build(index[component][1], json.loads((folder / component / "config.json").read_text()))
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for name, shape in shapes.items():
            if component == "unet":
                location = unet_location(name, shapes)
            elif component == "vae":
                location = vae_location(name, shapes, "first_stage_model.")
            else:
                prefix, open_clip = TEXT_PREFIXES[family, component]
                location = (open_clip_location if open_clip else clip_location)(name, prefix)
            stored[location.tensor] = location.stored_shapes(shape)[-1]
    return stored


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", size: int = 2) -> Path:
    """A safetensors file of these shapes whose data is a hole: gigabytes that take no room."""
    header, position = {}, 0
    for name, shape in shapes.items():
        length = size * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + position)
    return path


# From the published checkpoints (v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0).
KNOWN: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.2.bias": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.mid.block_2.norm1.weight": (512,),
        "cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc2.weight": (768, 3072),
    },
    "sd21": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.bias": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
}
# Tensors of the UNet, VAE and text encoders in those files: UNet 686 or 1680, VAE 248, CLIP-L 196, OpenCLIP 12 a layer.
COUNTS = {"sd15": 686 + 248 + 196, "sd21": 686 + 248 + 23 * 12 + 4, "sdxl": 1680 + 248 + 196 + 32 * 12 + 5}


@pytest.mark.parametrize("config", KNOWN)
def test_names_and_shapes_are_those_of_the_published_files(config: str) -> None:
    stored = full_size(config)
    assert len(stored) == COUNTS[config]
    assert {name: stored.get(name) for name in KNOWN[config]} == KNOWN[config]


@pytest.mark.parametrize(("config", "ffn2", "text"), [("sd15", 16, 12), ("sd21-base", 16, 23), ("sdxl", 70, 44)])
def test_full_size_single_files_open_with_the_shipped_configurations(
    tmp_path: Path, config: str, ffn2: int, text: int
) -> None:
    model = open_model(write_sparse(tmp_path / "full.safetensors", full_size(config)))
    assert model.family == SHIPPED[config]
    kinds = ("ffn1", "ffn2", "attn_key", "attn_value", "attn_out")
    assert [len(model.sites_of(kind)) for kind in kinds] == [ffn2] * 5
    assert len(model.sites_of("text_layer")) == len(model.sites_of("text_ffn2")) == text
    assert (model.site("unet.mid.attn.0.block.0.ffn2").d_in, model.site("text_encoder.layer.9").d_out) == (
        5120, 1024 if model.family == "sd2" else 768,
    )  # fmt: skip


@pytest.mark.parametrize("config", SHIPPED)
def test_the_shipped_configurations_are_whole(config: str) -> None:
    folder = single_file.CONFIGS / config
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == index["scheduler"][1]
    assert scheduler["prediction_type"] == ("v_prediction" if config == "sd21" else "epsilon")
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json", *(name for name, value in index.items() if isinstance(value, list) and value[0])
    }  # fmt: skip


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_shipped_vocabulary_tokenises_as_clip_does(pad: str) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(single_file.TOKENIZER, local_files_only=True, pad_token=pad)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (49406, 49407, 49408)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("A  PHOTO", padding="max_length", truncation=True).input_ids
    assert padded == [49406, 320, 1125, 49407, *[0 if pad == "!" else 49407] * 73]
    assert tokenizer.decode(tokenizer("naïve 猫 🙂").input_ids, skip_special_tokens=True).strip() == "naïve 猫 🙂"


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_that_of_the_family(single_files: Folders, tiny_configs: None, family: str) -> None:
    pipeline = open_model(single_files(family)).pipeline()
    names = ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",)
    expected = {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[family]
    assert [getattr(pipeline, name)("a", padding="max_length").input_ids[-1] for name in names] == expected
    assert {getattr(pipeline, name).model_max_length for name in names} == {77}


def rewritten(path: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata=metadata or None)
    return path


LAST_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
PREDICTIONS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], dict[str, str], str]] = {
    "narrow bias": ("sd2", lambda t: None, {}, "epsilon"),
    "wide bias": ("sd2", lambda t: t.update({LAST_BIAS: torch.tensor([0.2, -0.2] * 8).half()}), {}, "v_prediction"),
    "wide bias in bfloat16": (
        "sd2", lambda t: t.update({LAST_BIAS: torch.tensor([0.2, -0.2] * 8).bfloat16()}), {}, "v_prediction",
    ),
    "constant bias": ("sd2", lambda t: t.update({LAST_BIAS: torch.ones(16)}), {}, "epsilon"),
    "metadata over bias": (
        "sd2", lambda t: t.update({LAST_BIAS: torch.tensor([0.2, -0.2] * 8)}), {"modelspec.prediction_type": "epsilon"},
        "epsilon",
    ),
    "metadata": ("sd1", lambda t: None, {"modelspec.prediction_type": "v"}, "v_prediction"),
    "bias of SD 1.x": ("sd1", lambda t: t.update({LAST_BIAS: torch.tensor([0.2, -0.2] * 8)}), {}, "epsilon"),
    "v_pred": ("sdxl", lambda t: t.update(v_pred=torch.tensor([])), {}, "v_prediction"),
}  # fmt: skip


@pytest.mark.parametrize("case", PREDICTIONS)
def test_what_the_unet_predicts(single_files: Folders, tiny_configs: None, tmp_path: Path, case: str) -> None:
    family, change, metadata, expected = PREDICTIONS[case]
    model = open_model(rewritten(tmp_path / "m.safetensors", single_files(family), change, **metadata))
    assert model.parts["scheduler"].config["prediction_type"] == expected
    assert model.pipeline().scheduler.config.prediction_type == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('    parameterization: "v"', "v_prediction"),
        ("parameterization: eps # v", "epsilon"),
        ("# parameterization: v", ""),
    ],
)
def test_the_yaml_beside_a_checkpoint_decides(
    single_files: Folders, tiny_configs: None, tmp_path: Path, line: str, expected: str
) -> None:
    wide = torch.tensor([0.2, -0.2] * 8)
    path = rewritten(tmp_path / "m.safetensors", single_files("sd2"), lambda t: t.update({LAST_BIAS: wide}))
    path.with_suffix(".yaml").write_text(f"model:\n  params:\n{line}\n")
    found = open_model(path).parts["scheduler"].config["prediction_type"]
    assert found == (expected or "v_prediction")


def test_zero_terminal_snr_is_kept(single_files: Folders, tiny_configs: None, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "m.safetensors", single_files("sdxl"), lambda t: t.update(ztsnr=torch.tensor([])))
    assert open_model(path).pipeline().scheduler.config.rescale_betas_zero_snr is True


def test_a_vae_under_comfyuis_prefix(
    single_files: Folders, tiny_configs: None, tmp_path: Path, modules: Modules
) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            tensors[f"vae.{name.removeprefix('first_stage_model.')}"] = tensors.pop(name)

    pipeline = open_model(rewritten(tmp_path / "m.safetensors", single_files("sd1"), rename)).pipeline()
    written = modules("sd1")["vae"].state_dict()
    assert all(torch.equal(value, written[name]) for name, value in pipeline.vae.state_dict().items())


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "LoRA": ({"lora_unet_down_blocks_0.lora_up.weight": (4, 4)}, "a LoRA"),
    "embedding": ({"emb_params": (2, 768)}, "textual-inversion"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
    "diffusers ControlNet": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
    "motion": ({"down_blocks.0.motion_modules.0.x": (4,)}, "AnimateDiff"),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (4, 4)}, "Stable Diffusion 3"),
    "Flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "Flux"),
    "PixArt": ({"caption_projection.y_embedding": (120, 4096)}, "PixArt"),
    "Playground": ({"model.diffusion_model.out.0.bias": (4,), "edm_mean": (4,)}, "Playground"),
    "refiner": ({"model.diffusion_model.out.0.bias": (4,), "conditioner.embedders.0.model.text_projection": (4, 4)},
                "SDXL refiner"),
    "inpainting": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "inpainting"),
    "instruct-pix2pix": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "instruct-pix2pix"),
    "upscaler": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 7, 3, 3)}, "upscaler"),
    "sixteen channels": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 16, 3, 3)}, "takes 16 channels"),
    "diffusers UNet": ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "one component of a diffusers folder"),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "one component of a diffusers folder"),
    "LDM VAE": ({"decoder.up.0.block.0.norm1.bias": (4,)}, "a VAE"),
    "OpenCLIP": ({"transformer.resblocks.0.ln_1.bias": (4,)}, "a text encoder"),
    "bare UNet": ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet"),
    "language model": ({"model.layers.0.mlp.up_proj.weight": (4, 4)}, "not an image model"),
    "nothing": ({}, "not an image model"),
    "no text encoder": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "no CLIP text encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_anything_else_is_named_with_what_is_supported(tmp_path: Path, case: str) -> None:
    shapes, message = OTHERS[case]
    path = write_sparse(tmp_path / "m.safetensors", shapes)
    with pytest.raises(InputError, match=message) as caught:
        open_model(path)
    assert "SDXL" in str(caught.value) or "all components" in str(caught.value)


def test_a_model_of_other_sizes_is_refused(single_files: Folders) -> None:
    with pytest.raises(
        InputError, match=r"tensor '.+' with shape \[.+\] where .+ of sd15 needs \[.+give the diffusers"
    ):
        open_model(single_files("sd1"))


def drop(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = [name for name in tensors if any(part in name for part in parts)]
        assert found
        for name in found:
            del tensors[name]

    return change


FFN2 = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no VAE": (drop("first_stage_model."), r"no vae \(first_stage_model"),
    "no UNet": (drop("model.diffusion_model."), "a VAE"),
    "missing tensor": (drop(FFN2), f"tensor '{FFN2}' is missing"),
    "left over": (lambda t: t.update({f"{FFN2}.scale": torch.ones(1)}), f"'{FFN2}.scale'.*no place"),
    "transposed": (lambda t: t.update({FFN2: t[FFN2].T.contiguous()}), r"shape \[64, 16\] where .* needs \[16, 64\]"),
    "8-bit": (lambda t: t.update({FFN2: t[FFN2].to(torch.float8_e4m3fn)}), "as F8_E4M3, but only F16"),
    "integers": (lambda t: t.update({FFN2: t[FFN2].to(torch.int8)}), "as I8, but only F16"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_sentence(
    single_files: Folders, tiny_configs: None, tmp_path: Path, case: str
) -> None:
    change, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as caught:
        open_model(rewritten(tmp_path / "m.safetensors", single_files("sd1"), change))
    assert "\n" not in str(caught.value)


def test_only_the_last_layer_of_sd2_may_be_left_over(single_files: Folders, tiny_configs: None, tmp_path: Path) -> None:
    extra = "cond_stage_model.model.transformer.resblocks.4.ln_1.bias"
    path = rewritten(tmp_path / "m.safetensors", single_files("sd2"), lambda t: t.update({extra: torch.ones(32)}))
    with pytest.raises(InputError, match=extra):
        open_model(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_a_pickle_is_refused_with_the_cure(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save({}, path)
    with pytest.raises(InputError, match=r"pickle.*safe_serialization=True"):
        open_model(path)
    with pytest.raises(InputError, match="PyTorch pickle"):
        open_model(path.rename(tmp_path / "m.safetensors"))


@pytest.mark.slow
def test_a_full_size_single_file_loads(tmp_path: Path) -> None:
    shapes = full_size("sd15")
    path = write_sparse(tmp_path / "full.safetensors", shapes)
    model = open_model(path)
    site = model.site("unet.up.3.attn.2.block.0.ffn2")
    stored = model.tensor(site)
    assert stored is not None
    with path.open("r+b") as stream:
        stream.seek(stored.begin)
        stream.write(torch.full(stored.shape, 0.5, dtype=torch.float16).numpy().tobytes())
    pipeline = model.pipeline()
    weight = model.module(pipeline, site).get_parameter("weight")
    assert torch.equal(weight, torch.full(stored.shape, 0.5, dtype=torch.float16))
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 859_520_964
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float16}
