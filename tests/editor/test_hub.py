"""Hub ids: what is fetched, the cache in its real layout, and what is said offline, all without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from bakeout.editor.errors import InputError
from bakeout.editor.hub import wanted_files
from bakeout.editor.model import Model, open_model
from bakeout.export.checkpoint import plan_diffusers

Folders = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill(cache: Path, folder: Path, repo: str = "someone/tiny", ref: str = "main") -> Path:
    """Put a folder into the cache as the hub's library does: blobs, a snapshot of links to them, and a ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(root).parts[:-1]), "blobs", blob.name))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_a_cached_model_opens_offline(cache: Path, folders: Folders) -> None:
    snapshot = fill(cache, folders("sd1"))
    model = open_model("someone/tiny")
    assert (model.format, model.source, model.family) == ("hub", "someone/tiny", "sd1")
    assert model.path == snapshot
    assert model.pipeline().unet.config.cross_attention_dim == 32


@pytest.mark.parametrize("revision", ["fp16", COMMIT])
def test_a_revision_is_a_branch_or_a_commit(cache: Path, folders: Folders, revision: str) -> None:
    fill(cache, folders("sd1"), ref="fp16")
    assert open_model(f"someone/tiny@{revision}").family == "sd1"
    with pytest.raises(InputError, match="nor in the hub's cache"):
        open_model("someone/tiny")


def test_offline_and_not_cached_is_one_sentence() -> None:
    with pytest.raises(InputError, match="nor in the hub's cache, and HF_HUB_OFFLINE is set"):
        open_model("someone/absent")


def test_an_interrupted_download_says_what_is_missing(cache: Path, folders: Folders) -> None:
    snapshot = fill(cache, folders("sd1"))
    shutil.rmtree(snapshot / "vae")
    with pytest.raises(InputError, match="vae is missing"):
        open_model("someone/tiny")


def test_files_that_were_never_wanted_do_not_count_as_missing(
    cache: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill(cache, folders("sd1"))

    def incomplete(*_: object, **__: object) -> str:
        raise errors.IncompleteSnapshotError("pickles are missing", snapshot_path=str(snapshot))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    assert open_model("someone/tiny").path == snapshot


def test_an_existing_path_wins(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders("sd1"), tmp_path / "someone" / "tiny")
    assert open_model("someone/tiny").format == "folder"


@pytest.mark.parametrize(
    "source",
    ["./someone/absent", "../absent", "/absent/model", "~/absent", "a/b/c", "absent", "models/absent.safetensors",
     "a/b.ckpt", "", "x" * 5000, "a/b\0", "~nobody-of-this-name/x", "shapes2", "-x/y", "a/b@"],
)  # fmt: skip
def test_what_looks_like_a_path_is_not_sent_to_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"does not exist; .*\(shapes\)"):
        open_model(source)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_model(Path("someone/absent"))


class Api:
    """The hub as far as it is asked: a list of files, or an error."""

    answer: Any

    def model_info(self, repo: str, revision: str | None = None) -> SimpleNamespace:
        assert repo == "someone/tiny"
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.answer], revision=revision)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def test_online_only_what_is_needed_is_fetched(
    online: type[Api], cache: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders("sd1")
    online.answer = [
        *(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors",
    ]  # fmt: skip
    asked: dict[str, Any] = {}

    def download(repo: str, **settings: Any) -> str:
        asked.update(settings, repo=repo)
        return str(fill(cache, folder))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("someone/tiny@v2").format == "hub"
    assert (asked["repo"], asked["revision"]) == ("someone/tiny", "v2")
    assert asked["allow_patterns"] == [
        "model_index.json", "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


@pytest.fixture
def with_checker(copied: Folders) -> Path:
    """A model with a safety checker and what prepares its pictures."""
    folder = copied("sd1")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "safety_checker" / "model.safetensors")
    return folder


@pytest.fixture
def hub(online: type[Api], cache: Path, with_checker: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that has `with_checker`, and what was asked of it; files come into the cache as they are asked for."""
    asked: list[Any] = []
    online.answer = [path.relative_to(with_checker).as_posix() for path in with_checker.rglob("*") if path.is_file()]

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        with tempfile.TemporaryDirectory() as chosen:
            for name in allow_patterns:
                (Path(chosen) / name).parent.mkdir(exist_ok=True)
                shutil.copy(with_checker / name, Path(chosen) / name)
            return str(fill(cache, Path(chosen)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


BESIDE = [
    "feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors"
]  # fmt: skip


def test_a_copy_of_a_model_on_the_hub_has_the_files_of_a_copy_of_a_folder(hub: list[Any], with_checker: Path) -> None:
    model = open_model("someone/tiny@v2")
    assert not (model.path / "safety_checker").exists()
    plan, local = plan_diffusers(model), plan_diffusers(open_model(with_checker))
    assert plan.files.keys() == local.files.keys() >= set(BESIDE)
    assert plan.left_out == local.left_out == ()
    assert [revision for _, revision, _ in hub] == ["v2", COMMIT]
    assert hub[1][2] == BESIDE


def test_a_model_that_names_nothing_beside_is_asked_for_once(
    online: type[Api], cache: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill(cache, folders("sd1"))
    model = open_model_offline(monkeypatch)
    online.answer = AssertionError("the hub was asked")
    assert model.path == snapshot
    assert plan_diffusers(model).left_out == ()


def open_model_offline(monkeypatch: pytest.MonkeyPatch) -> Model:
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        return open_model("someone/tiny")


def test_a_safety_checker_that_is_a_pickle_is_not_fetched(
    hub: list[Any], online: type[Api], with_checker: Path
) -> None:
    weights = with_checker / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    online.answer = [name.replace("checker/model.safetensors", "checker/pytorch_model.bin") for name in online.answer]
    plan, local = (plan_diffusers(open_model(source)) for source in ("someone/tiny", with_checker))
    assert plan.files.keys() == local.files.keys()
    assert plan.files["model_index.json"] == local.files["model_index.json"]
    assert "safety_checker (not there as safetensors)" in plan.left_out
    assert not any(name.endswith(".bin") for _, _, names in hub for name in names)


@pytest.mark.parametrize("missing", [*BESIDE, None])
def test_offline_a_copy_is_whole_or_refused(
    cache: Path, with_checker: Path, tmp_path: Path, missing: str | None
) -> None:
    whole = plan_diffusers(open_model(with_checker)).files.keys()
    if missing:
        (with_checker / missing).unlink()
    fill(cache, with_checker)
    model = open_model("someone/tiny")
    if missing is None:
        assert plan_diffusers(model).files.keys() == whole
    else:
        name = missing.partition("/")[0]
        with pytest.raises(InputError, match=f"names its {name}, which is not in .*, and HF_HUB_OFFLINE is set"):
            plan_diffusers(model)


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "not found": (
        lambda: errors.RepositoryNotFoundError("404", response=response(404)),
        "nor a public model on the hub",
    ),
    "gated": (lambda: errors.GatedRepoError("403", response=response(403)), "needs its licence accepted"),
    "no revision": (lambda: errors.RevisionNotFoundError("404", response=response(404)), "has no revision v2"),
    "hub down": (lambda: errors.HfHubHTTPError("502", response=response(502)), "the hub cannot be reached"),
    "no network": (lambda: ConnectionError("no route"), "the hub cannot be reached"),
    "offline": (lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
    "invalid": (lambda: errors.HFValidationError("too long\nreally"), "is not a hub id"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_each_failure_of_the_hub_is_one_sentence(online: type[Api], case: str) -> None:
    error, message = ERRORS[case]
    online.answer = error()
    with pytest.raises(InputError, match=message) as caught:
        open_model("someone/tiny@v2")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_cache_is_used(cache: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real client, whose every connection the closed network of these tests turns into a failure.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    with pytest.raises(InputError, match="the hub cannot be reached"):
        open_model("someone/tiny")
    fill(cache, folders("sd1"))
    assert open_model("someone/tiny").family == "sd1"


SMALL = ["model_index.json", "unet/config.json", "README.md", "vae/config.json", "unet/x.py"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"],
         ["unet/diffusion_pytorch_model.fp16.safetensors"]),
        (["unet/diffusion_pytorch_model.safetensors.index.json",
          "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
          "unet/diffusion_pytorch_model-00002-of-00002.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"],
         ["unet/diffusion_pytorch_model-00001-of-00002.safetensors",
          "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
          "unet/diffusion_pytorch_model.safetensors.index.json"]),
        (["unet/diffusion_pytorch_model.safetensors.index.fp16.json",
          "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
          "unet/diffusion_pytorch_model-00001-of-00001.safetensors"],
         ["unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
          "unet/diffusion_pytorch_model.safetensors.index.fp16.json"]),
    ],
)  # fmt: skip
def test_one_variant_is_wanted(names: list[str], expected: list[str]) -> None:
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert wanted_files([*SMALL, vae, *names], "o/n") == sorted(
        ["model_index.json", "unet/config.json", "vae/config.json", vae, *expected]
    )


def test_repositories_that_cannot_be_used_are_refused_before_fetching() -> None:
    with pytest.raises(InputError, match=r"o/n/unet on the hub has its weights only as a pickle"):
        wanted_files([*SMALL, "unet/diffusion_pytorch_model.bin"], "o/n")
    with pytest.raises(InputError, match="download that and give its path"):
        wanted_files(["model.safetensors", "README.md"], "o/n")
