"""Fetch a diffusers folder from the Hugging Face hub through its normal cache: only safetensors, only what is used."""

from __future__ import annotations

import re
from pathlib import Path

from bakeout.editor.errors import InputError
from bakeout.editor.model_files import WEIGHT_STEMS, shard_names, weights_name

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?")
_SMALL_FILES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json)"
)


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
        inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        if not inside:
            continue
        chosen = weights_name(inside, component, f"{source}/{component} on the hub")
        files = [chosen, *shard_names(inside, chosen)] if chosen.endswith(".json") else [chosen]
        wanted += [f"{component}/{name}" for name in files]
    return sorted(wanted)


def fetch(source: str) -> Path:
    """The folder in the hub's cache with the model `owner/name` or `owner/name@revision`, fetched if need be.

    With HF_HUB_OFFLINE set, or without a network, what the cache has is used. Raises InputError if that is nothing.
    """
    from huggingface_hub import constants, errors

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(f"{source!a:.200} is not a hub id; write owner/name or owner/name@revision")
    repo, revision = match["repo"], match["revision"]
    if constants.is_offline_mode():
        return _from_cache(repo, revision, source, "HF_HUB_OFFLINE is set")
    # The bases of the hub's error are that of its HTTP client, which changed from requests to httpx, and OSError.
    network_errors: tuple[type[BaseException], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        return _download(repo, revision, source)
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
        return _from_cache(repo, revision, source, "the hub cannot be reached")


def _download(repo: str, revision: str | None, source: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    files = wanted_files([sibling.rfilename for sibling in info.siblings or []], source)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=files))


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
