"""The artifact: one folder that holds a baked model, and what there is to know of it.

- `bakeout.json`: see `manifest.py`; written last.
- `edit.safetensors`: the Edit; a release may leave it out.
- `diffusers/`: the base's own files with the edited tensors in place; loads without bakeout.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export.checkpoint import Plan, places, write_diffusers, write_synced
from bakeout.export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Base,
    EditedTensor,
    File,
    Lowering,
    Manifest,
    Source,
    base_of,
    file_digest,
    read_manifest,
    tensor_digest,
    validity_of,
)
from bakeout.export.workplace import Workplace, workplace

if TYPE_CHECKING:
    import torch

    from bakeout.editor.edit import Edit, Operation
    from bakeout.export.lower import Lowered

EDIT = "edit.safetensors"
DIFFUSERS = "diffusers"
_SPARE = 16_000_000


@dataclass(frozen=True)
class Artifact:
    """A baked model in a folder.

    Attributes:
        folder: where it lies.
        manifest: its `bakeout.json`.
        notes: what a bake has to tell beyond the manifest, in sentences; empty for an artifact that was opened.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Artifact:
        """Open an artifact and check what is quick to check: the manifest, the files, the edit, the edited tensors.

        Raises:
            InputError: anything is missing, left over or changed.
        """
        path = Path(folder)
        artifact = cls(path, read_manifest(path))
        artifact._check_files()
        artifact._check_edited()
        if artifact._has_edit() and file_digest(path / EDIT) != artifact.manifest.edit_file:
            raise artifact._changed(EDIT)
        return artifact

    @cached_property
    def edit(self) -> Edit:
        """The Edit that was baked. Raises InputError if the release left it out, or it is another."""
        from bakeout.editor.edit import Edit

        if not self._has_edit():
            raise InputError(
                f"{self.folder} was released without its {EDIT}; ask its maker for that file and put it there"
            )
        edit = Edit.load(self.folder / EDIT)
        if edit.digest != self.manifest.edit:
            raise self._changed(EDIT)
        return edit

    @cached_property
    def model(self) -> Model:
        """The baked model, opened. Raises InputError."""
        return open_model(self.folder / DIFFUSERS)

    def load(
        self, runtime: str = "torch", *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Any:
        """A pipeline with the baked weights, as `Model.pipeline` makes it.

        Args:
            runtime: `torch`.
            device: where to.
            dtype: None keeps the dtypes as stored.

        Raises:
            InputError: another runtime, or files that do not load.
        """
        if runtime != "torch":
            raise InputError(f"{runtime!a:.50} is no runtime of this artifact; choose torch")
        return self.model.pipeline(device, dtype)

    def matches(self, model: Model) -> bool:
        """Whether `model` is the base that was edited: tensor for tensor, by SHA-256. Reads all of its weights.

        The tensors' names on disk count, and which of them are stored: a single file and a diffusers folder of one
        model do not match. What the files are called, and how the tensors are spread over them, does not count.
        """
        return base_of(model, self.manifest.base.name).components == self.manifest.base.components

    def verify(self) -> None:
        """Check every byte against the manifest. Raises InputError for the first file that is not as it was baked."""
        self._check_files()
        for name, file in self.manifest.files.items():
            if file_digest(self.folder / name) != file.sha256:
                raise self._changed(name)
        self._check_edited()
        if self._has_edit():
            _ = self.edit

    def _has_edit(self) -> bool:
        path = self.folder / EDIT
        # Reading a FIFO or a device would block or never end.
        if os.path.lexists(path) and not path.is_file():
            raise self._changed(EDIT)
        return path.exists()

    def _check_files(self) -> None:
        home = self.folder / DIFFUSERS
        paths = () if home.is_symlink() else home.rglob("*")
        found = {path.relative_to(self.folder).as_posix(): path for path in paths}
        for name, file in self.manifest.files.items():
            path = found.pop(name, None)
            # A link to a file is as good as the file: in the hub's cache every file is one.
            if path is None or not path.is_file():
                raise InputError(f"{self.folder} lacks its file {name}; take the artifact from its source again")
            if path.stat().st_size != file.bytes:
                raise self._changed(name)
        for name, path in sorted(found.items()):
            # Loaders prefer some names to others, so a file beside the weights may be what is loaded.
            if path.is_symlink() or not path.is_dir():
                raise InputError(f"{self.folder} holds {name!a:.200}, which is not part of the artifact; remove it")

    def _check_edited(self) -> None:
        headers = {file: read_header(self.folder / file) for file in {it.file for it in self.manifest.edited}}
        for it in self.manifest.edited:
            tensor = headers[it.file].tensors.get(it.name)
            if it.file not in self.manifest.files or tensor is None or tensor_digest(tensor) != it.sha256:
                raise self._changed(it.file)

    def _changed(self, name: str) -> InputError:
        return InputError(f"{self.folder / name} is not as it was baked; take the artifact from its source again")


@contextmanager
def making(folder: Path, plan: Plan, *, force: bool) -> Iterator[Workplace]:
    """A place to write an artifact of the plan's model to, and every refusal that needs no calibration.

    Args:
        folder: the artifact to be.
        plan: of the base.
        force: replace an artifact that is there.

    Raises:
        InputError: the folder is there, overlaps the base, or cannot be written, or the disk is full.
    """
    target, base = folder.expanduser().resolve(), plan.model.path.resolve()
    if target == base or base in target.parents or target in base.parents:
        raise InputError(f"{folder} and the model {base} lie in one another; choose another folder")
    try:
        with workplace(target, _not_ours, force=force) as place:
            free = shutil.disk_usage(place.new).free
            if free < plan.size + _SPARE:
                raise InputError(
                    f"{folder} needs {(plan.size + _SPARE) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
                    "make room, or choose another folder"
                )
            yield place
    except OSError as error:
        of_base = isinstance(error.filename, str) and Path(error.filename).is_relative_to(plan.model.path)
        what = f"read {error.filename}" if of_base else f"write {folder}"
        raise InputError(
            f"cannot {what} ({error.strerror or error}); make room or mend its permissions, or choose another folder"
        ) from error


def write_artifact(
    place: Workplace, plan: Plan, base: Base, edit: Edit, lowered: Lowered, facts: Mapping[str, Any]
) -> Artifact:
    """Write the artifact and put it into its place.

    Args:
        place: from `making`.
        plan: of the base.
        base: its identity.
        edit: what is baked.
        lowered: the edit's tensors, by `lower`.
        facts: the manifest's `recipe`, `calibration` and `tools`.

    Returns:
        The artifact, opened.

    Raises:
        InputError: an operation does not fold into weights.
        OSError: a file cannot be written.
    """
    _refuse_remaining(lowered)
    write_synced(place.new / EDIT, [edit.to_bytes()])
    write_diffusers(plan, lowered.state, place.new / DIFFUSERS)
    manifest = _manifest(place.new, plan.model, base, edit, lowered, facts)
    write_synced(place.new / MANIFEST, [manifest.to_json()])
    place.finish()
    return Artifact.open(place.folder)


def _refuse_remaining(lowered: Lowered) -> None:
    for operation in lowered.remaining.operations:
        kind = type(operation).__name__
        why = next(
            (it.reason for it in lowered.realisations
             if it.how == "graph" and (it.site, it.operation) == (operation.site, kind)),
            "it has no exact form in weights",
        )  # fmt: skip
        raise InputError(
            f"{kind} at {operation.site} does not fold into weights ({why}), and a diffusers folder holds nothing "
            "else; choose settings of the method that fold"
        )


def _manifest(new: Path, model: Model, base: Base, edit: Edit, lowered: Lowered, facts: Mapping[str, Any]) -> Manifest:
    paths = sorted(path for path in (new / DIFFUSERS).rglob("*") if path.is_file())
    components = [name for name, tensors in lowered.state.items() if tensors]
    return Manifest(
        version=FORMAT_VERSION,
        base=base,
        edit=edit.digest,
        edit_file=file_digest(new / EDIT),
        edits=tuple(
            Source(method=it.method, concept=it.concept, settings=dict(it.settings), prompts=it.prompts, pairs=it.pairs)
            for it in edit.origins
        ),
        lowering=tuple(_lowering(edit, lowered)),
        edited=tuple(_edited(new, model, lowered)),
        validity=validity_of(edit, components),
        targets=(DIFFUSERS,),
        precision={
            component.name: tuple(sorted({component.tensors[it.tensor].dtype for it in component.locations.values()}))
            for component in model.components.values()
        },
        files={
            path.relative_to(new).as_posix(): File(bytes=path.stat().st_size, sha256=file_digest(path))
            for path in paths
        },
        **facts,
    )


def _lowering(edit: Edit, lowered: Lowered) -> Iterator[Lowering]:
    operations: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in edit.operations:
        operations[operation.site, type(operation).__name__].append(operation)
    for it in lowered.realisations:
        touched, of, unit = operations[it.site, it.operation].pop(0).touched
        yield Lowering.model_validate({**asdict(it), "touched": touched, "of": of, "unit": unit})


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


def _not_ours(folder: Path) -> str | None:
    """Why a folder must never be deleted; None for an artifact with nothing of anybody else's in it."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    if not (folder / MANIFEST).is_file():
        return f"it is no artifact (it has no {MANIFEST})"
    try:
        files = {MANIFEST, EDIT, *read_manifest(folder).files}
    except InputError:
        return f"its {MANIFEST} does not tell what else in it is bakeout's"
    homes = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    others = sorted(
        name
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix())
        not in (homes if path.is_dir() and not path.is_symlink() else files)
    )
    return f"it holds {others[0]!a:.200}, which bakeout did not write" if others else None
