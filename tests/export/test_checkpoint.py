"""The diffusers folder of an artifact: what differs from the base, what is left out, and that anyone can load it."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.editor.pipeline import pipeline_classes
from bakeout.export.checkpoint import parameter_shape, plan_diffusers, read_parameter, write_diffusers
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import tensor_digest

Folders = Callable[[str], Path]
EDITED = ("unet", "text_encoder")


def shard(folder: Path, stem: str) -> None:
    tensors = load_file(folder / f"{stem}.safetensors")
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{stem}.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def sharded(folder: Path) -> None:
    shard(folder / "unet", "diffusion_pytorch_model")
    shard(folder / "text_encoder", "model")


def renamed(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def linked(folder: Path) -> None:
    """As the hub's cache has it: every file a relative link to a blob."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(Path(*[".."] * len(path.relative_to(folder).parts)) / "blobs" / str(number))


def unchanged(folder: Path) -> None:
    pass


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}


def head(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def differing(base: Path, written: Path) -> set[str]:
    """The tensors of two weight files of equal headers whose bytes differ."""
    assert head(base) == head(written)
    one, other = read_header(base).tensors, read_header(written).tensors
    return {name for name in one if tensor_digest(one[name]) != tensor_digest(other[name])}


@pytest.fixture
def written(tmp_path: Path, edited: Any) -> Callable[[Path], tuple[Model, Path, Any]]:
    def write(source: Path) -> tuple[Model, Path, Any]:
        model = open_model(source)
        changed = lower_onto(edited(model), model).state
        write_diffusers(plan_diffusers(model), changed, tmp_path / "written")
        return model, tmp_path / "written", changed

    return write


@pytest.mark.parametrize("layout", [unchanged, sharded, renamed, linked])
def test_only_the_edited_tensors_differ(copied: Folders, written: Any, layout: Callable[[Path], None]) -> None:
    base = copied("sd1")
    layout(base)
    model, folder, changed = written(base)
    assert files(folder).keys() == files(base).keys()
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    found: dict[str, set[str]] = {}
    for name, path in files(base).items():
        if name.endswith(".safetensors"):
            found.setdefault(name.split("/")[0], set()).update(differing(path, folder / name))
        else:
            assert (folder / name).read_bytes() == path.read_bytes()
    assert found == {name: set(changed.get(name, ())) for name in model.components}
    assert set(changed) == set(EDITED)
    written_model = open_model(folder)
    assert written_model.components.keys() == model.components.keys()
    for component, tensors in changed.items():
        stored = written_model.components[component].tensors
        for name, tensor in tensors.items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert stored[name].file.read_bytes()[stored[name].begin : stored[name].end] == raw


def test_the_negative_control_a_flipped_bit_elsewhere_is_seen(copied: Folders, written: Any) -> None:
    base = copied("sd1")
    _, folder, changed = written(base)
    name = "diffusion_pytorch_model.safetensors"
    assert not differing(base / "vae" / name, folder / "vae" / name)
    path = folder / "vae" / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert len(differing(base / "vae" / name, path)) == 1
    assert "vae" not in changed


def test_other_weights_of_the_base_and_code_stay_behind(copied: Folders) -> None:
    base = copied("sd1")
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/modeling.py",
        "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/tokenizer.model",
        "model.safetensors", "v1-5-pruned.ckpt", "pipeline.py", "onnx/unet.onnx", "README.md",
    ):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"unedited")
    plan = plan_diffusers(open_model(base))
    assert set(plan.left_out) == {
        "README.md", "model.safetensors", "onnx/", "pipeline.py", "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin", "tokenizer/tokenizer.model", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/modeling.py", "v1-5-pruned.ckpt",
    }  # fmt: skip
    write_diffusers(plan, {}, base.with_name("written"))
    assert not any(b"unedited" in path.read_bytes() for path in files(base.with_name("written")).values())


def test_the_variant_is_told(copied: Folders) -> None:
    base = copied("sd1")
    assert plan_diffusers(open_model(base)).variant is None
    renamed(base)
    assert plan_diffusers(open_model(base)).variant == "fp16"


def name_in_index(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    path.write_text(json.dumps(index))


def write_safety_checker(folder: Path, extractor: bool = True) -> None:
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "safety_checker" / "model.safetensors")
    if extractor:
        (folder / "feature_extractor").mkdir()
        (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")


def test_a_whole_safety_checker_is_copied(copied: Folders) -> None:
    base = copied("sd1")
    name_in_index(base)
    write_safety_checker(base)
    (base / "safety_checker" / "pytorch_model.bin").write_bytes(b"")
    plan = plan_diffusers(open_model(base))
    assert {name for name in plan.files if name.startswith(("safety", "feature"))} == {
        "safety_checker/config.json", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"
    }  # fmt: skip
    assert plan.files["model_index.json"] == base / "model_index.json"
    assert plan.left_out == ("safety_checker/pytorch_model.bin",)


@pytest.mark.parametrize("fault", ["missing", "pickle", "truncated", "no extractor"])
def test_a_safety_checker_that_is_not_whole_becomes_null(copied: Folders, fault: str) -> None:
    base = copied("sd1")
    name_in_index(base)
    if fault != "missing":
        write_safety_checker(base, extractor=fault != "no extractor")
    weights = base / "safety_checker" / "model.safetensors"
    if fault == "pickle":
        weights.rename(weights.with_name("pytorch_model.bin"))
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    plan = plan_diffusers(open_model(base))
    index = json.loads(plan.files["model_index.json"])  # type: ignore[arg-type]
    assert index["safety_checker"] == [None, None]
    assert "safety_checker (not there as safetensors)" in plan.left_out
    assert not any(name.startswith("safety_checker/") for name in plan.files)
    write_diffusers(plan, {}, base.with_name("written"))
    assert json.loads((base.with_name("written") / "model_index.json").read_text()) == index


@pytest.fixture
def library_messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What diffusers and transformers say at the level of warnings and above."""
    import diffusers.utils.logging as d
    import transformers.utils.logging as t

    pipeline_classes()  # their imports remark on optional packages
    for library in (d, t):
        library.enable_propagation()
    levels = d.get_verbosity(), t.get_verbosity()
    d.set_verbosity_warning()
    t.set_verbosity_warning()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    d.set_verbosity(levels[0])
    t.set_verbosity(levels[1])
    for library in (d, t):
        library.disable_propagation()


def loaded(folder: Path, family: str, variant: str | None = None) -> Any:
    sd, xl = pipeline_classes()
    extra = {"add_watermarker": False} if family == "sdxl" else {}
    return (xl if family == "sdxl" else sd).from_pretrained(folder, local_files_only=True, variant=variant, **extra)


@pytest.mark.parametrize(("layout", "variant"), [(unchanged, None), (sharded, None), (renamed, "fp16")])
def test_a_written_folder_loads_in_diffusers(
    copied: Folders, written: Any, layout: Any, variant: str | None, library_messages: Callable[[], list[str]]
) -> None:
    base = copied("sd1")
    layout(base)
    model, folder, changed = written(base)
    assert_is_base_with(loaded(folder, "sd1", variant), model, changed)
    assert library_messages() == []


def test_the_negative_control_a_missing_tensor_is_said(
    copied: Folders, written: Any, library_messages: Callable[[], list[str]]
) -> None:
    _, folder, _ = written(copied("sd1"))
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})
    loaded(folder, "sd1")
    assert any("newly initialized" in message or "MISSING" in message for message in library_messages())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.usefixtures("tiny_configs")
def test_a_single_file_becomes_a_folder_that_diffusers_loads(
    family: str, single_files: Folders, written: Any, library_messages: Callable[[], list[str]]
) -> None:
    model, folder, changed = written(single_files(family))
    assert {"unet", "text_encoder"} <= changed.keys()
    text = read_header(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in text.tensors)
    assert_is_base_with(loaded(folder, family), model, changed)
    assert library_messages() == []
    again = open_model(folder)
    assert again.family == family
    assert again.parts["scheduler"].config.items() >= model.parts["scheduler"].config.items()
    prompt = "a photo of a cat"
    for name in (name for name in model.parts if name.startswith("tokenizer")):
        own, theirs = (getattr(opened.pipeline(), name) for opened in (model, again))
        assert own(prompt, padding="max_length").input_ids == theirs(prompt, padding="max_length").input_ids


def assert_is_base_with(pipeline: Any, model: Model, changed: Any) -> None:
    """Every parameter is the base's, or what was changed; compared in fp32, which holds all three dtypes exactly."""
    base = model.pipeline()
    seen = 0
    for name, component in model.components.items():
        own = {key.removeprefix("text_model."): value for key, value in getattr(pipeline, name).state_dict().items()}
        reference = getattr(base, name).state_dict()
        assert len(own) == len(component.locations)
        for parameter, location in component.locations.items():
            expected = changed.get(name, {}).get(location.tensor)
            differs = expected is not None
            expected = reference[parameter] if expected is None else expected
            found = own[parameter.removeprefix("text_model.")]
            assert torch.equal(found.float(), expected.float()), parameter
            assert torch.equal(found.float(), reference[parameter].float()) != differs, parameter
            seen += differs
    assert seen == sum(map(len, changed.values())) > 0


@pytest.mark.usefixtures("tiny_configs")
def test_a_converted_file_keeps_the_dtypes(single_files: Folders, written: Any) -> None:
    model, folder, _ = written(single_files("sdxl"))
    for name, component in open_model(folder).components.items():
        theirs = {tensor.dtype for tensor in component.tensors.values()}
        assert theirs == {model.components[name].tensors[it.tensor].dtype for it in component_locations(model, name)}


def component_locations(model: Model, name: str) -> list[Any]:
    return list(model.components[name].locations.values())


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_a_replacement_of_another_dtype_or_shape_is_an_error(copied: Folders, tmp_path: Path, wrong: str) -> None:
    model = open_model(copied("sd1"))
    site = model.sites_of("ffn2")[0]
    shape = (site.d_out, site.d_in)
    tensor = torch.zeros(shape) if wrong == "dtype" else torch.zeros(shape[::-1], dtype=torch.float16)
    with pytest.raises(ValueError, match="is stored as F16"):
        write_diffusers(plan_diffusers(model), {"unet": {str(site.weight): tensor}}, tmp_path / "written")


def test_a_base_that_shrinks_is_an_error(copied: Folders, tmp_path: Path, edited: Any) -> None:
    model = open_model(copied("sd1"))
    changed = lower_onto(edited(model), model).state
    path = model.path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="became shorter"):
        write_diffusers(plan_diffusers(model), changed, tmp_path / "written")


def test_a_weight_file_is_never_whole_in_memory(copied: Folders, tmp_path: Path) -> None:
    base = copied("sd1")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["encoder.position_ids"] = torch.zeros(10_000_000)  # a kind of tensor that opening a model tolerates
    save_file(tensors, path)
    plan = plan_diffusers(open_model(base))
    tracemalloc.start()
    write_diffusers(plan, {}, tmp_path / "written")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.size > 40_000_000
    assert peak < 8_000_000


@pytest.mark.usefixtures("tiny_configs")
def test_the_plan_knows_the_size(copied: Folders, single_files: Folders, tmp_path: Path) -> None:
    for number, source in enumerate((copied("sd1"), single_files("sd1"))):
        plan = plan_diffusers(open_model(source))
        write_diffusers(plan, {}, tmp_path / str(number))
        size = sum(path.stat().st_size for path in files(tmp_path / str(number)).values())
        assert 0.9 * size <= plan.size <= size


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_parameter_is_read_as_its_module_has_it(
    family: str, modules: Any, folders: Any, single_files: Any, tiny_configs: None
) -> None:
    """Also where a single file holds it transposed, as a convolution, or as a third of a tensor."""
    changes = set()
    for model in (open_model(folders(family)), open_model(single_files(family))):
        for name, component in model.components.items():
            for key, value in modules(family)[name].state_dict().items():
                own = key if key in component.locations else key.removeprefix("text_model.")
                assert parameter_shape(component, own) == tuple(value.shape)
                assert read_parameter(component, own) == value.contiguous().view(torch.uint8).numpy().tobytes()
                changes.add(component.locations[own].change)
    assert changes >= {"same", "pointwise", *(["third", "transposed"] if family == "sdxl" else [])}
