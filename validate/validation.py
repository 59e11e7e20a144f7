"""Validate an artifact: is what ships the base with the edit, to rounding, and far from the base where that matters?

Three models draw from identical latents: the **base**, the **reference** (the base in eager PyTorch with
the Edit as hooks) and the **artifact**, in each of its formats. The artifact is compared with the reference only. A
target in less than fp32 is held to the limits of its precision.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bakeout import __version__
from bakeout.editor.edit import Edit
from bakeout.editor.errors import InputError, not_installed
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.export.artifact import Artifact
from bakeout.export.base import open_base
from bakeout.export.manifest import MANIFEST, Tensorrt, file_digest, read_manifest
from bakeout.export.targets import ONNX, TENSORRT
from bakeout.generate import Request, complete, device_from_text, scheduler_for
from bakeout.recipe import recommended_for
from bakeout.validate.asked import RUNTIME_OF, Profile, check_edit_given, chosen_targets, recorded_profile
from bakeout.validate.audit import (
    Parameter,
    Read,
    check_weights,
    kept_in_graphs,
    names_of,
    parameters,
    rounding_of,
    weights_beside,
)
from bakeout.validate.configuration import check_configuration
from bakeout.validate.contract import contract, run_network
from bakeout.validate.devices import (
    check_providers,
    gpu_of,
    own_kernels,
    precision_of,
    why_not_here,
    with_exact_products,
    with_kernels_chosen,
    without_tf32,
)
from bakeout.validate.engines import (
    check_engines,
    of_size,
    recorded,
    run_in_pieces,
    settings_of,
    why_not_of_size,
)
from bakeout.validate.erasure import Detector, detections, detector_of, trials_of
from bakeout.validate.graph_edit import check_edit_in_graphs, first_hidden_states, lengths_of
from bakeout.validate.metrics import distances, relative_rms
from bakeout.validate.onnx_folder import OnnxFolder
from bakeout.validate.parity import (
    Expected,
    check_components,
    check_detector,
    check_edit,
    check_erased,
    check_kept,
    check_pictures,
    component_parity,
    curve,
    drawn,
    is_not_implemented,
    is_out_of_memory,
    reason,
)
from bakeout.validate.preservation import check_resemblance, check_seen
from bakeout.validate.reference import applied, latents_of
from bakeout.validate.report.schema import (
    REPORT_VERSION,
    Check,
    Curve,
    Detection,
    Drawn,
    Kind,
    Report,
    Scene,
    TensorParity,
    Verdict,
    verdict_of,
)
from bakeout.validate.runners import (
    Call,
    Settings,
    Trajectory,
    Trial,
    check_shapes,
    distinct_pictures,
    in_other_shapes,
    odd_prompts,
    pictures_of,
    pixels_from_png,
    run,
)
from bakeout.validate.tolerances import LIMITS, table_of
from bakeout.validate.widths import units_of

if TYPE_CHECKING:
    from bakeout.export.onnx_pipeline import SessionSettings

# Prompts that a profile draws, half of them with what was erased. With none of 300 detected, at most 1 % are, at 95 %
# confidence (one-sided; the report's intervals have two sides).
PROFILES: Mapping[str, int] = {"quick": 24, "release": 600}
# Of each kind, prompts whose every step is compared: more tell nothing new of a step.
_TRACKED = 12
# A batch has at most so many pixels, as one picture of Stable Diffusion 1.5, and so many pictures.
_BATCH_PIXELS, _BATCH = 512 * 512, 12
_TOOLS = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "transformers")
_NEEDED = {"onnx": ("onnx", "onnxruntime")}
_ORDER: Mapping[Verdict, int] = {"fail": 0, "unjudged": 1, "pass": 2}
BASE, REFERENCE = "base", "reference"
ERASED: Kind = "erased"
KEPT: Kind = "kept"


@dataclass(frozen=True)
class _Group:
    """Trials of one kind. Of a tracked group every step is compared, also forced along the reference's path."""

    kind: Kind
    tracked: bool
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class _Baseline:
    """What a target is compared with.

    Attributes:
        settings: how was drawn.
        scheduler: by its name, None for each model's own.
        reference: of each group.
        steps: of each kind, the base's distances after teacher-forced steps [steps, tracked trials].
        final: of each kind, the base's distances at the end of free-running trajectories [trials].
        concepts: of each tracked trial with what was erased, its concept.
        expected: calls of networks.
        verdicts: of the detector on the reference's pictures.
    """

    settings: Settings
    scheduler: str | None
    reference: list[Trajectory]
    steps: Mapping[Kind, Tensor]
    final: Mapping[Kind, Tensor]
    concepts: list[str]
    expected: list[Expected]
    verdicts: list[bool]


def validate(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    edit: str | os.PathLike[str] | None = None,
    profile: Profile | None = None,
    targets: Sequence[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    sessions: SessionSettings | None = None,
    device: str = "auto",
    progress: Callable[[float], object] | None = None,
) -> tuple[Report, dict[str, bytes]]:
    """Validate the artifact in `folder`, also one whose files were changed.

    Args:
        folder: of the artifact.
        base: the model that was edited; None opens it by the name in the manifest.
        edit: the Edit's file, where the artifact was released without it.
        profile: how many prompts, of `PROFILES`; None is that of the recipe.
        targets: formats of the artifact; None is all of them.
        prompts: a file of pairs, with what was erased and without, in place of the artifact's own prompts.
        count: how many prompts, in place of the profile's.
        seed: of the first prompt; the next ones count up.
        steps: denoising steps; None is the model's.
        guidance: scale of classifier-free guidance; None is the model's.
        size: width and height in pixels; None is the model's, or that for which the edit is made.
        scheduler: as `bakeout.generate.SCHEDULERS` has it; None is each model's own.
        sessions: of ONNX Runtime. Its kernels are `function` unless they are `library`.
        device: where base, reference and torch's targets run.
        progress: called with the part, of one for the whole, that was just done.

    Returns:
        What was found, and the pictures by the names that the report gives them.

    Raises:
        InputError: what was given cannot be used: no manifest, another base or Edit, no such target, no prompts.
    """
    started = time.monotonic()
    artifact = Artifact(Path(folder), read_manifest(Path(folder)))
    profile = profile or recorded_profile(artifact.manifest)
    chosen = chosen_targets(artifact, targets)
    check_providers(sessions)
    kernels = own_kernels(sessions, artifact.folder / ONNX) if ONNX in chosen else None
    count = PROFILES[profile] if count is None else count
    if count < 2:
        raise InputError(f"count is {count}: it must be 2 or more, for prompts with what was erased and without")
    asked = Request(("",), seed=seed, count=count, steps=steps, guidance=guidance, size=size, scheduler=scheduler)
    device = device_from_text(device)
    trials = trials_of(artifact.manifest, None if prompts is None else Path(prompts), count, seed)
    check_edit_given(artifact, None if edit is None else Path(edit))
    model = open_base(artifact, base)
    own = _Validation(artifact, model, trials, device, sessions, kernels, detector_of(artifact.manifest))
    baked = own.check_files(None if edit is None else Path(edit))
    if baked is not None:
        own.compare(baked, asked, chosen, progress or (lambda _: None))
    return own.report(profile, time.monotonic() - started), own.pictures


class _Validation:
    """One validation: what it is of, and what was found so far."""

    def __init__(
        self, artifact: Artifact, model: Model, trials: Sequence[Trial], device: str,
        sessions: SessionSettings | None, kernels: str | None, detector: Detector | None,
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.model = model
        self.interfaces = contract(model)
        self.groups = _groups(trials)
        self.device = device
        self.sessions = with_exact_products(sessions)
        self.kernels = kernels
        self.detector = detector
        self.pictures: dict[str, bytes] = {}
        self._precisions: dict[str, str] = {}
        self._settings: dict[str, Any] = {}
        self._checks: list[Check] = []
        self._tensors: list[TensorParity] = []
        self._curves: list[Curve] = []
        self._detections: list[Detection] = []
        # Of each model its pictures, in the order of the trials.
        self._drawn: dict[str, list[Drawn]] = {}

    @property
    def trials(self) -> list[Trial]:
        """All of them, in the order of the groups."""
        return [trial for group in self.groups for trial in group.trials]

    @property
    def _concepts(self) -> list[str]:
        """Of each trial with what was erased."""
        return [trial.concept for trial in self.trials if trial.kind == ERASED]

    @property
    def _made(self) -> Tensorrt:
        """With what the engines were made."""
        made = self.artifact.manifest.tensorrt
        if made is None:
            raise TypeError("a manifest with that target says how it was made")
        return made

    def check_files(self, given: Path | None) -> Edit | None:
        """Check the files, and return the Edit: that in a file, or the artifact's; None if its own was changed."""
        fault = None
        try:
            self.artifact.verify()
        except (InputError, OSError) as error:
            fault = self._reason(error)
        summary = "Every file is as the manifest says" if fault is None else fault
        self._say("files", None, "pass" if fault is None else "fail", f"{summary}.")
        if given is not None:
            edit = Edit.load(given)
        else:
            try:
                edit = self.artifact.edit
            except InputError as error:
                self._say("edit", None, "unjudged", f"Without its Edit there is no reference: {self._reason(error)}.")
                return None
        # Prompts and claims go by the manifest, so a wrong concept there would be judged on the wrong prompts.
        claimed = [it.model_dump() for it in self.artifact.manifest.edits]
        agrees = claimed == [asdict(it) for it in edit.origins]
        summary = f"The Edit {'is' if agrees else 'is not'} of the concepts and methods that the manifest names."
        self._say("edit", None, "pass" if agrees else "fail", summary)
        self._check_validity(edit)
        return edit

    def _check_validity(self, edit: Edit) -> None:
        # By these numbers runtimes refuse what would go around the edit.
        said, reached = self.artifact.manifest.validity.hidden_states, first_hidden_states(edit)
        names = sorted(said.keys() | reached.keys())
        wrong = [name for name in names if said.get(name) != reached.get(name)]
        latents, only = self.artifact.manifest.validity.latents, latents_of(edit)
        narrow = self._claims_other_widths(edit)
        summary = (
            "The manifest says from which hidden state of each text encoder on the edit is there, at which size of "
            "latents, and which FFNs are narrower."
        )
        if latents != only:
            summary = f"The edit is for latents of {_size(only)}, and the manifest says of {_size(latents)}."
        elif wrong:
            summary = (
                f"The edit is in all hidden states of {wrong[0]!a:.100} from {_number(reached.get(wrong[0]))} on, and "
                f"the manifest says from {_number(said.get(wrong[0]))}."
            )
        elif narrow:
            summary = "The manifest says of FFNs in graphs that other numbers of hidden units are there than must be."
        self._say("validity", None, "fail" if wrong or latents != only or narrow else "pass", summary)

    def _claims_other_widths(self, edit: Edit) -> bool:
        for how in (self.artifact.manifest.onnx, self.artifact.manifest.tensorrt):
            units = {} if how is None else units_of(edit, self.model, how.shrink)
            claimed = {} if how is None else {name: (it.kept, it.of) for name, it in how.widths.items()}
            if claimed != {name: (len(own), self.model.site(name).d_in) for name, own in units.items()}:
                return True
        return False

    def compare(self, edit: Edit, asked: Request, targets: Sequence[str], progress: Callable[[float], object]) -> None:
        """Audit the targets' files, then draw with all models and judge."""
        self._precisions = {target: precision_of(self.artifact.manifest, target) for target in targets}
        targets = [target for target in targets if self._is_installed(target)]
        for target in targets:
            self._audit(target, edit)
        targets = [target for target in targets if self._can_run(target)]
        tracked = sum(len(group.trials) for group in self.groups if group.tracked)
        drawings = (2 + len(targets)) * len(self.trials) + (1 + len(targets)) * tracked

        def advance(pictures: float) -> None:
            progress(pictures / drawings)

        with without_tf32():
            try:
                baseline = self._draw_baseline(edit, asked, advance)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = f"There is not enough memory to draw with the reference ({reason(error)})."
                self._say("reference", None, "unjudged", said)
                return
            _release()
            # Nothing is near what is not finite, and that is not the targets' fault.
            if not all(own.latents.isfinite().all() for own in baseline.reference):
                return
            for target in targets:
                self._judge(target, baseline, advance)
                _release()

    def report(self, profile: Profile, seconds: float) -> Report:
        """All that was found."""
        manifest = self.artifact.manifest
        checks = sorted(self._checks, key=lambda it: _ORDER[it.verdict])
        return Report(
            version=REPORT_VERSION,
            verdict=verdict_of(checks),
            artifact=self.artifact.folder.resolve().name,
            manifest=file_digest(self.artifact.folder / MANIFEST),
            base=manifest.base.name,
            edit=manifest.edit,
            erased=tuple(f"{it.concept} ({it.method})" for it in manifest.edits),
            profile=profile,
            settings=self._settings,
            tools=_tools(),
            checks=tuple(checks),
            tensors=tuple(self._tensors),
            curves=tuple(self._curves),
            scenes=tuple(
                Scene(
                    prompt=trial.prompt, seed=trial.seed, kind=trial.kind,
                    drawn={model: drawings[number] for model, drawings in self._drawn.items()},
                )
                for number, trial in enumerate(self.trials)
                if self._drawn
            ),
            detections=tuple(self._detections),
            detector=None if self.detector is None else self.detector.name,
            tolerances=table_of(self._precisions.values()),
            seconds=seconds,
        )  # fmt: skip

    def _is_installed(self, target: str) -> bool:
        missing = [name for name in _NEEDED.get(target, ()) if importlib.util.find_spec(name) is None]
        if missing:
            self._say("runs", target, "unjudged", f"{not_installed(missing[0])}.")
        return not missing

    def _can_run(self, target: str) -> bool:
        folder = self.artifact.folder / target
        why = why_not_here(self.artifact.manifest, target, folder, self.sessions, gpu_of(self.device))
        if why is not None:
            self._say("runs", target, "unjudged", f"It was not run: {self._reason(why)}.")
        return why is None

    def _audit(self, target: str, edit: Edit) -> None:
        folder = self.artifact.folder / target
        texts = [trial.prompt for trial in self.trials]
        with self._finding("configuration", target):
            self._checks.append(check_configuration(target, self.model, folder, texts, latents_of(edit)))
        if target == TENSORRT:
            with self._finding("engines", target):
                made, kept = self._made, kept_in_graphs(edit, self.model)
                self._checks.append(check_engines(target, self.model, folder, made, kept))
            return
        with self._finding("weights", target), ExitStack() as stack:
            names = self._names()
            kept = kept_in_graphs(edit, self.model) if target == ONNX else []
            if target == ONNX:
                graphs = OnnxFolder(folder, self.model, self._precisions[target])
                self._checks.append(graphs.check_interface(target, lengths_of(kept), latents_of(edit)))
                if kept:
                    with self._finding("edit-in-graph", target):
                        self._checks.append(check_edit_in_graphs(target, self.model, kept, graphs, names))
                read: Read = partial(graphs.read, names)
                beside = [*graphs.beside(), *graphs.strange(kept), *graphs.unaccounted(names, kept)]
                narrow = graphs.dtype
            else:
                read = stack.enter_context(parameters(self.artifact.model))
                beside = weights_beside(self.artifact.model)
                narrow = None
            how = self.artifact.manifest.onnx
            units = units_of(edit, self.model, how.shrink) if target == ONNX and how is not None else {}
            self._checks.append(check_weights(target, self.model, edit, names, read, beside, kept, units, narrow))

    def _names(self) -> dict[Parameter, str]:
        """What the targets call each parameter of the base: as the artifact's diffusers folder does."""
        names = names_of(self.model)
        try:
            own = names_of(self.artifact.model)
        except InputError:
            return names
        return {place: own.get(place, name) for place, name in names.items()}

    def _draw_baseline(self, edit: Edit, asked: Request, advance: Callable[[float], object]) -> _Baseline:
        """Draw with base and reference, which are one pipeline."""
        pipeline = self.model.pipeline(self.device, torch.float32)
        settings = self._settings_of(pipeline, asked, latents_of(edit))
        base = self._free(pipeline, settings, advance)
        with applied(edit, self.model, pipeline):
            reference = self._free(pipeline, settings, advance, capture=True)
        # A bias in 16 bits is off by more than networks may be apart; whether it is the nearest, the audit knows.
        with applied(merge([edit, rounding_of(edit, self.model)]), self.model, pipeline):
            answers = [
                (kind, call, self._answer(pipeline, call)) for kind, call in self._calls(edit, pipeline, reference)
            ]
        expected = [
            Expected(kind, call, outputs, {name: relative_rms(value, outputs[name]) for name, value in own.items()})
            for kind, call, outputs in answers
            for own in [self._answer(pipeline, call)]
        ]
        forced = self._forced(pipeline, settings, reference, advance)
        steps, final = self._apart(base, forced, reference)
        self._add_curves(BASE, base, steps, reference)
        self._add_pictures(BASE, base, reference)
        self._add_pictures(REFERENCE, reference, None)
        self._detect(BASE)
        verdicts = self._detect(REFERENCE)
        concepts = [trial.concept for group in self.groups if group.tracked for trial in group.trials]
        concepts = concepts[: steps[ERASED].shape[1]]
        self._check_baseline(steps, final, concepts, reference)
        return _Baseline(settings, asked.scheduler, reference, steps, final, concepts, expected, verdicts)

    def _calls(self, edit: Edit, pipeline: Any, reference: Sequence[Trajectory]) -> Iterator[tuple[Kind, Call]]:
        """With what networks are compared: what they were called with, the same in other shapes, and odd prompts."""
        for group, trajectory in zip(self.groups, reference, strict=True):
            for call in (*trajectory.calls, *in_other_shapes(trajectory.calls, pipeline, latents_of(edit))):
                yield group.kind, call
        edited = {self.model.site(it.site).component for it in edit.operations}
        for name in sorted(name for name in edited if name.startswith("text_encoder")):
            for call in odd_prompts(pipeline, name, self.trials[0].prompt):
                yield ERASED, call

    def _judge(self, target: str, baseline: _Baseline, advance: Callable[[float], object]) -> None:
        """Draw with a target, and compare."""
        settings, reference, expected = baseline.settings, baseline.reference, baseline.expected
        limits, run_one = LIMITS[self._precisions[target]], run_network
        if target == TENSORRT:
            shapes = self._made.shapes
            if why := why_not_of_size(shapes, settings):
                self._say("runs", target, "unjudged", why)
                return
            factor = settings.size[0] // settings.latents[2]
            settings, expected = settings_of(shapes, settings), of_size(shapes, expected, factor)
            run_one = partial(run_in_pieces, shapes)
        try:
            pipeline = self._load(target)
            if baseline.scheduler is not None:
                pipeline.scheduler = scheduler_for(pipeline, baseline.scheduler)
            rows = component_parity(target, pipeline, self.interfaces, expected, limits, run_one)
            self._tensors += rows
            self._checks.append(check_components(target, rows))
            free = self._free(pipeline, settings, advance)
            check_shapes(free, reference)
            forced = self._forced(pipeline, settings, reference, advance)
            steps, final = self._apart(free, forced, reference)
        except Exception as error:  # noqa: BLE001 - whatever a broken artifact raises is a finding, and no end
            short = is_out_of_memory(error)
            said = self._reason(error)
            told = f"There is not enough memory to draw with it ({said})." if short else f"It does not run: {said}."
            # That is no fault of the graph: for bf16 there are few kernels, on GPUs too.
            lacking = limits.precision == "bf16" and is_not_implemented(error)
            if lacking:
                told = f"This ONNX Runtime has no kernels for it in bf16 ({said}): validate with one that has them."
            self._say("runs", target, "unjudged" if short or lacking else "fail", told)
            return
        self._say("runs", target, "pass", f"It loads, and draws with {RUNTIME_OF[target]}.")
        base_steps, base_final = baseline.steps[ERASED], baseline.final[ERASED]
        if limits.precision != "fp32":
            self._checks.append(
                check_edit(self._concepts, base_steps, base_final, baseline.concepts, target=target, limits=limits)
            )
        self._checks += check_erased(target, steps[ERASED], base_steps, final[ERASED], base_final, limits)
        if KEPT in final:
            self._checks += check_kept(target, steps[KEPT], final[KEPT], limits)
        self._add_curves(target, free, steps, reference)
        self._add_pictures(target, free, reference)
        distinct = (distinct_pictures(free), distinct_pictures(reference))
        self._checks.append(check_pictures(target, self._drawn[target], self._drawn[REFERENCE], distinct, limits))
        if baseline.verdicts:
            self._checks.append(check_detector(target, self._detect(target), baseline.verdicts, limits))

    def _settings_of(self, pipeline: Any, asked: Request, latents: tuple[int, int] | None) -> Settings:
        factor = pipeline.vae_scale_factor
        only = None if latents is None else (factor * latents[1], factor * latents[0])
        request = complete(asked, pipeline, recommended_for(self.artifact), only)
        if request.steps is None or request.guidance is None or request.size is None:
            raise TypeError("a completed request has all settings")
        if request.scheduler is not None:
            pipeline.scheduler = scheduler_for(pipeline, request.scheduler)
        name = type(pipeline.scheduler).__name__
        try:
            pipeline.scheduler.set_timesteps(request.steps)
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{name} cannot draw in {request.steps} steps: take more steps or another scheduler"
            ) from error
        width, height = request.size
        self._settings = {
            "steps": request.steps,
            "guidance": request.guidance,
            "scheduler": name,
            "size": [width, height],
            "seeds": f"{request.seed} to {request.seed + len(self.trials) - 1}",
            "negative_prompt": None,
            "device": self.device,
            "providers": list(self.sessions.providers) if self.sessions else ["CPUExecutionProvider"],
            "kernels": self.kernels,
            "precisions": self._precisions,
            "engines": recorded(self._made) if TENSORRT in self._precisions else None,
        }
        shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
        batch = max(1, min(_BATCH, _BATCH_PIXELS // (width * height)))
        return Settings(request.steps, request.guidance, (width, height), shape, batch)

    def _load(self, target: str) -> Any:
        runtime = RUNTIME_OF[target]
        if runtime == "torch":
            # As diffusers loads it, with all hidden states, of which the artifact's own loader withholds some.
            return self.artifact.model.pipeline(self.device, torch.float32)
        if runtime == "tensorrt":
            return self.artifact.load(runtime, device=gpu_of(self.device))
        return self.artifact.load(runtime, sessions=with_kernels_chosen(self.sessions))

    def _free(
        self, pipeline: Any, settings: Settings, advance: Callable[[float], object], *, capture: bool = False
    ) -> list[Trajectory]:
        return [
            run(pipeline, group.trials, settings, every_step=group.tracked, capture=capture and group.tracked,
                progress=advance)
            for group in self.groups
        ]  # fmt: skip

    def _forced(
        self, pipeline: Any, settings: Settings, reference: Sequence[Trajectory], advance: Callable[[float], object]
    ) -> dict[Kind, Tensor]:
        return {
            group.kind: run(pipeline, group.trials, settings, forced=own.latents, progress=advance).latents
            for group, own in zip(self.groups, reference, strict=True)
            if group.tracked
        }

    def _answer(self, pipeline: Any, call: Call) -> dict[str, Tensor]:
        return run_network(pipeline, call.network, self.interfaces[call.network], call.inputs)

    def _apart(
        self, free: Sequence[Trajectory], forced: Mapping[Kind, Tensor], reference: Sequence[Trajectory]
    ) -> tuple[dict[Kind, Tensor], dict[Kind, Tensor]]:
        """Of each kind, distances to the reference: after forced steps [steps, tracked trials], at the end [trials]."""
        pairs = list(zip(self.groups, free, reference, strict=True))
        steps = {
            group.kind: distances(forced[group.kind], other.latents, 2) for group, _, other in pairs if group.tracked
        }
        final = {
            kind: torch.cat(
                [distances(own.latents[-1], other.latents[-1]) for group, own, other in pairs if group.kind == kind]
            )
            for kind in steps
        }
        return steps, final

    def _add_curves(
        self, model: str, free: Sequence[Trajectory], steps: Mapping[Kind, Tensor], reference: Sequence[Trajectory]
    ) -> None:
        for group, own, other in zip(self.groups, free, reference, strict=True):
            if group.tracked:
                apart = distances(own.latents, other.latents, 2)
                self._curves.append(curve(model, group.kind, steps[group.kind], forced=True))
                self._curves.append(curve(model, group.kind, apart, forced=False))

    def _add_pictures(self, model: str, drawings: Sequence[Trajectory], reference: Sequence[Trajectory] | None) -> None:
        digits = len(str(len(self.trials)))
        pngs = pictures_of(drawings)
        others = pictures_of(reference) if reference is not None else [None] * len(pngs)
        problems = [problem for own in drawings for problem in own.problems]
        seen = self.detector.look([pixels_from_png(png) for png in pngs]) if self.detector else [None] * len(pngs)
        files = [f"pictures/{number:0{digits}}-{model}.png" for number in range(1, len(pngs) + 1)]
        self.pictures |= dict(zip(files, pngs, strict=True))
        self._drawn[model] = [drawn(*it) for it in zip(files, pngs, problems, seen, others, strict=True)]

    def _detect(self, model: str) -> list[bool]:
        """Add what the detector finds in a model's pictures, and return its verdicts; none without a detector."""
        if self.detector is None:
            return []
        found, verdicts = detections(self.detector, model, self.trials, [str(it.seen) for it in self._drawn[model]])
        self._detections += found
        return verdicts

    def _check_baseline(
        self, steps: Mapping[Kind, Tensor], final: Mapping[Kind, Tensor], concepts: Sequence[str],
        reference: Sequence[Trajectory],
    ) -> None:  # fmt: skip
        """Whether there is something to compare with, and something to see."""
        of_base, of_reference = (
            [it for it in self._detections if (it.model, it.kind) == (model, ERASED)] for model in (BASE, REFERENCE)
        )
        seen = zip(of_base, of_reference, strict=True)
        self._checks.append(check_edit(self._concepts, steps[ERASED], final[ERASED], concepts, seen))
        if KEPT in final:
            base, edited = self._drawn[BASE], self._drawn[REFERENCE]
            self._checks.append(check_resemblance(self.trials, base, edited, self.pictures))
            if self.detector is not None and (kept := check_seen(self.detector, self.trials, base, edited)):
                self._checks.append(kept)
        else:
            self._say("kept-prompts", None, "unjudged", "There are no prompts without what was erased.")
        odd = [it for it in self._drawn[REFERENCE] if it.problem]
        same = len(self.trials) - distinct_pictures(reference)
        said = "All of the reference's pictures show something, and no two are the same."
        if odd:
            said = f"{len(odd)} of the reference's pictures show nothing, as {odd[0].file}: {odd[0].problem}."
        elif same:
            said = f"{same} of the reference's pictures are copies of others."
        self._say("reference-pictures", None, "unjudged" if odd or same else "pass", said)

    @contextmanager
    def _finding(self, name: str, target: str) -> Iterator[None]:
        """What goes wrong inside is a failed check of that name."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a broken file raises is a finding, and no end
            short = is_out_of_memory(error)
            self._say(name, target, "unjudged" if short else "fail", f"It cannot be checked: {self._reason(error)}.")

    def _reason(self, error: Exception) -> str:
        """An error in a line, without the folders of this machine."""
        folder = self.artifact.folder
        said = reason(error).replace(f"{folder}{os.sep}", "").removesuffix(".")
        # A relative one may be a dot, which is in every sentence.
        return said.replace(str(folder), folder.name) if folder.is_absolute() else said

    def _say(self, name: str, target: str | None, verdict: Verdict, summary: str) -> None:
        self._checks.append(Check(name=name, target=target, verdict=verdict, summary=summary))


def _release() -> None:
    """Give back the memory of a pipeline that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _number(state: int | None) -> str:
    return "none" if state is None else f"number {state}"


def _size(latents: tuple[int, int] | None) -> str:
    return "any size" if latents is None else f"{latents[1]}x{latents[0]} (width x height)"


def _tools() -> dict[str, str]:
    found = {"bakeout": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _groups(trials: Sequence[Trial]) -> list[_Group]:
    groups = []
    for kind in (ERASED, KEPT):
        own = tuple(trial for trial in trials if trial.kind == kind)
        groups += [_Group(kind, True, own[:_TRACKED]), _Group(kind, False, own[_TRACKED:])]
    return [group for group in groups if group.trials]
