"""What tests of several folders share: tiny models of each family, written by the real libraries; no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    import torch

# Last, so that nothing here stands for a library of its name.
sys.path.append(str(Path(__file__).parent))

from what_ran import pytest_addoption, pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]

# The models of the tests are tiny: on a busy machine several threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "editor" / "configs"
# A different dtype for each component: a loader that casts or mixes them up is seen.
DTYPES = {"unet": "float16", "vae": "float32", "text_encoder": "bfloat16", "text_encoder_2": "float16"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
        "projection_dim": 32}  # fmt: skip
VAE = {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
       "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}  # fmt: skip
UNET = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 4, "attention_head_dim": 2, "sample_size": 8}
# What each tiny model changes in the shipped configuration of its family: sizes, never structure.
TINY: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sd1": ("sd15", {"unet": {**UNET, "cross_attention_dim": 32}, "vae": VAE, "text_encoder": TEXT}),
    "sd2": ("sd21", {"unet": {**UNET, "cross_attention_dim": 32, "attention_head_dim": [2, 2, 4, 4]}, "vae": VAE,
                     "text_encoder": TEXT}),
    "sdxl": ("sdxl", {"unet": {**UNET, "block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4],
                               "cross_attention_dim": 80, "addition_time_embed_dim": 8,
                               "projection_class_embeddings_input_dim": 88, "transformer_layers_per_block": [1, 2, 3]},
                      "vae": VAE, "text_encoder": TEXT,
                      "text_encoder_2": {**TEXT, "hidden_size": 48, "projection_dim": 40}}),
}  # fmt: skip
FAMILIES = tuple(TINY)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x diffusers folder with random weights: 16 px pictures, in milliseconds."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        model_max_length=77,
        pad_token="<|endoftext|>",
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_configs(family: str, folder: Path) -> None:
    """The configurations of a tiny model, as `editor/configs` has those of the real ones."""
    base, changes = TINY[family]
    for path in (CONFIGS / base).rglob("*.json"):
        target = folder / path.relative_to(CONFIGS / base)
        write(target, {**read(path), **(changes.get(path.parent.name, {}) if path.name == "config.json" else {})})


def random_modules(family: str) -> dict[str, torch.nn.Module]:
    """Every network of a tiny model with random values of its own in every parameter, in the dtypes of `DTYPES`."""
    import torch

    from bakeout.editor.architecture import build

    base, changes = TINY[family]
    index = read(CONFIGS / base / "model_index.json")
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    modules = {}
    for name, change in changes.items():
        module = build(index[name][1], {**read(CONFIGS / base / name / "config.json"), **change})
        state = {
            key: torch.randn(value.shape, generator=generator).mul(0.05).to(getattr(torch, DTYPES[name]))
            for key, value in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True)
        modules[name] = module.eval()
    return modules


def write_folder(family: str, folder: Path, modules: Mapping[str, torch.nn.Module]) -> None:
    """A diffusers folder: the networks as the libraries save them, beside the configurations."""
    from transformers import CLIPTokenizer

    from bakeout.editor.single_file import TOKENIZER

    write_configs(family, folder)
    for name, module in modules.items():
        module.save_pretrained(folder / name)  # type: ignore[operator]
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        if tokenizer.is_dir() and name.startswith("text"):
            overrides = read(tokenizer / "tokenizer_config.json")
            CLIPTokenizer.from_pretrained(TOKENIZER, **overrides).save_pretrained(tokenizer)


@pytest.fixture(scope="session")
def modules() -> Callable[[str], dict[str, torch.nn.Module]]:
    """The networks of the tiny model of a family, made once."""
    made: dict[str, dict[str, torch.nn.Module]] = {}
    return lambda family: made.setdefault(family, {}) or made[family].update(random_modules(family)) or made[family]


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, modules: Callable[[str], dict[str, torch.nn.Module]]
) -> Callable[[str], Path]:
    """The diffusers folder of the tiny model of a family, written once; tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("folders")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            write_folder(family, root / family, modules(family))
        return root / family

    return folder


def once(tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[[Path], object]) -> Path:
    """A folder that the first of the processes that test writes for all of them."""
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent
    folder = home / "once" / name
    with FileLock(home / f"{name}.lock"):
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            part.parent.mkdir(exist_ok=True)
            write(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def onnx_folders(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Callable[[str], Path]:
    """The ONNX folder of the tiny model of a family, written once; tests that change it work on a copy."""

    def folder(family: str) -> Path:
        from bakeout.editor.model import open_model
        from bakeout.export.onnx import write_onnx

        return once(tmp_path_factory, f"onnx-{family}", lambda path: write_onnx(open_model(folders(family)), path))

    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An artifact of `tiny_model` for torch and ONNX Runtime, with a third of many weights pruned at random.

    Made once; tests that change it work on a copy.
    """
    return once(tmp_path_factory, "exported", lambda folder: write_exported(folder, tiny_model))


def write_exported(folder: Path, tiny_model: Path) -> None:
    import torch

    from bakeout.editor.edit import Edit, PatchWeightInput
    from bakeout.editor.model import open_model
    from bakeout.export.artifact import making, write_artifact
    from bakeout.export.checkpoint import plan_diffusers
    from bakeout.export.lower import lower, touched_tensors
    from bakeout.export.manifest import base_of

    model = open_model(tiny_model)
    sites = {site.name: site for site in model.sites}
    generator = torch.Generator().manual_seed(0)
    edit = Edit(tuple(
        PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < 0.3)
        for kind in ("ffn2", "attn_value", "text_ffn2") for site in model.sites_of(kind)
    ))  # fmt: skip
    state = {
        component: {name: read_tensor(model.components[component].tensors[name].file, name) for name in names}
        for component, names in touched_tensors(edit, sites).items()
    }
    plan = plan_diffusers(model)
    with making(folder, plan, force=False) as place:
        facts: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}
        artifact = write_artifact(place, plan, base_of(model, "tiny"), edit, lower(edit, sites, state), facts)
    artifact.export("onnx")


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)


PREFIXES = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.text_model.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.text_model.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}


def ldm_state(family: str, modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """A model's tensors as a single file holds them, with what such files hold besides the networks.

    Whether the names are right is not for this to prove: `test_single_file.py` has diffusers read what it makes.
    """
    import torch

    from bakeout.editor import ldm_names

    state: dict[str, torch.Tensor] = {}
    for component, module in modules.items():
        own = module.state_dict()
        for name, value in own.items():
            if component == "unet":
                location = ldm_names.unet_location(name, own)
            elif component == "vae":
                location = ldm_names.vae_location(name, own, "first_stage_model.")
            elif PREFIXES[family, component].endswith(".model."):
                location = ldm_names.open_clip_location(name, PREFIXES[family, component])
            else:
                location = ldm_names.clip_location(name, PREFIXES[family, component])
            if location.change == "third":
                parts = [own[re.sub(r"\.[qkv]_proj\.", f".{part}_proj.", name)] for part in "qkv"]
                state[location.tensor] = torch.cat(parts)
            elif location.change == "transposed":
                state[location.tensor] = value.T.contiguous()
            elif location.change == "pointwise":
                state[location.tensor] = value[..., None, None].contiguous()
            else:
                state[location.tensor] = value
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.full((2, 2), 7.0)
    state["alphas_cumprod"] = torch.ones(4)
    if family != "sd2":
        state[PREFIXES[family, "text_encoder"] + "embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sd2":
        for name in [name for name in state if ".resblocks.2." in name]:
            state[name.replace(".resblocks.2.", ".resblocks.3.")] = torch.full_like(state[name], 9.0)
        state["cond_stage_model.model.text_projection"] = torch.full((32, 32), 9.0)
        state["cond_stage_model.model.logit_scale"] = torch.tensor(9.0)
    return state


@pytest.fixture(scope="session")
def single_files(
    tmp_path_factory: pytest.TempPathFactory, modules: Callable[[str], dict[str, torch.nn.Module]]
) -> Callable[[str], Path]:
    """The single-file checkpoint of the tiny model of a family, written once, beside its configurations `<family>/`."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("single")

    def file(family: str) -> Path:
        path = root / f"{family}.safetensors"
        if not path.exists():
            write_configs(family, root / family)
            save_file(ldm_state(family, modules(family)), path)
        return path

    return file


@pytest.fixture
def tiny_configs(monkeypatch: pytest.MonkeyPatch, single_files: Callable[[str], Path]) -> None:
    """Single files are opened with the tiny configurations in place of the shipped ones."""
    from bakeout.editor import single_file

    for family, prediction in list(single_file.FAMILY_CONFIGS):
        folder = single_files(family).with_suffix("")
        monkeypatch.setitem(single_file.FAMILY_CONFIGS, (family, prediction), folder)


@pytest.fixture
def ldm() -> Callable[[str, Mapping[str, torch.nn.Module]], dict[str, torch.Tensor]]:
    """`ldm_state`, for tests that write a single file of their own."""
    return ldm_state


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's diffusers folder that the test may change."""

    def copy(family: str) -> Path:
        shutil.copytree(folders(family), tmp_path / "model")
        return tmp_path / "model"

    return copy
