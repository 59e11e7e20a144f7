"""The targets of an artifact: each is written into a folder of its own, and the manifest says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError, not_installed
from bakeout.editor.model import Model
from bakeout.editor.recipe import DEFAULT_SHRINK, PRECISIONS, SHRINKS, Precision
from bakeout.editor.recipe import Tensorrt as Serving
from bakeout.export.checkpoint import places
from bakeout.export.manifest import (
    EditedTensor,
    File,
    Manifest,
    Onnx,
    Shapes,
    Tensorrt,
    Width,
    file_digest,
    tensor_digest,
)

if TYPE_CHECKING:
    from bakeout.editor.edit import Edit
    from bakeout.export.lower import Lowered

DIFFUSERS: Final = "diffusers"
ONNX: Final = "onnx"
TENSORRT: Final = "tensorrt"
TARGETS = (DIFFUSERS, ONNX, TENSORRT)
# What a graph's bytes may depend on.
_EXPORT_TOOLS = ("diffusers", "onnx", "onnx-ir", "torch", "transformers")


def onnx_exporter() -> ModuleType:
    """`bakeout.export.onnx`, whose packages are an extra. Raises InputError where one is missing."""
    try:
        from bakeout.export import onnx
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnx_ir"):
            raise
        raise InputError(not_installed(error.name)) from None
    return onnx


def with_diffusers(new: Path, manifest: Manifest, model: Model, lowered: Lowered) -> Manifest:
    """The manifest with what lies in `diffusers/`."""
    precision = {
        component.name: tuple(sorted({component.tensors[it.tensor].dtype for it in component.locations.values()}))
        for component in model.components.values()
    }
    return manifest.model_copy(
        update={
            "targets": (DIFFUSERS,), "edited": tuple(_edited(new, model, lowered)), "precision": precision,
            "files": _files(new, DIFFUSERS),
        }
    )  # fmt: skip


def with_onnx(
    new: Path,
    manifest: Manifest,
    model: Model,
    lowered: Lowered | None,
    edit: Edit | None,
    shrink: int,
    progress: Callable[[float], object] | None,
    started: Callable[[str], object] | None = None,
    *,
    precision: str = "fp32",
) -> Manifest:
    """Write `onnx/` of the model, with what is still to be changed of it; the manifest with it.

    `edit` says which hidden units are constant, as far as `shrink` lets them go; None says that none is.
    """
    from bakeout.export.precision import BF16_OPSET
    from bakeout.export.shrink import kept_units

    exporter = onnx_exporter()
    changes = {} if lowered is None else {"changed": lowered.state, "remaining": lowered.remaining}
    sites = {site.name: site for site in model.sites}
    kept = {} if edit is None else kept_units(edit, sites, shrink)
    exporter.write_onnx(model, new / ONNX, progress, started, kept=kept, precision=precision, **changes)
    how = Onnx(
        opset=BF16_OPSET if precision == "bf16" else exporter.OPSET,
        precision=precision_of(precision),
        shrink=shrink,
        widths={name: Width(kept=len(units), of=sites[name].d_in) for name, units in kept.items()},
        tools={name: version(name) for name in _EXPORT_TOOLS},
    )
    others = {name: file for name, file in manifest.files.items() if not name.startswith(f"{ONNX}/")}
    targets = tuple(target for target in TARGETS if target == ONNX or target in manifest.targets)
    return manifest.model_copy(update={"targets": targets, "files": {**others, **_files(new, ONNX)}, "onnx": how})


def with_tensorrt(
    new: Path,
    manifest: Manifest,
    graphs: Path,
    how: Onnx,
    shapes: Shapes,
    precision: Precision,
    device: str,
    progress: Callable[[float], object] | None,
    started: Callable[[str], object] | None,
) -> Manifest:
    """Write `tensorrt/` of the graphs in fp32, which were written as `how` says; the manifest with it."""
    from bakeout.export.tensorrt.library import gpu, tensorrt
    from bakeout.export.tensorrt.target import write_engines

    with TemporaryDirectory(dir=new) as scratch:
        engines = write_engines(graphs, new / TENSORRT, Path(scratch), precision, shapes, device, progress, started)
    own = gpu(device)
    record = Tensorrt(
        precision=precision,
        shapes=shapes,
        shrink=how.shrink,
        widths=how.widths,
        version=tensorrt().__version__,
        gpu=own.name,
        capability=own.capability,
        driver=own.driver,
        engines=engines,
        tools=how.tools,
    )
    others = {name: file for name, file in manifest.files.items() if not name.startswith(f"{TENSORRT}/")}
    targets = tuple(target for target in TARGETS if target == TENSORRT or target in manifest.targets)
    files = {**others, **_files(new, TENSORRT)}
    return manifest.model_copy(update={"targets": targets, "files": files, "tensorrt": record})


def serving_of(manifest: Manifest, given: Serving | None, precision: object) -> Serving:
    """What was given, or what the recipe had. Raises InputError for a recipe that no bakeout wrote, or a precision."""
    try:
        serving = given or Serving.model_validate(manifest.recipe.get("tensorrt", {}))
    except (ValidationError, InputError) as error:
        raise InputError(
            "the recipe in the manifest does not say of which pictures engines are to be made; take the artifact from "
            "its source again"
        ) from error
    return serving if precision is None else serving.model_copy(update={"precision": precision_of(precision)})


def precision_of(given: object) -> Precision:
    """What was given. Raises InputError for none of `PRECISIONS`."""
    for precision in PRECISIONS:
        if given == precision:
            return precision
    raise InputError(f"{given!a:.50} is no precision; choose of {', '.join(PRECISIONS)}")


def shrink_of(manifest: Manifest, given: object) -> int:
    """What was given, or what the recipe had. Raises InputError for none of `SHRINKS`."""
    shrink = manifest.recipe.get("shrink", DEFAULT_SHRINK) if given is None else given
    # To Python true equals 1, and so does 1.0.
    if type(shrink) is not int or shrink not in SHRINKS:
        raise InputError(f"shrink is {shrink!a:.50}; choose of {', '.join(map(str, SHRINKS))}")
    return shrink


def _files(new: Path, target: str) -> dict[str, File]:
    paths = sorted(path for path in (new / target).rglob("*") if path.is_file())
    return {
        path.relative_to(new).as_posix(): File(bytes=path.stat().st_size, sha256=file_digest(path)) for path in paths
    }


def _edited(new: Path, model: Model, lowered: Lowered) -> Iterator[EditedTensor]:
    for component, tensors in sorted(lowered.state.items()):
        for base_name in sorted(tensors):
            stored = model.components[component].tensors[base_name]
            for file, name in places(model, component, base_name):
                baked = read_header(new / DIFFUSERS / file).tensors[name]
                yield EditedTensor(
                    file=f"{DIFFUSERS}/{file}", name=name, sha256=tensor_digest(baked),
                    component=component, base_name=base_name, base_sha256=tensor_digest(stored),
                )  # fmt: skip
