"""The artifact as a whole: what opens, what does not, and what happens to what is there already."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export import artifact as module
from bakeout.export import onnx as exporter
from bakeout.export.artifact import STALE, Artifact, making, validation_folder
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import MANIFEST

Baked = Callable[..., Artifact]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, baked: Baked) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "original"
    baked(tiny_model, folder)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy of an artifact that the test may change."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def test_an_artifact_opens_loads_and_has_its_edit(original: Path, tiny_model: Path, edited: Any) -> None:
    artifact = Artifact.open(str(original))
    artifact.verify()
    base = open_model(tiny_model)
    assert artifact.edit == edited(base)
    assert artifact.edit.digest == artifact.manifest.edit
    pipeline = artifact.load("torch", dtype=torch.float32)
    for component, tensors in lower_onto(artifact.edit, base).state.items():
        own = getattr(pipeline, component).state_dict()
        for name, tensor in tensors.items():
            assert torch.equal(own[name], tensor)
    with pytest.raises(InputError, match="is no runtime"):
        artifact.load("fax")


def test_everybody_may_read_its_files(original: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in original.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_the_same_inputs_give_the_same_bytes(original: Path, tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    baked(tiny_model, tmp_path / "again")
    assert content(tmp_path / "again") == content(original)
    other = Edit((*Artifact.open(original).edit.operations[1:],))
    baked(tiny_model, tmp_path / "other", other)
    assert content(tmp_path / "other") != content(original)


def test_without_its_edit_it_opens_and_says_how_to_get_it(copy: Path) -> None:
    (copy / "edit.safetensors").unlink()
    artifact = Artifact.open(copy)
    artifact.verify()
    with pytest.raises(InputError, match=r"released without its edit\.safetensors; ask its maker"):
        _ = artifact.edit


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def edited_byte(folder: Path) -> tuple[Path, int]:
    from bakeout.editor.checkpoint_header import read_header

    it = Artifact.open(folder).manifest.edited[0]
    return folder / it.file, read_header(folder / it.file).tensors[it.name].begin


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


Change = Callable[[Path], object]
UNET = "diffusers/unet/diffusion_pytorch_model.safetensors"
AT_OPEN: dict[str, Change] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a missing file": lambda folder: (folder / "diffusers/vae/config.json").unlink(),
    "no diffusers folder": lambda folder: shutil.rmtree(folder / "diffusers"),
    "a truncated file": lambda folder: os.truncate(folder / UNET, 1000),
    "another edit": lambda folder: flip(folder / "edit.safetensors"),
    "an edited tensor": lambda folder: flip(*edited_byte(folder)),
    "weights that a loader may prefer": lambda folder: (folder / "diffusers/unet/model.fp16.safetensors").touch(),
    "a folder of code": lambda folder: (
        (folder / "diffusers/unet/code").mkdir() or (folder / "diffusers/unet/code/x.py").touch()
    ),
    "an edit that is a folder": lambda folder: replace_by(folder / "edit.safetensors", Path.mkdir),
    "an edit that is a FIFO": lambda folder: replace_by(folder / "edit.safetensors", os.mkfifo),
    "an edit that is a dangling link": lambda folder: replace_by(
        folder / "edit.safetensors", lambda path: path.symlink_to(folder / "nowhere")
    ),
    "a FIFO": lambda folder: replace_by(folder / "diffusers/vae/config.json", os.mkfifo),
    "a dangling link": lambda folder: replace_by(
        folder / "diffusers/vae/config.json", lambda path: path.symlink_to(folder / "nowhere")
    ),
    "a link to a folder": lambda folder: replace_by(
        folder / "diffusers/vae/config.json", lambda path: path.symlink_to(folder / "diffusers/unet")
    ),
    "a link to a file of another size": lambda folder: replace_by(
        folder / "diffusers/vae/config.json", lambda path: path.symlink_to(folder / "diffusers/unet/config.json")
    ),
    "a link beside the files": lambda folder: (folder / "diffusers/unet/other.safetensors").symlink_to(folder / UNET),
    "a linked folder": lambda folder: (
        (folder / "diffusers").rename(folder / "elsewhere") or (folder / "diffusers").symlink_to(folder / "elsewhere")
    ),
}


@pytest.mark.parametrize("change", AT_OPEN.values(), ids=AT_OPEN.keys())
def test_what_is_not_as_it_was_baked_does_not_open(copy: Path, change: Change) -> None:
    change(copy)
    with pytest.raises(InputError):
        Artifact.open(copy)


@pytest.mark.parametrize(
    "name", [UNET, "diffusers/vae/diffusion_pytorch_model.safetensors", "diffusers/vae/config.json"]
)
def test_verify_finds_any_flipped_bit(copy: Path, name: str) -> None:
    artifact = Artifact.open(copy)
    artifact.verify()
    flip(copy / name)
    with pytest.raises(InputError, match="is not as it was baked"):
        artifact.verify()


def test_an_edit_that_is_no_file_is_not_asked_from_its_maker(copy: Path) -> None:
    artifact = Artifact.open(copy)
    for make in (Path.mkdir, os.mkfifo):
        (copy / "edit.safetensors").unlink(missing_ok=True)
        make(copy / "edit.safetensors")
        for use in (artifact.verify, lambda: artifact.edit):
            with pytest.raises(InputError, match=r"edit\.safetensors is not as it was baked"):
                use()
        if make is Path.mkdir:
            (copy / "edit.safetensors").rmdir()


def linked(folder: Path, to: Path) -> Path:
    """A folder as the hub's cache has it: every file a link to one elsewhere."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        link = to / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return to


def test_an_artifact_of_links_opens_and_is_checked_as_files_are(copy: Path, tmp_path: Path, original: Path) -> None:
    folder = linked(copy, tmp_path / "linked")
    artifact = Artifact.open(folder)
    artifact.verify()
    assert artifact.edit == Artifact.open(original).edit
    assert artifact.load().unet is not None
    flip(copy / "diffusers/vae/config.json")
    with pytest.raises(InputError, match=r"vae/config\.json is not as it was baked"):
        artifact.verify()
    flip(*edited_byte(folder))
    with pytest.raises(InputError, match="is not as it was baked"):
        Artifact.open(folder)


def test_an_edit_that_does_not_fold_is_refused(tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    site = open_model(tiny_model).sites_of("ffn2")[0]
    mask = torch.zeros(4, site.d_in, dtype=torch.bool)
    mask[0, 0] = True
    patch = PatchActivation(site.name, "input", mask, torch.ones(4, site.d_in))
    with pytest.raises(InputError, match=f"PatchActivation at {site.name} does not fold .*token") as caught:
        baked(tiny_model, tmp_path / "made", Edit((patch,)))
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


def test_biases_fold_too(tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    model = open_model(tiny_model)
    site = model.sites_of("text_layer")[-1]
    artifact = baked(tiny_model, tmp_path / "made", Edit((ShiftActivation(site.name, torch.ones(site.d_out)),)))
    (it,) = artifact.manifest.edited
    assert it.base_name.endswith("mlp.fc2.bias")
    assert artifact.manifest.lowering[0].rounding is not None
    assert "zeros" not in artifact.manifest.validity.reveals


def test_an_edit_of_nothing_gives_the_base(tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    site = open_model(tiny_model).sites_of("ffn2")[0]
    nothing = PatchWeightInput(site.name, torch.zeros(site.d_out, site.d_in, dtype=torch.bool))
    artifact = baked(tiny_model, tmp_path / "made", Edit((nothing,)))
    assert artifact.manifest.edited == ()
    assert content(tmp_path / "made" / "diffusers") == content(tiny_model)


@pytest.mark.parametrize("where", [".", "inside", "unet", "..", "inside/../../tiny"])
def test_base_and_artifact_may_not_lie_in_one_another(
    tiny_model: Path, tmp_path: Path, baked: Baked, where: str
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    before = content(tmp_path)
    with pytest.raises(InputError, match="lie in one another"):
        baked(base, base / where, force=True)
    assert content(tmp_path) == before


def test_an_artifact_is_replaced_only_when_told(copy: Path, tiny_model: Path, baked: Baked, edited: Any) -> None:
    before = content(copy)
    other = edited(open_model(tiny_model), seed=1)
    with pytest.raises(InputError, match="exists already; choose another folder, or replace it with --force"):
        baked(tiny_model, copy, other)
    assert content(copy) == before
    baked(tiny_model, copy, other, force=True)
    assert Artifact.open(copy).edit == other
    assert entries(copy.parent) == ["copy"]


def test_a_broken_artifact_can_be_replaced(copy: Path, tiny_model: Path, baked: Baked) -> None:
    os.truncate(copy / UNET, 1000)
    (copy / "diffusers/vae/config.json").unlink()
    (copy / "edit.safetensors").unlink()
    with pytest.raises(InputError):
        Artifact.open(copy)
    baked(tiny_model, copy, force=True)
    Artifact.open(copy).verify()


WITH_SOMETHING_ELSE: dict[str, tuple[Change, str]] = {
    "a file": (lambda folder: (folder / "notes.txt").touch(), "notes.txt"),
    "a file deep inside": (lambda folder: (folder / "diffusers/unet/mine.txt").touch(), "diffusers/unet/mine.txt"),
    "a hidden file": (lambda folder: (folder / "diffusers/.mine").touch(), "diffusers/.mine"),
    "an empty folder": (lambda folder: (folder / "diffusers/mine").mkdir(), "diffusers/mine"),
    "a target that bakeout does not write": (
        lambda folder: (folder / "onnx").mkdir() or (folder / "onnx/mine.onnx").touch(),
        "onnx",
    ),
    "a folder in place of the edit": (
        lambda folder: (
            replace_by(folder / "edit.safetensors", Path.mkdir) or (folder / "edit.safetensors/mine").touch()
        ),
        "edit.safetensors",
    ),
    "a file in place of a folder": (
        lambda folder: shutil.rmtree(folder / "diffusers") or (folder / "diffusers").touch(),
        "diffusers",
    ),
    "a linked folder": (
        lambda folder: shutil.rmtree(folder / "diffusers") or (folder / "diffusers").symlink_to(folder.parent),
        "diffusers",
    ),
}


@pytest.mark.parametrize(("add", "name"), WITH_SOMETHING_ELSE.values(), ids=WITH_SOMETHING_ELSE.keys())
def test_an_artifact_with_something_else_in_it_is_never_deleted(
    copy: Path, tiny_model: Path, baked: Baked, add: Change, name: str
) -> None:
    add(copy)
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=f"never overwritten, because it holds '{name}', which bakeout did not write"):
        baked(tiny_model, copy, force=True)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": 2}'])
def test_an_artifact_whose_manifest_cannot_be_read_is_never_deleted(
    copy: Path, tiny_model: Path, baked: Baked, text: str
) -> None:
    (copy / MANIFEST).write_text(text)
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=r"never overwritten, because its bakeout\.json does not tell"):
        baked(tiny_model, copy, force=True)
    assert sorted(copy.rglob("*")) == before


FOREIGN: dict[str, Change] = {
    "no artifact": lambda folder: folder.mkdir() or (folder / "precious").touch(),
    "an empty folder": lambda folder: folder.mkdir(),
    "a file": lambda folder: folder.touch(),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_not_ours_is_never_deleted(make: Change, tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    make(tmp_path / "made")
    before = sorted(tmp_path.rglob("*"))
    for force in (False, True):
        with pytest.raises(InputError, match="is never overwritten, because it"):
            baked(tiny_model, tmp_path / "made", force=force)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("fails", ["write", "mkdir", "fsync", "replace"])
def test_a_disk_that_refuses_is_an_error_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path, baked: Baked, monkeypatch: pytest.MonkeyPatch, code: int, fails: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    class FullFile(io.FileIO):
        write = refuse  # type: ignore[assignment]

    if fails == "write":
        opened = Path.open
        monkeypatch.setattr(
            Path, "open", lambda path, mode="r", *rest, **more: FullFile(path, "x") if mode == "xb"
            else opened(path, mode, *rest, **more),
        )  # fmt: skip
    else:
        monkeypatch.setattr(os, fails, refuse)
    with pytest.raises(InputError, match=rf"cannot write .*made \({os.strerror(code)}\)") as caught:
        baked(tiny_model, tmp_path / "made")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits on a file's size")
def test_a_disk_that_is_full_for_the_edit_is_an_error_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path, baked: Baked, edited: Any
) -> None:
    import resource

    made = edited(open_model(tiny_model))
    assert len(made.to_bytes()) > 500
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*made \(File too large\)"):
            baked(tiny_model, tmp_path / "made", made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == []


def test_a_base_that_vanishes_is_told_as_such(tiny_model: Path, tmp_path: Path, baked: Baked, monkeypatch: Any) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    write = module.write_diffusers

    def write_later(plan: Any, changed: Any, folder: Path) -> None:
        (base / "vae" / "config.json").unlink()
        write(plan, changed, folder)

    monkeypatch.setattr(module, "write_diffusers", write_later)
    with pytest.raises(InputError, match=r"cannot read .*base/vae/config\.json"):
        baked(base, tmp_path / "made")


def test_a_disk_with_too_little_room_is_told_at_once(
    tiny_model: Path, tmp_path: Path, baked: Baked, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs 0\.02 GB and 0\.00 GB are free there; make room"):
        baked(tiny_model, tmp_path / "made")
    assert entries(tmp_path) == []


def forked(action: Callable[[], object], die_at: int) -> bool:
    """Run `action` in a child that kills itself before its `die_at`-th fsync or rename; False if it ends."""
    child = os.fork()
    if child == 0:
        calls: Iterator[int] = iter(range(1, 10_000))

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **keywords: Any) -> Any:
                if next(calls) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return wrapper

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        try:
            action()
        except BaseException:  # noqa: BLE001 - a child must never return into pytest
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_nothing_half_written_opens_and_a_rerun_completes(
    tiny_model: Path, tmp_path: Path, baked: Baked, original: Path
) -> None:
    expected = content(original)
    folder, moment, kept = tmp_path / "made", 0, 0
    while forked(lambda: baked(tiny_model, folder), moment := moment + 1):
        for path in (folder, tmp_path / ".made.baking" / "new"):
            try:
                Artifact.open(path).verify()
            except InputError:
                continue
            assert content(path) == expected
            kept += 1
        if folder.exists():
            shutil.rmtree(folder)
    assert moment > 20
    assert 0 < kept < moment / 2
    assert content(folder) == expected
    assert entries(tmp_path) == ["made"]


def test_a_base_of_a_single_file_bakes(single_files: Any, tiny_configs: None, tmp_path: Path, baked: Baked) -> None:
    artifact = baked(single_files("sd1"), tmp_path / "made")
    artifact.verify()
    assert artifact.manifest.base.format == "single_file"
    assert all(it.base_name != it.name for it in artifact.manifest.edited)
    assert artifact.matches(open_model(single_files("sd1")))
    said = json.loads((tmp_path / "made" / MANIFEST).read_text())
    assert said["base"]["name"] == "sd1.safetensors"


Written = Callable[..., None]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Written], None]:
    """Puts something in the place of `write_onnx`; by default a folder of two files, of the model's own bytes."""

    def write(
        model: Model,
        folder: Path,
        progress: Callable[[float], object] | None = None,
        started: Callable[[str], object] | None = None,
        **changes: Any,
    ) -> None:
        (folder / "unet").mkdir(parents=True)
        told = "".join(it.digest if isinstance(it, Edit) else f"{name}: {len(it)}" for name, it in changes.items())
        source = model.components["unet"].files[0].read_bytes()[::-1]
        (folder / "unet" / "model.onnx").write_bytes(source + told.encode())
        (folder / "model_index.json").write_text("{}")
        if started is not None:
            started("unet")
        if progress is not None:
            progress(1.0)

    def put(function: Written = write) -> None:
        monkeypatch.setattr(exporter, "write_onnx", function)

    put()
    return put


def test_an_export_adds_a_target_and_leaves_the_rest(exported: Path) -> None:
    artifact = Artifact.open(exported)
    artifact.verify()
    manifest = artifact.manifest
    assert manifest.targets == ("diffusers", "onnx")
    assert manifest.onnx is not None
    assert (manifest.onnx.opset, manifest.onnx.precision) == (exporter.OPSET, "fp32")
    assert manifest.onnx.tools.keys() >= {"onnx", "onnx-ir", "torch"}
    assert {"onnx/unet/model.onnx", "onnx/model_index.json"} <= manifest.files.keys()
    assert entries(exported) == ["bakeout.json", "diffusers", "edit.safetensors", "onnx"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_exported_files_are_the_same_files_where_they_can_be(copy: Path, quick: Any, monkeypatch: Any) -> None:
    before = content(copy)
    inode = (copy / UNET).stat().st_ino
    assert Artifact.open(copy).export("onnx").manifest.targets == ("diffusers", "onnx")
    assert (copy / UNET).stat().st_ino == inode
    after = content(copy)
    assert {name for name, raw in before.items() if after[name] != raw} == {MANIFEST}
    assert after.keys() - before.keys() == {"onnx/unet/model.onnx", "onnx/model_index.json"}
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: Path("/nowhere").rmdir())
    Artifact.open(copy).export("onnx", force=True)
    assert (copy / UNET).stat().st_ino != inode
    assert content(copy) == after


def test_an_artifact_of_links_is_exported_as_files(copy: Path, tmp_path: Path, quick: Any) -> None:
    elsewhere = tmp_path / "blob"
    (copy / UNET).rename(elsewhere)
    (copy / UNET).symlink_to(elsewhere)
    expected = elsewhere.read_bytes()
    Artifact.open(copy).export("onnx").verify()
    assert not (copy / UNET).is_symlink()
    assert (copy / UNET).read_bytes() == expected == elsewhere.read_bytes()
    assert (copy / UNET).stat().st_ino != elsewhere.stat().st_ino


def test_without_its_edit_it_is_exported_too(copy: Path, quick: Any) -> None:
    (copy / "edit.safetensors").unlink()
    Artifact.open(copy).export("onnx").verify()
    assert not (copy / "edit.safetensors").exists()


def test_a_target_is_replaced_only_when_told(copy: Path, quick: Any) -> None:
    done: list[float] = []
    begun: list[str] = []
    artifact = Artifact.open(copy).export("onnx", progress=done.append, started=begun.append)
    assert (done, begun) == ([1.0], ["unet"])
    before = content(copy)
    with pytest.raises(InputError, match=r"has onnx/ already; replace it with --force"):
        artifact.export("onnx")
    assert content(copy) == before
    assert artifact.export("onnx", force=True).manifest == artifact.manifest
    assert content(copy) == before
    with pytest.raises(InputError, match="nothing to export to 'fax'; choose of onnx, tensorrt"):
        artifact.export("fax")


AFTER_EXPORT: dict[str, Change] = {
    "a missing graph": lambda folder: (folder / "onnx/unet/model.onnx").unlink(),
    "a truncated graph": lambda folder: os.truncate(folder / "onnx/unet/model.onnx", 1000),
    "no folder": lambda folder: shutil.rmtree(folder / "onnx"),
    "a graph beside": lambda folder: (folder / "onnx/unet/model_quantized.onnx").touch(),
    "data beside": lambda folder: (folder / "onnx/unet/model.onnx_data").touch(),
    "a linked folder": lambda folder: (
        (folder / "onnx").rename(folder / "elsewhere") or (folder / "onnx").symlink_to(folder / "elsewhere")
    ),
}


@pytest.mark.parametrize("change", AFTER_EXPORT.values(), ids=AFTER_EXPORT.keys())
def test_an_export_that_was_changed_does_not_open(copy: Path, quick: Any, change: Change) -> None:
    Artifact.open(copy).export("onnx")
    change(copy)
    with pytest.raises(InputError):
        Artifact.open(copy)


@pytest.mark.parametrize("change", list(AFTER_EXPORT.values())[:3], ids=list(AFTER_EXPORT)[:3])
def test_an_export_that_is_not_whole_is_written_again_when_told(copy: Path, quick: Any, change: Change) -> None:
    Artifact.open(copy).export("onnx")
    before = content(copy)
    change(copy)
    with pytest.raises(InputError, match=r"; take the artifact .* or run `bakeout export .* --target onnx --force`"):
        Artifact.open(copy)
    assert Artifact.open(copy, but="onnx").export("onnx", force=True).manifest.targets == ("diffusers", "onnx")
    assert content(copy) == before
    flip(copy / "onnx/unet/model.onnx")
    Artifact.open(copy).export("onnx", force=True)
    assert content(copy) == before


def test_what_is_no_part_of_the_replaced_target_is_never_deleted_or_trusted(copy: Path, quick: Any) -> None:
    Artifact.open(copy).export("onnx")
    beside = copy / "onnx" / "mine"
    beside.touch()
    with pytest.raises(InputError, match="holds 'onnx/mine', which bakeout did not write"):
        Artifact.open(copy, but="onnx").export("onnx", force=True)
    beside.unlink()
    (copy / UNET).unlink()
    with pytest.raises(InputError, match="lacks its file diffusers/"):
        Artifact.open(copy, but="onnx")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/nowhere")], ids=["a folder", "a link"])
def test_a_target_that_the_manifest_does_not_name_does_not_open(copy: Path, make: Change) -> None:
    make(copy / "onnx")
    if (copy / "onnx").is_dir():
        (copy / "onnx" / "model_index.json").touch()
    with pytest.raises(InputError, match="which is not part of the artifact; remove it"):
        Artifact.open(copy)


def test_verify_finds_a_flipped_bit_of_a_graph(copy: Path, quick: Any) -> None:
    Artifact.open(copy).export("onnx")
    flip(copy / "onnx/unet/model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx is not as it was baked"):
        Artifact.open(copy).verify()


def test_only_what_is_as_it_was_baked_is_exported(copy: Path, quick: Any) -> None:
    artifact = Artifact.open(copy)
    flip(copy / "diffusers/vae/diffusion_pytorch_model.safetensors")
    before = content(copy)
    with pytest.raises(InputError, match="is not as it was baked"):
        artifact.export("onnx")
    assert content(copy) == before


def test_an_artifact_with_something_else_in_it_is_not_exported(copy: Path, quick: Any) -> None:
    (copy / "notes.txt").write_text("mine")
    before = content(copy)
    with pytest.raises(InputError, match=r"cannot be exported, because it holds 'notes\.txt'.*; move that elsewhere"):
        Artifact.open(copy).export("onnx")
    assert content(copy) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_an_export_that_fails_leaves_the_artifact_as_it_was(
    copy: Path, tmp_path: Path, quick: Any, error: BaseException
) -> None:
    def fail(_: Model, folder: Path, *_more: object, **_changes: object) -> None:
        folder.mkdir()
        (folder / "model_index.json").touch()
        raise error

    quick(fail)
    before = content(copy)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)) as caught:
        Artifact.open(copy).export("onnx")
    assert not isinstance(error, OSError) or "copy (No space left on device); make room" in str(caught.value)
    assert content(copy) == before
    assert entries(tmp_path) == ["copy"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_an_export_leaves_a_whole_artifact(copy: Path, tmp_path: Path, quick: Any) -> None:
    before = content(copy)
    shutil.copytree(copy, tmp_path / "expected")
    Artifact.open(tmp_path / "expected").export("onnx")
    expected, moment, away = content(tmp_path / "expected"), 0, 0
    while forked(lambda: Artifact.open(copy).export("onnx", force=True), moment := moment + 1):
        away += not copy.exists()
        Artifact.open(copy).verify()
        assert content(copy) in (before, expected)
    assert (moment > 5, away) == (True, 1)
    assert content(copy) == expected
    assert entries(tmp_path) == ["copy", "expected"]


def test_an_export_needs_room(copy: Path, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = exporter.size_of_onnx(Artifact.open(copy).model) + 16_000_000
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=r"needs 0\.02 GB and 0\.02 GB are free there; make room"):
        Artifact.open(copy).export("onnx")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    Artifact.open(copy).export("onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir"])
def test_a_missing_package_is_named_before_anything_is_done(
    copy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    import bakeout.export

    for name in ("bakeout.export.onnx", "bakeout.export.aten", "bakeout.export.graph_file"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(bakeout.export, "onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    told = rf"{missing} is not installed; run `pip install 'bakeout\[cpu\]'`"
    with pytest.raises(InputError, match=told):
        Artifact.open(copy).export("onnx")
    with (
        pytest.raises(InputError, match=told),
        making(tmp_path / "made", plan_diffusers(open_model(tiny_model)), force=False, targets=("diffusers", "onnx")),
    ):
        raise AssertionError
    assert entries(tmp_path) == ["copy"]


def test_earlier_reports_become_stale(copy: Path, quick: Any) -> None:
    report = validation_folder(copy)
    Artifact.open(copy).export("onnx")
    assert not report.exists()
    report.mkdir()
    (report / "report.json").touch()
    Artifact.open(copy).export("onnx", force=True)
    assert (report / STALE).read_text() == "This report is older than onnx/ of copy: run bakeout validate copy again.\n"


def test_a_bake_with_targets_is_a_bake_and_an_export(
    copy: Path, tiny_model: Path, tmp_path: Path, quick: Any, edited: Any
) -> None:
    Artifact.open(copy).export("onnx")
    model, plan = open_model(tiny_model), plan_diffusers(open_model(tiny_model))
    manifest = Artifact.open(copy).manifest
    facts = {"recipe": manifest.recipe, "calibration": manifest.calibration, "tools": manifest.tools}
    done: list[float] = []
    with making(tmp_path / "made", plan, force=False, targets=("diffusers", "onnx")) as place:
        made = edited(model)
        module.write_artifact(
            place, plan, manifest.base, made, lower_onto(made, model), facts, ("diffusers", "onnx"), done.append
        )
    assert content(tmp_path / "made") == content(copy)
    assert done == [1.0]


@pytest.fixture
def gated(tiny_model: Path, tmp_path: Path, baked: Baked, edited: Any, quick: Any) -> Path:
    """An artifact with graphs alone: prunings, and a shift that no weight holds."""
    model = open_model(tiny_model)
    shift = ShiftActivation("text_encoder.layer.0", torch.ones(77, model.site("text_encoder.layer.0").d_out))
    baked(tiny_model, tmp_path / "gated", Edit((*edited(model).operations, shift)), targets=("onnx",))
    return tmp_path / "gated"


def test_what_does_not_fold_ships_without_weights(gated: Path, tiny_model: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(gated)
    artifact.verify()
    manifest = artifact.manifest
    assert (manifest.targets, manifest.edited, manifest.precision) == (("onnx",), (), {})
    assert entries(gated) == ["bakeout.json", "edit.safetensors", "onnx"]
    assert entries(tmp_path) == ["gated"]
    assert {it.how for it in manifest.lowering} == {"folded", "graph"}
    assert all(it.cost for it in manifest.lowering)
    lowered = lower_onto(artifact.edit, open_model(tiny_model))
    told = (gated / "onnx" / "unet" / "model.onnx").read_bytes()
    assert told.endswith(f"changed: {len(lowered.state)}{lowered.remaining.digest}".encode())
    assert len(lowered.remaining.operations) == 1


def test_graphs_are_made_anew_of_the_base_and_the_edit(
    gated: Path, tiny_model: Path, tmp_path: Path, copied: Any
) -> None:
    before = content(gated)
    whole = Artifact.open(gated).export("onnx", base=open_model(tiny_model), force=True)
    assert whole.manifest.targets == ("onnx",)
    assert content(gated) == before
    for base in (None, open_model("shapes")):
        with pytest.raises(InputError, match=r"has no diffusers/ .* give the model"):
            Artifact.open(gated).export("onnx", base=base, force=True)
    (gated / "edit.safetensors").unlink()
    with pytest.raises(InputError, match=r"released without its edit\.safetensors"):
        Artifact.open(gated).export("onnx", base=open_model(tiny_model), force=True)
    assert content(gated) == {name: raw for name, raw in before.items() if name != "edit.safetensors"}


def test_without_weights_there_is_no_model_and_torch_asks_for_the_base(gated: Path) -> None:
    artifact = Artifact.open(gated)
    with pytest.raises(InputError, match=r"has no diffusers/, because .* draw with what it has, onnx/"):
        _ = artifact.model
    with pytest.raises(InputError, match="of which it knows no place; give that model"):
        artifact.load("torch")


def test_what_does_not_fold_is_never_written_as_weights(
    tiny_model: Path, tmp_path: Path, baked: Baked, edited: Any, quick: Any
) -> None:
    model = open_model(tiny_model)
    site = model.site("text_encoder.layer.0")
    made = Edit((ShiftActivation(site.name, torch.ones(site.d_out), "prompted"),))
    for targets in (("diffusers",), ("diffusers", "onnx")):
        with pytest.raises(InputError, match="does not fold into weights"):
            baked(tiny_model, tmp_path / "made", made, targets=targets)
    assert entries(tmp_path) == []


def test_a_clip_skip_past_the_edit_is_refused_by_torch(tiny_model: Path, tmp_path: Path, baked: Baked) -> None:
    model = open_model(tiny_model)
    last = model.sites_of("text_layer")[-1]
    baked(tiny_model, tmp_path / "made", Edit((ShiftActivation(last.name, torch.ones(last.d_out)),)))
    artifact = Artifact.open(tmp_path / "made")
    layers = len(model.sites_of("text_layer"))
    assert artifact.manifest.validity.hidden_states == {"text_encoder": layers}
    pipeline = artifact.load("torch", dtype=torch.float32)
    states = pipeline.text_encoder(torch.zeros(1, 77, dtype=torch.int64), output_hidden_states=True).hidden_states
    assert states[-1] is not None
    with pytest.raises(InputError, match="that the edit does not reach"):
        _ = states[-2]
