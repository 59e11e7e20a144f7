"""Fetch a diffusers folder from the Hugging Face hub through its normal cache: only safetensors, only what is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from bakeout.editor.errors import InputError
from bakeout.editor.model_files import WEIGHT_STEMS, shard_names, weights_name

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?")
_SMALL_FILES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json)"
)
_SMALL_FILES_BESIDE = {
    "safety_checker": "config.json",
    "image_encoder": "config.json",
    "feature_extractor": "preprocessor_config.json",
}


def wanted_files(names: list[str], source: str) -> list[str]:
    """Which of a repository's files to fetch: JSON, tokenizers and one safetensors variant of each component.

    Raises InputError if the repository is not a diffusers folder or has a component only as a pickle.
    """
    if "model_index.json" not in names:
        raise InputError(
            f"{source} on the hub is not a diffusers folder (it has no model_index.json); if it has a single "
            ".safetensors checkpoint, download that and give its path"
        )
    wanted = [name for name in names if _SMALL_FILES.fullmatch(name)]
    for component in WEIGHT_STEMS:
        if any(name.startswith(f"{component}/") for name in names):
            wanted += _weight_files(names, component, component, source)
    return sorted(wanted)


def files_beside(names: list[str], components: Collection[str], source: str) -> list[str]:
    """Which of a repository's files to fetch for components that `wanted_files` leaves out; of a pickle none."""
    wanted = []
    for component in components:
        small = f"{component}/{_SMALL_FILES_BESIDE[component]}"
        if small in names:
            wanted.append(small)
        with suppress(InputError):
            # transformers saves all of its networks under one file name.
            wanted += _weight_files(names, component, "text_encoder", source)
    return sorted(wanted)


def _weight_files(names: list[str], folder: str, component: str, source: str) -> list[str]:
    """The weight files in a folder of a repository, named there as those of `component` are."""
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    chosen = weights_name(inside, component, f"{source}/{folder} on the hub")
    files = [chosen, *shard_names(inside, chosen)] if chosen.endswith(".json") else [chosen]
    return [f"{folder}/{name}" for name in files]


class _UnreachableError(Exception):
    """The hub cannot be asked, and why."""


def fetch(source: str) -> Path:
    """The folder in the hub's cache with the model `owner/name` or `owner/name@revision`, fetched if need be.

    With HF_HUB_OFFLINE set, or without a network, what the cache has is used. Raises InputError if that is nothing.
    """
    repo, revision = _parsed(source)
    try:
        return _download(repo, revision, source, lambda names: wanted_files(names, source))
    except _UnreachableError as why:
        return _from_cache(repo, revision, source, str(why))


def fetch_beside(source: str, snapshot: Path, components: Collection[str]) -> str | None:
    """Fetch what `fetch` leaves out of a model, because only a copy of the model needs it.

    Args:
        source: as `fetch` was given it.
        snapshot: the folder that `fetch` gave, to which the files are added; named by its commit.
        components: of `safety_checker`, `image_encoder`, `feature_extractor`, those that the model names.

    Returns:
        None, or why the hub could not be asked, so that files may be missing.

    Raises:
        InputError: as `fetch`.
    """
    try:
        _download(_parsed(source)[0], snapshot.name, source, lambda names: files_beside(names, components, source))
    except _UnreachableError as why:
        return str(why)
    return None


def _parsed(source: str) -> tuple[str, str | None]:
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(f"{source!a:.200} is not a hub id; write owner/name or owner/name@revision")
    return match["repo"], match["revision"]


def _download(repo: str, revision: str | None, source: str, wanted: Callable[[list[str]], list[str]]) -> Path:
    """The snapshot, with those files of the repository that are `wanted`. Raises InputError, _UnreachableError."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if constants.is_offline_mode():
        raise _UnreachableError("HF_HUB_OFFLINE is set")
    # The bases of the hub's error are that of its HTTP client, which changed from requests to httpx, and OSError.
    network_errors: tuple[type[BaseException], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        info = HfApi().model_info(repo, revision=revision)
        files = wanted([sibling.rfilename for sibling in info.siblings or []])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except errors.GatedRepoError:
        raise InputError(
            f"{source} needs its licence accepted on the hub; do that there and run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{source} is neither a file or folder here nor a public model on the hub; check the spelling (for a "
            "private model run `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo} has no revision {revision} on the hub; check the spelling") from None
    except errors.HFValidationError as error:
        raise InputError(f"{source} is not a hub id ({str(error).splitlines()[0]:.200}); check the spelling") from None
    except InputError:
        raise
    except network_errors:
        raise _UnreachableError("the hub cannot be reached") from None


def _from_cache(repo: str, revision: str | None, source: str, why: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        # Files that were never wanted, as pickles, make a snapshot incomplete to the hub's library; opening will tell.
        if incomplete := getattr(error, "snapshot_path", None):
            return Path(incomplete)
        raise InputError(
            f"{source} is neither a file or folder here nor in the hub's cache, and {why}; connect once, or give a path"
        ) from None
