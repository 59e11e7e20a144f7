"""Opening whole models: what they are, their sites, and that loading gives what was written, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from bakeout.editor import model as model_file
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model

Folders = Callable[[str], Path]
Modules = Callable[[str], dict[str, torch.nn.Module]]
FAMILIES = ("sd1", "sd2", "sdxl")
FORMATS = ("folder", "single_file")


@pytest.fixture
def opened(folders: Folders, single_files: Folders, tiny_configs: None) -> Callable[[str, str], Model]:
    def open_one(format_: str, family: str) -> Model:
        return open_model(folders(family) if format_ == "folder" else single_files(family))

    return open_one


def assert_same(ours: torch.nn.Module, written: torch.nn.Module) -> None:
    """Equal names, dtypes and bits."""
    left, right = ours.state_dict(), written.state_dict()
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].dtype == value.dtype, name
        assert torch.equal(left[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_pipeline_has_the_bits_and_dtypes_that_were_written(
    opened: Callable[[str, str], Model], modules: Modules, format_: str, family: str
) -> None:
    model = opened(format_, family)
    assert (model.format, model.family) == (format_, family)
    pipeline = model.pipeline()
    assert type(pipeline).__name__ == ("StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline")
    for name, written in modules(family).items():
        loaded = getattr(pipeline, name)
        assert type(loaded) is type(written)
        assert not loaded.training
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        assert_same(loaded, written)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_and_folder_draw_the_same_picture(opened: Callable[[str, str], Model], family: str) -> None:
    pictures = []
    for format_ in FORMATS:
        pipeline = opened(format_, family).pipeline(dtype=torch.float32)
        # SDXL's own EulerDiscreteScheduler of diffusers 0.42 warns under numpy 2.4.
        pipeline.scheduler = _ddim()
        pictures.append(
            pipeline(
                "a red circle", negative_prompt="é 12 <|endoftext|>", num_inference_steps=2, height=32, width=32,
                generator=torch.Generator().manual_seed(0), output_type="pt",
            ).images
        )  # fmt: skip
    assert pictures[0].std() > 0.01
    assert torch.equal(*pictures)


def _ddim() -> object:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_diffusers_own_loader_draws(folders: Folders, family: str) -> None:
    from diffusers import DiffusionPipeline

    pictures = []
    theirs = DiffusionPipeline.from_pretrained(folders(family), local_files_only=True, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    for pipeline in (open_model(folders(family)).pipeline(dtype=torch.float32), theirs):
        pipeline.scheduler = _ddim()
        pictures.append(
            pipeline("a red circle", num_inference_steps=2, height=32, width=32, output_type="pt",
                     generator=torch.Generator().manual_seed(0)).images
        )  # fmt: skip
    assert torch.equal(*pictures)


def test_dtype_casts_every_network(folders: Folders) -> None:
    pipeline = open_model(folders("sd1")).pipeline(dtype=torch.float64)
    for name in ("unet", "vae", "text_encoder"):
        assert {parameter.dtype for parameter in getattr(pipeline, name).parameters()} == {torch.float64}


def test_loading_is_silent(folders: Folders) -> None:
    # In a process of its own: what the libraries say only once, they may have said here already.
    code = (
        "import sys; from bakeout.editor.model import open_model\n"
        "for folder in sys.argv[1:]: open_model(folder).pipeline()"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *(str(folders(family)) for family in FAMILIES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_early_configurations_are_modernised_without_a_warning(copied: Folders) -> None:
    import json

    folder = copied("sd1")
    for path, change in (
        ("scheduler/scheduler_config.json", {"steps_offset": 0, "clip_sample": True, "_class_name": "DDIMScheduler"}),
        ("unet/config.json", {"sample_size": 32, "_diffusers_version": "0.6.0"}),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}),
    ):
        value = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**value, **change}))
    pipeline = open_model(folder).pipeline()
    assert pipeline.scheduler.config.steps_offset == 1
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.unet.config.sample_size == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_named_alike_in_both_formats(opened: Callable[[str, str], Model], family: str) -> None:
    first, second = (opened(format_, family) for format_ in FORMATS)
    assert [(s.name, s.kind, s.component, s.module, s.d_in, s.d_out) for s in first.sites] == [
        (s.name, s.kind, s.component, s.module, s.d_in, s.d_out) for s in second.sites
    ]
    assert len({site.name for site in first.sites}) == len(first.sites)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_sites_module_and_its_stored_tensors_agree(
    opened: Callable[[str, str], Model], format_: str, family: str
) -> None:
    model = opened(format_, family)
    pipeline = model.pipeline()
    for site in model.sites:
        module = model.module(pipeline, site)
        if site.kind == "text_layer":
            assert type(module).__name__ == "CLIPEncoderLayer"
            assert model.tensor(site) is None
            continue
        assert isinstance(module, torch.nn.Linear)
        assert (module.out_features, module.in_features) == (site.d_out, site.d_in)
        for what in ("weight", "bias"):
            stored, loaded = model.tensor(site, what), getattr(module, what)
            assert (stored is None) == (loaded is None)
            if stored is not None:
                with stored.file.open("rb") as stream:
                    stream.seek(stored.begin)
                    raw = stream.read(stored.end - stored.begin)
                assert bytes(loaded.detach().contiguous().view(torch.uint8).flatten().tolist()) == raw


def test_kinds_and_order_of_sites(folders: Folders) -> None:
    model = open_model(folders("sdxl"))
    assert [site.name for site in model.sites_of("text_layer")] == [
        *(f"text_encoder.layer.{i}" for i in range(3)), *(f"text_encoder_2.layer.{i}" for i in range(3)),
    ]  # fmt: skip
    assert [site.name for site in model.sites_of("text_ffn2")] == [
        f"{site.name}.ffn2" for site in model.sites_of("text_layer")
    ]
    blocks = [site.name.removesuffix(".ffn2") for site in model.sites_of("ffn2")]
    # SDXL: no attention in the first block; tiny depths 1, 2, 3; the way up is deepest first with one layer more.
    assert blocks == [
        *(f"unet.down.1.attn.{a}.block.{b}" for a in range(2) for b in range(2)),
        *(f"unet.down.2.attn.{a}.block.{b}" for a in range(2) for b in range(3)),
        *(f"unet.mid.attn.0.block.{b}" for b in range(3)),
        *(f"unet.up.0.attn.{a}.block.{b}" for a in range(3) for b in range(3)),
        *(f"unet.up.1.attn.{a}.block.{b}" for a in range(3) for b in range(2)),
    ]
    for kind in ("ffn1", "attn_key", "attn_value", "attn_out"):
        assert [site.name for site in model.sites_of(kind)] == [f"{block}.{kind}" for block in blocks]
    with pytest.raises(InputError, match="is not a kind of site"):
        model.sites_of("ffn3")


def test_sites_run_in_the_order_in_which_they_are_listed(folders: Folders) -> None:
    model = open_model(folders("sd1"))
    pipeline = model.pipeline(dtype=torch.float32)
    ran: list[str] = []
    listed = [site for site in model.sites if site.kind in ("text_layer", "ffn2")]
    handles = [
        model.module(pipeline, site).register_forward_hook(lambda *_, name=site.name: ran.append(name))
        for site in listed
    ]
    pipeline("a", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, output_type="latent")
    for handle in handles:
        handle.remove()
    assert ran[: len(listed)] == [site.name for site in listed]


def test_a_site_is_found_under_the_names_of_transformers_4_and_5(folders: Folders) -> None:
    model = open_model(folders("sd1"))
    site = model.site("text_encoder.layer.1.ffn2")
    layer = torch.nn.Linear(1, 1)

    def nested(path: str) -> torch.nn.Module:
        root = torch.nn.Module()
        module = root
        *parents, last = path.split(".")
        for name in parents:
            module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        module.add_module(last, layer)
        return root

    class Pipeline:
        text_encoder: torch.nn.Module

    for prefix in ("", "text_model."):
        pipeline = Pipeline()
        pipeline.text_encoder = nested(f"{prefix}encoder.layers.1.mlp.fc2")
        assert model.module(pipeline, site) is layer
    with pytest.raises(InputError, match="no module for text_encoder"):
        model.module(object(), site)
    with pytest.raises(InputError, match=r"has no site 'text_encoder\.layer\.9'"):
        model.site("text_encoder.layer.9")


def test_a_model_is_frozen_and_opening_reads_no_weights(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    model = open_model(folders("sd1"))
    with pytest.raises(FrozenInstanceError):
        model.family = "sdxl"  # type: ignore[misc]
    with pytest.raises(AssertionError, match="weights were read"):
        model.pipeline()


def test_importing_is_light() -> None:
    code = (
        "import sys, bakeout.editor.model; "
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_built_in_name_wins(folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(model_file.BUILTIN, "shapes", folders("sd1"))
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_model("shapes").format == "builtin"
    with pytest.raises(InputError, match="model_index"):
        open_model(Path("shapes"))


def test_the_built_in_folder_is_found_through_the_link() -> None:
    package = Path(model_file.__file__).parent.parent
    assert model_file.BUILTIN["shapes"] == package / "builtin" / "shapes" / "model"
    assert (package / "py.typed").is_file()


def test_an_installation_without_its_built_in_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(model_file.BUILTIN, "shapes", tmp_path / "gone")
    with pytest.raises(InputError, match="lacks its built-in model shapes; install bakeout again"):
        open_model("shapes")
