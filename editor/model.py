"""Open a model: what it is, where an edit can act on it, and how its tensors lie on disk.

Opening reads headers and JSON only; `Model.pipeline` loads the weights. Importing this module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeout.editor.checkpoint_header import StoredTensor
from bakeout.editor.errors import InputError
from bakeout.editor.hub import HUB_ID, fetch
from bakeout.editor.ldm_names import Location
from bakeout.editor.model_files import PICKLE_CURE, PICKLE_SUFFIXES
from bakeout.editor.sites import KINDS, Site

if TYPE_CHECKING:
    import torch

# Not resolved: in a checkout this package is reached by a link, and what lies beside it is found only through the link.
BUILTIN = {"shapes": Path(__file__).parent.parent / "builtin" / "shapes" / "model"}


@dataclass(frozen=True)
class Component:
    """A network of the model: its class, configuration, and tensors.

    `tensors` is what lies on disk, by the names there. `locations` says of each parameter, by its name in the module as
    loaded here, which stored tensor it is read from and how. Tensors that no parameter uses, as old position ids, are
    in `tensors` only: whoever rewrites the files copies them as they are.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    locations: Mapping[str, Location]

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files that hold the component, sorted."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))


@dataclass(frozen=True)
class Part:
    """A part without weights (scheduler, tokenizer): its class, and its configuration or overrides of it.

    `folder` holds its files: the scheduler's JSON, the tokenizer's vocabulary.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Model:
    """An opened model; nothing of its weights is in memory.

    `format` is `builtin`, `folder`, `single_file` or `hub`; `family` is `sd1`, `sd2` or `sdxl`; `path` is the folder or
    the file; `index` is its `model_index.json` (for a single file, that of the configuration that fits it); `sites` are
    in the order in which a picture's making runs through them: text encoders, then the UNet down, mid, up.
    """

    source: str
    format: str
    family: str
    path: Path
    index: Mapping[str, Any]
    components: Mapping[str, Component]
    parts: Mapping[str, Part]
    sites: tuple[Site, ...]

    def sites_of(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind (`sites.KINDS`), in order; InputError for another kind."""
        if kind not in KINDS:
            raise InputError(f"{kind!a:.100} is not a kind of site; choose one of {', '.join(KINDS)}")
        return tuple(site for site in self.sites if site.kind == kind)

    def site(self, name: str) -> Site:
        """The site called `name`; InputError if the model has none of that name."""
        for site in self.sites:
            if site.name == name:
                return site
        first, last = self.sites[0].name, self.sites[-1].name
        raise InputError(f"{self.source} has no site {name!a:.100}; its sites run from {first} to {last}")

    def tensor(self, site: Site, what: str = "weight") -> StoredTensor | None:
        """The stored tensor of a site's `weight` or `bias`, None where it has none."""
        name = {"weight": site.weight, "bias": site.bias}[what]
        return None if name is None else self.components[site.component].tensors[name]

    def module(self, pipeline: Any, site: Site) -> torch.nn.Module:
        """The module of `site` in a loaded pipeline, whichever way its transformers names a text encoder's layers.

        Raises InputError if the pipeline is of another structure.
        """
        component = getattr(pipeline, site.component, None)
        for path in (site.module, site.module.removeprefix("text_model."), f"text_model.{site.module}"):
            try:
                return component.get_submodule(path)  # type: ignore[no-any-return, union-attr]
            except AttributeError:
                continue
        raise InputError(f"the pipeline has no module for {site.name}; use a pipeline of {self.source}")

    def pipeline(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The diffusers pipeline with its weights, on `device`, in the dtypes as stored unless `dtype` is given.

        A StableDiffusionXLPipeline for `sdxl`, else a StableDiffusionPipeline; without safety checker, watermark and
        progress bar. Reads local files only. Typed Any, because diffusers sets components as attributes that no type
        checker sees. Raises InputError if a tokenizer or scheduler does not load.
        """
        from bakeout.editor.pipeline import load_pipeline

        return load_pipeline(self, device, dtype)


def open_model(source: str | os.PathLike[str]) -> Model:
    """Open a built-in name (`shapes`), a diffusers folder, a single-file `.safetensors` checkpoint, or a hub id.

    A hub id is `owner/name` or `owner/name@revision`; an existing path wins over it, and a built-in name over both.
    Raises InputError, one sentence with the cure, for whatever is not a whole and sound SD 1.x, 2.x or SDXL base model.
    """
    from bakeout.editor.folder import open_folder
    from bakeout.editor.single_file import open_single_file

    text = os.fspath(source)
    if isinstance(source, str) and source in BUILTIN:
        if not BUILTIN[source].is_dir():
            raise InputError(f"this installation of bakeout lacks its built-in model {source}; install bakeout again")
        return open_folder(BUILTIN[source], text, "builtin")
    path = _existing(text)
    if path is None:
        if not isinstance(source, str) or not HUB_ID.fullmatch(text) or _looks_like_path(text):
            raise InputError(
                f"{text!a:.300} does not exist; give a diffusers folder, a .safetensors file, a hub id (owner/name) or "
                f"a built-in model ({', '.join(BUILTIN)})"
            )
        return open_folder(fetch(text), text, "hub")
    if path.is_dir():
        return open_folder(path, text, "folder")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{text} is a pickle checkpoint; {PICKLE_CURE}")
    return open_single_file(path, text)


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, or the home of nobody
        return None


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "~", "/")) or text.lower().endswith((".safetensors", *PICKLE_SUFFIXES))
