"""The artifact: one folder that holds a baked model, and what there is to know of it.

- `bakeout.json`: see `manifest.py`; written last.
- `edit.safetensors`: the Edit; a release may leave it out.
- `diffusers/`: the base's own files with the edited tensors in place; loads without bakeout. Only where the whole edit
  folds into weights.
- `onnx/`: the same model as ONNX graphs, made from `diffusers/`, or without it from base and edit; see `onnx.py`.
- `tensorrt/`: engines made of those graphs, for one kind of GPU; see `tensorrt/target.py`.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.editor.model_files import read_json
from bakeout.editor.recipe import Tensorrt as Serving
from bakeout.export.checkpoint import Plan, write_diffusers, write_synced
from bakeout.export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Base,
    File,
    Lowering,
    Manifest,
    Onnx,
    Shapes,
    Source,
    base_of,
    file_digest,
    read_manifest,
    tensor_digest,
    validity_of,
)
from bakeout.export.targets import (
    DIFFUSERS,
    ONNX,
    TARGETS,
    TENSORRT,
    onnx_exporter,
    precision_of,
    serving_of,
    shrink_of,
    with_diffusers,
    with_onnx,
    with_tensorrt,
)
from bakeout.export.workplace import Workplace, recover, workplace

if TYPE_CHECKING:
    import torch

    from bakeout.editor.edit import Edit, Operation
    from bakeout.export.lower import Lowered
    from bakeout.export.onnx_pipeline import SessionSettings

EDIT = "edit.safetensors"
# What can be added to an artifact.
EXPORTS = (ONNX, TENSORRT)
# What draws with an artifact, and from which of its targets; torch can do with the base instead.
RUNTIMES = {
    "torch": DIFFUSERS,
    "onnxruntime": ONNX,
    "onnxruntime-cuda": ONNX,
    "onnxruntime-tensorrt": ONNX,
    "tensorrt": TENSORRT,
}
# In the folder of a validation's report, when the artifact has changed since.
STALE = "STALE"
_SPARE = 16_000_000
_MAX_BLOCKS = 16
_CHUNK = 1 << 20


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
    def open(cls, folder: str | os.PathLike[str], *, but: str | None = None) -> Self:
        """Open an artifact and check what is quick to check: the manifest, the files, the edit, the edited tensors.

        Args:
            folder: where it lies.
            but: a target that need not be whole, because `export` is about to replace it.

        Raises:
            InputError: anything is missing, left over or changed.
        """
        path = Path(folder)
        # Where nothing can be written, nothing was being replaced.
        with suppress(OSError):
            recover(path.resolve())
        artifact = cls(path, read_manifest(path))
        artifact._check_files(but)
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
    def size(self) -> tuple[int, int] | None:
        """Width and height, in pixels, of the only pictures that it draws; None is any size that the model can draw.

        Raises InputError if a file that says so is not as it was baked.
        """
        latents = self.manifest.validity.latents
        if latents is None:
            return None
        # Each of the VAE's blocks but the last halves a picture.
        name = f"{ONNX if ONNX in self.manifest.targets else TENSORRT}/vae_decoder/config.json"
        blocks = read_json(self.folder / name).get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_BLOCKS:
            raise self._changed(name)
        factor = 2 ** (len(blocks) - 1)
        return factor * latents[1], factor * latents[0]

    @cached_property
    def model(self) -> Model:
        """The baked model, opened. Raises InputError, also where there is no diffusers folder."""
        if DIFFUSERS not in self.manifest.targets:
            raise InputError(self._no_diffusers())
        return open_model(self.folder / DIFFUSERS)

    def load(
        self,
        runtime: str = "torch",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        sessions: SessionSettings | None = None,
        base: Model | str | os.PathLike[str] | None = None,
        kernels: str | None = None,
        compile: bool = False,  # noqa: A002 - what torch calls it
    ) -> Any:
        """The pipeline of diffusers with the baked weights, as `Model.pipeline` makes it.

        PyTorch draws from `diffusers/`, where the edit costs nothing. Where there is none, because an operation does
        not fold into weights, it draws from the base: what folds lies in the weights and costs nothing, and each of the
        others is a module at what it edits. A patch in the GEGLU of an FFN is one operator with the Linear before it,
        which a fused kernel computes.

        `onnxruntime` draws from `onnx/` with tensors on the CPU, wherever its providers compute; `onnxruntime-cuda` and
        `onnxruntime-tensorrt` with those providers and tensors on a GPU. `tensorrt` draws from the engines in
        `tensorrt/`. None of them falls back to the CPU.

        While it draws it refuses, with InputError, every `clip_skip` that reads hidden states before the edit, and
        every size but `size`, which is its default.

        Args:
            runtime: a key of `RUNTIMES`.
            device: of torch; None is the CPU, and of a runtime for GPUs the first.
            dtype: of torch; None keeps the dtypes as stored.
            sessions: of ONNX Runtime; None is its defaults.
            base: of torch, where there is no `diffusers/`: the model that was edited, or where it is; None opens a
                built-in model or one of the hub by its name. All of its weights are compared with the artifact's
                record.
            kernels: of torch, where an operator is left to a GEGLU: `reference`, `triton` or `cuda`, and never another
                than that; None, or `auto`, is `triton` on a CUDA device, else `reference`.
            compile: of torch: compile the UNet when it is first called, which takes minutes once.

        Raises:
            InputError: another runtime, one that is not installed or whose target the artifact lacks, settings of
                another runtime or that are not used, a kernel that cannot run here, a base that is missing or another,
                a value of the edit beyond what the dtype holds, or files that do not load.
        """
        if runtime not in RUNTIMES:
            raise InputError(f"{runtime!a:.50} is no runtime; choose from {', '.join(RUNTIMES)}")
        if runtime == "torch":
            if sessions is not None:
                raise InputError("torch has no sessions; leave their settings out, or load with onnxruntime")
            from bakeout.export.torch_pipeline import load_torch_pipeline

            own = "cpu" if device is None else device
            return load_torch_pipeline(self, own, dtype, base=base, kernels=kernels, compiled=compile)
        target = RUNTIMES[runtime]
        if target not in self.manifest.targets:
            command = f"bakeout export {quote(str(self.folder))} --target {target}"
            raise InputError(f"{self.folder} has no {target}/; run `{command}`")
        if base is not None or kernels is not None or compile:
            raise InputError(
                "base, kernels and compile are torch's; leave them out, or load with torch (ONNX Runtime's kernels are "
                "those of SessionSettings, in sessions)"
            )
        if str(dtype) not in ("None", "torch.float32"):
            raise InputError("device and dtype are torch's; leave dtype out, and choose a precision when you export")
        if runtime == "onnxruntime" and str(device) not in ("None", "cpu"):
            raise InputError(
                "device and dtype are torch's; leave them out, and choose ONNX Runtime's providers, or load with "
                "onnxruntime-cuda"
            )
        home, validity = self.folder / target, self.manifest.validity
        if self.manifest.tensorrt is not None and runtime == "tensorrt":
            if sessions is not None:
                raise InputError("TensorRT has no sessions; leave their settings out, or load with onnxruntime")
            from bakeout.export.tensorrt.pipeline import load_tensorrt_pipeline

            made, gpu = self.manifest.tensorrt, "cuda:0" if device is None else device
            return load_tensorrt_pipeline(home, made, gpu, validity.hidden_states, validity.latents)
        from bakeout.export.onnx_pipeline import SessionSettings, load_onnx_pipeline

        sessions = sessions or SessionSettings()
        profiles = {}
        if runtime != "onnxruntime":
            from bakeout.export.onnx_gpu import on_gpu, profiles_for, shapes_for

            sessions = on_gpu(runtime, "cuda:0" if device is None else device, sessions)
            shapes = shapes_for(runtime, home, self.size, serving_of(self.manifest, None, None))
            profiles = {} if shapes is None else profiles_for(home, shapes)
        return load_onnx_pipeline(home, sessions, validity.hidden_states, validity.latents, profiles)

    def export(
        self,
        target: str,
        *,
        base: Model | None = None,
        shrink: int | None = None,
        precision: str | None = None,
        serving: Serving | None = None,
        device: str = "cuda",
        force: bool = False,
        progress: Callable[[float], object] | None = None,
        started: Callable[[str], object] | None = None,
    ) -> Self:
        """Add a target, after every byte of the artifact that stays was checked.

        ONNX graphs are made from `diffusers/`, or where there is none from the base and the edit. TensorRT's engines
        are made from those graphs in fp32: from `onnx/`, or where they are not there, in fp32 and with this `shrink`,
        from such as are written for it and removed. The artifact is whole at every moment, with the target or without:
        it is made anew beside itself, of hard links to its files where the file system has them, and takes its own
        place at the end. The report of an earlier validation, in `validation_folder`, gets a file `STALE` beside it.

        Args:
            target: of `EXPORTS`.
            base: the model that was edited; needed, and read, only where graphs are made and there is no `diffusers/`.
            shrink: hidden units that the edit makes constant are left out, so that an FFN's width is a multiple of
                this; of `SHRINKS`, where 0 keeps all. None is as the recipe has it.
            precision: `fp32`, `fp16` or `bf16`; what must not be computed in less than fp32 stays so (see
                `precision.py`). None is fp32 for ONNX, and for TensorRT as `serving` has it.
            serving: for TensorRT, of which pictures the engines are; None is as the recipe has it.
            device: of PyTorch, for TensorRT: the GPU that builds the engines, which run on its kind alone.
            force: replace the target where the artifact has it, whole or not.
            progress: called with the part, of one for the whole, that was just written.
            started: called with the name of each graph, before it is made.

        Returns:
            The artifact with the target, opened.

        Raises:
            InputError: another target, or one that is there; another `shrink` or `precision`, or a `shrink` that needs
                the edit where a release left it out; a package, a library or a GPU is missing; the artifact is not as
                it was baked, holds what bakeout did not write, or has an operator without a form in the target; an
                engine is not what was asked for; the disk is full.
        """
        if target not in EXPORTS:
            raise InputError(f"there is nothing to export to {target!a:.50}; choose of {', '.join(EXPORTS)}")
        exporter = onnx_exporter()
        multiple = shrink_of(self.manifest, shrink)
        if target == TENSORRT:
            from bakeout.export.tensorrt.library import gpu, tensorrt
            from bakeout.export.tensorrt.shapes import shapes_of

            wanted = serving_of(self.manifest, serving, precision)
            # Before anything that takes long.
            try:
                tensorrt()
                gpu(device)
            except InputError as error:
                command = f"bakeout export {quote(str(self.folder))} --target {TENSORRT} --check"
                raise InputError(f"{error}; what needs neither is checked by `{command}`") from error
        else:
            written = precision_of("fp32" if precision is None else precision)
            if serving is not None:
                raise InputError("serving is of TensorRT's engines; leave it out, or export to tensorrt")
        with self._exporting(target, force=force) as (place, current):
            if target == TENSORRT:
                current._link_into(place.new, leave_out=target)
                with current._graphs(place.new, self.folder, base, shrink, started) as (graphs, how):
                    shapes = shapes_of(graphs, current.size, wanted.width, wanted.height, wanted.batch)
                    manifest = with_tensorrt(
                        place.new, current.manifest, graphs, how, shapes, wanted.precision, device, progress, started
                    )
            else:
                model, lowered = current._source(base)
                edit = current._edit_that_shrinks() if multiple else None
                remaining = None if lowered is None else lowered.remaining
                _check_room(place.new, self.folder, exporter.size_of_onnx(model, remaining, written))
                current._link_into(place.new, leave_out=target)
                manifest = with_onnx(
                    place.new, current.manifest, model, lowered, edit, multiple, progress, started,
                    precision=written,
                )  # fmt: skip
            write_synced(place.new / MANIFEST, [manifest.to_json()])
            place.finish()
            _mark_stale(place.folder, target)
        return type(self).open(self.folder)

    def preflight(
        self,
        *,
        base: Model | None = None,
        shrink: int | None = None,
        precision: str | None = None,
        serving: Serving | None = None,
        progress: Callable[[float], object] | None = None,
        started: Callable[[str], object] | None = None,
    ) -> Shapes:
        """Check, without TensorRT or a GPU, that TensorRT can take what `export` would give it; nothing is changed.

        The graphs are made and cast as for `export`, in a temporary folder, and every operator, element type and
        dynamic shape is compared with what TensorRT's parser is documented to take. The artifact is only read.

        Args:
            base: as for `export`.
            shrink: as for `export`.
            precision: as for `export`.
            serving: as for `export`.
            progress: called with the part, of one for the whole, that was just checked.
            started: called with the name of each graph, before it is made, and before it is checked.

        Returns:
            Of which pictures the engines would be.

        Raises:
            InputError: as for `export`, but nothing of what TensorRT, a GPU or a folder that can be written are needed
                for; or there is no room for temporary files.
        """
        onnx_exporter()
        from bakeout.export.tensorrt.shapes import shapes_of
        from bakeout.export.tensorrt.target import check_graphs

        wanted = serving_of(self.manifest, serving, precision)
        try:
            self.verify(but=TENSORRT)
            with TemporaryDirectory(prefix="bakeout-") as temporary:
                scratch = Path(temporary)
                with self._graphs(scratch, None, base, shrink, started) as (graphs, _):
                    shapes = shapes_of(graphs, self.size, wanted.width, wanted.height, wanted.batch)
                    check_graphs(graphs, scratch, wanted.precision, shapes, progress, started)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be checked ({error.strerror or error}); mend its permissions, or make room for "
                "temporary files, which go where TMPDIR says"
            ) from error
        return shapes

    def needs_base(self, target: str, shrink: int | None = None) -> bool:
        """Whether graphs are made for a target of `EXPORTS`, with this `shrink`, and there is no `diffusers/` for it.

        Raises InputError for another `shrink`.
        """
        return DIFFUSERS not in self.manifest.targets and (target == ONNX or self._fp32_graphs(shrink) is None)

    def _fp32_graphs(self, shrink: int | None) -> Onnx | None:
        """How `onnx/` was written, if it is what engines with this `shrink` are made of."""
        onnx, multiple = self.manifest.onnx, shrink_of(self.manifest, shrink)
        return onnx if onnx is not None and (onnx.precision, onnx.shrink) == ("fp32", multiple) else None

    @contextmanager
    def _exporting(self, target: str, *, force: bool) -> Iterator[tuple[Workplace, Self]]:
        """A place to make the artifact anew with a target, and the artifact that is there, every byte checked."""
        folder = self.folder.expanduser().resolve()
        if why := _not_ours(folder):
            raise InputError(f"{self.folder} cannot be exported, because {why}; move that elsewhere")
        try:
            with workplace(folder, _not_ours, force=True) as place:
                replaced = target if force else None
                current = type(self).open(folder, but=replaced)
                if target in current.manifest.targets and not force:
                    raise InputError(f"{self.folder} has {target}/ already; replace it with --force")
                current.verify(but=replaced)
                yield place, current
        except OSError as error:
            raise InputError(
                f"cannot write {self.folder} ({error.strerror or error}); make room or mend its permissions"
            ) from error

    @contextmanager
    def _graphs(
        self,
        new: Path,
        shown: Path | None,
        base: Model | None,
        shrink: int | None,
        started: Callable[[str], object] | None,
    ) -> Iterator[tuple[Path, Onnx]]:
        """A folder of the graphs in fp32, and how they were written; in `new`, unless the artifact has them.

        `shown` is what to say has no room, if there is none; None says that `new` is for temporary files.
        """
        if (onnx := self._fp32_graphs(shrink)) is not None:
            yield self.folder / ONNX, onnx
            return
        multiple = shrink_of(self.manifest, shrink)
        model, lowered = self._source(base)
        edit = self._edit_that_shrinks() if multiple else None
        remaining = None if lowered is None else lowered.remaining
        _check_room(new, shown, onnx_exporter().size_of_onnx(model, remaining))
        with TemporaryDirectory(dir=new) as scratch:
            home = Path(scratch)
            manifest = with_onnx(home, self.manifest, model, lowered, edit, multiple, None, started)
            assert manifest.onnx is not None  # noqa: S101 - it was just written
            yield home / ONNX, manifest.onnx

    def _source(self, base: Model | None) -> tuple[Model, Lowered | None]:
        """What a target is made of: the baked model, or where its weights are not here the base and what changes it."""
        if DIFFUSERS in self.manifest.targets:
            return self.model, None
        if base is None or not self.matches(base):
            given = "" if base is None else f", and {base.source} is not the model that was edited"
            raise InputError(
                f"{self.folder} has no {DIFFUSERS}/ of which a target could be made{given}: give the model that was "
                f"edited, which was called {self.manifest.base.name!a:.200}"
            )
        from bakeout.export.lower import lower_onto

        return base, lower_onto(self.edit, base)

    def _edit_that_shrinks(self) -> Edit | None:
        """The Edit, where its patches may make hidden units constant. Raises InputError if the release left it out."""
        patched = any(it.operation == "PatchActivation" and it.how == "folded" for it in self.manifest.lowering)
        if patched and not self._has_edit():
            raise InputError(
                f"{self.folder} was released without its {EDIT}, and only that tells what can be left out: put "
                "that file there, or export with --shrink 0"
            )
        return self.edit if patched else None

    def _no_diffusers(self) -> str:
        in_graph = any(it.how == "graph" for it in self.manifest.lowering)
        why = "its edit is an operation in the graphs, which weights cannot hold" if in_graph else "nobody asked for it"
        targets = " and ".join(f"{target}/" for target in self.manifest.targets)
        return f"{self.folder} has no {DIFFUSERS}/, because {why}: draw with what it has, {targets}"

    def _link_into(self, new: Path, leave_out: str) -> None:
        """Put the artifact's files, but for the manifest and a target, into another folder."""
        for name in [*self._files_but(leave_out), *([EDIT] if self._has_edit() else [])]:
            path = self.folder / name
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            # Not every file system has hard links, and what lies elsewhere is copied.
            with suppress(OSError):
                if not path.is_symlink():
                    (new / name).hardlink_to(path)
                    continue
            with path.open("rb") as stream:
                write_synced(new / name, iter(partial(stream.read, _CHUNK), b""))

    def matches(self, model: Model) -> bool:
        """Whether `model` is the base that was edited: tensor for tensor, by SHA-256. Reads all of its weights.

        The tensors' names on disk count, and which of them are stored: a single file and a diffusers folder of one
        model do not match. What the files are called, and how the tensors are spread over them, does not count.
        """
        return base_of(model, self.manifest.base.name).components == self.manifest.base.components

    def verify(self, *, but: str | None = None) -> None:
        """Check every byte against the manifest, but those of a target that is about to be replaced.

        Raises InputError for the first file that is not as it was baked.
        """
        self._check_files(but)
        for name, file in self._files_but(but).items():
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

    def _files_but(self, target: str | None) -> dict[str, File]:
        return {name: file for name, file in self.manifest.files.items() if not name.startswith(f"{target}/")}

    def _check_files(self, but: str | None) -> None:
        targets = [target for target in TARGETS if target != but]
        homes = [home for target in targets if not (home := self.folder / target).is_symlink()]
        found = {path.relative_to(self.folder).as_posix(): path for home in homes for path in home.rglob("*")}
        for name, file in self._files_but(but).items():
            path = found.pop(name, None)
            # A link to a file is as good as the file: in the hub's cache every file is one.
            if path is None or not path.is_file():
                raise InputError(f"{self.folder} lacks its file {name}; {self._cure(name)}")
            if path.stat().st_size != file.bytes:
                raise self._changed(name)
        found |= {target: home for target in targets if (home := self.folder / target).is_symlink()}
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
        return InputError(f"{self.folder / name} is not as it was baked; {self._cure(name)}")

    def _cure(self, name: str) -> str:
        again = "take the artifact from its source again"
        target = name.partition("/")[0]
        if target in EXPORTS:
            return f"{again}, or run `bakeout export {quote(str(self.folder))} --target {target} --force`"
        return again


@contextmanager
def making(folder: Path, plan: Plan, *, force: bool, targets: Collection[str] = (DIFFUSERS,)) -> Iterator[Workplace]:
    """A place to write an artifact of the plan's model to, and every refusal that needs no calibration.

    Args:
        folder: the artifact to be.
        plan: of the base.
        force: replace an artifact that is there.
        targets: what it will have.

    Raises:
        InputError: the folder is there, overlaps the base, or cannot be written; the disk is full; or a package that a
            target needs is missing.
    """
    size = plan.size if DIFFUSERS in targets else 0
    size += onnx_exporter().size_of_onnx(plan.model) if ONNX in targets else 0
    target, base = folder.expanduser().resolve(), plan.model.path.resolve()
    if target == base or base in target.parents or target in base.parents:
        raise InputError(f"{folder} and the model {base} lie in one another; choose another folder")
    try:
        with workplace(target, _not_ours, force=force) as place:
            _check_room(place.new, folder, size)
            yield place
    except OSError as error:
        of_base = isinstance(error.filename, str) and Path(error.filename).is_relative_to(plan.model.path)
        what = f"read {error.filename}" if of_base else f"write {folder}"
        raise InputError(
            f"cannot {what} ({error.strerror or error}); make room or mend its permissions, or choose another folder"
        ) from error


def write_artifact(
    place: Workplace,
    plan: Plan,
    base: Base,
    edit: Edit,
    lowered: Lowered,
    facts: Mapping[str, Any],
    targets: Collection[str] = (DIFFUSERS,),
    progress: Callable[[float], object] | None = None,
) -> Artifact:
    """Write the artifact and put it into its place.

    Args:
        place: from `making`.
        plan: of the base.
        base: its identity.
        edit: what is baked.
        lowered: the edit's tensors, by `lower`.
        facts: the manifest's `recipe`, `calibration` and `tools`.
        targets: as for `making`.
        progress: called with the part, of one for each target but `diffusers`, that was just written.

    Returns:
        The artifact, opened.

    Raises:
        InputError: an operation does not fold into weights and `diffusers` is a target, or a network cannot be
            exported.
        OSError: a file cannot be written.
    """
    write_synced(place.new / EDIT, [edit.to_bytes()])
    manifest = _manifest(place.new, plan.model, base, edit, lowered, facts)
    if DIFFUSERS in targets:
        _refuse_remaining(lowered)
        write_diffusers(plan, lowered.state, place.new / DIFFUSERS)
        manifest = with_diffusers(place.new, manifest, plan.model, lowered)
    if ONNX in targets:
        whole = DIFFUSERS in targets
        model = open_model(place.new / DIFFUSERS) if whole else plan.model
        shrink = shrink_of(manifest, None)
        manifest = with_onnx(place.new, manifest, model, None if whole else lowered, edit, shrink, progress)
    write_synced(place.new / MANIFEST, [manifest.to_json()])
    place.finish()
    _mark_stale(place.folder, manifest.targets[0])
    return Artifact.open(place.folder)


def validation_folder(folder: Path) -> Path:
    """Where the report of validating an artifact lies unless told otherwise: beside it, because it may be signed."""
    return folder.with_name(f"{folder.name}-validation")


def _check_room(new: Path, folder: Path | None, size: int) -> None:
    free = shutil.disk_usage(new).free
    if free < size + _SPARE:
        another = "set TMPDIR to another folder" if folder is None else "choose another folder"
        raise InputError(
            f"{folder or new.parent} needs {(size + _SPARE) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
            f"make room, or {another}"
        )


def _mark_stale(folder: Path, target: str) -> None:
    report = validation_folder(folder)
    said = f"This report is older than {target}/ of {folder.name}: run bakeout validate {folder.name} again.\n"
    # A courtesy: the report itself names the manifest that it is of.
    if (report / "report.json").is_file():
        with suppress(OSError):
            (report / STALE).write_text(said, encoding="utf-8")


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
    """The manifest of an artifact without targets, which is not valid yet."""
    return Manifest.model_construct(
        version=FORMAT_VERSION,
        base=base,
        edit=edit.digest,
        edit_file=file_digest(new / EDIT),
        edits=tuple(
            Source(method=it.method, concept=it.concept, settings=dict(it.settings), prompts=it.prompts, pairs=it.pairs)
            for it in edit.origins
        ),
        lowering=tuple(_lowering(edit, lowered)),
        edited=(),
        validity=validity_of(edit, model),
        targets=(),
        precision={},
        files={},
        onnx=None,
        **facts,
    )


def _lowering(edit: Edit, lowered: Lowered) -> Iterator[Lowering]:
    operations: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in edit.operations:
        operations[operation.site, type(operation).__name__].append(operation)
    for it in lowered.realisations:
        touched, of, unit = operations[it.site, it.operation].pop(0).touched
        yield Lowering.model_validate({**asdict(it), "touched": touched, "of": of, "unit": unit})


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
