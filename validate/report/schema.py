"""`report.json`: what a validation found, in a closed schema.

Numbers that are not finite are null. Distances are relative RMS, rms(a - b) / rms(b), where b is the reference.
The docstrings' lists of attributes are the documentation of the format: `docs/report.md` is made of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

REPORT_VERSION: Final = 1

Verdict = Literal["pass", "fail", "unjudged"]
# Pictures of a prompt with what was erased, and of one without it.
Kind = Literal["erased", "kept"]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Its name does not begin with a dot and has no slash, so it does not leave the folder.
PictureFile = Annotated[str, Field(pattern=r"^pictures/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}\.png$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Check(_Record):
    """One question with a verdict.

    Attributes:
        name: stable, for machines: `weights`, `step-parity`, …; with the target unique in a report.
        target: which format of the artifact, `diffusers`, `onnx` or `tensorrt`; None where it concerns all of it.
        verdict: `unjudged` where nothing could be told, which is no pass.
        summary: one sentence with what was found, and what was allowed.
        measured: the number that decided, None where none did or it is not finite.
        limit: what `measured` was held against.
        bound: whether `measured` may be at most or must be at least `limit`.
    """

    name: str
    target: str | None
    verdict: Verdict
    summary: str
    measured: float | None = None
    limit: float | None = None
    bound: Literal["at most", "at least"] = "at most"


class Worst(_Record):
    """The element with the largest absolute difference.

    Attributes:
        index: where, counted from 0.
        artifact: its value there; None if that is not finite.
        reference: the reference's value there; None if that is not finite.
    """

    index: tuple[Count, ...]
    artifact: float | None
    reference: float | None


class TensorParity(_Record):
    """One output of one component, artifact against reference, fed the same inputs from a real trajectory.

    Attributes:
        target: which format of the artifact.
        component: `text_encoder`, `unet`, `vae_decoder`, …
        output: its name in the directory contract.
        kind: of the prompts of the call.
        call: which call: `prompts 1-4`, `step 5 of 20`.
        shape: of the tensor.
        relative_rms: artifact against reference; None if an element is not finite, or the output is missing.
        sqnr_db: 20 log10(1 / relative_rms) in dB; None also where the two are identical.
        base_relative_rms: the base against the reference, fed the same inputs.
        limit: of `relative_rms`.
        worst: None where the two are identical, or one is missing.
        problem: None, or why the two cannot be compared.
    """

    target: str
    component: str
    output: str
    kind: Kind
    call: str
    shape: tuple[Count, ...]
    relative_rms: float | None
    sqnr_db: float | None
    base_relative_rms: float | None
    limit: float
    worst: Worst | None
    problem: str | None = None


class Curve(_Record):
    """Distance of one model's latents to the reference's after each step.

    Attributes:
        model: `base`, or a target of the artifact.
        forced: whether every step began at the reference's latents (teacher-forced), or at the model's own.
        kind: of the prompts over which was averaged (root of the mean square).
        relative_rms: one a step; None where it is not finite.
    """

    model: str
    forced: bool
    kind: Kind
    relative_rms: tuple[float | None, ...]


class Drawn(_Record):
    """One model's picture of a scene, and how like the reference's picture it is.

    Attributes:
        file: a PNG in the report's folder, like `pictures/03-base.png`.
        psnr_db: None for identical pictures, and for the reference's own.
        ssim: 0 to 1; None for the reference's own.
        max_difference: largest difference of a value in 0 … 255; None for the reference's own.
        problem: None, or why this is no picture of anything.
        seen: what the detector sees, None without one.
    """

    file: PictureFile
    psnr_db: float | None
    ssim: float | None
    max_difference: Annotated[int, Field(ge=0, le=255)] | None
    problem: str | None
    seen: str | None


class Scene(_Record):
    """A prompt and seed, drawn by every model.

    Attributes:
        prompt: as it was given.
        seed: of the initial latents.
        kind: whether the prompt has what was erased.
        drawn: the pictures of `base`, `reference` and each target of the artifact; a model without one drew none.
    """

    prompt: str
    seed: Count
    kind: Kind
    drawn: dict[str, Drawn]


class Detection(_Record):
    """In how many pictures of a kind a detector sees the concept, with the exact binomial (Clopper-Pearson) interval.

    Attributes:
        concept: what was erased.
        kind: `erased`: pictures whose prompt has the concept, of which few should show it. `kept`: pictures whose
            prompt has it not; counted is then whether they show what their prompt asks for.
        model: `base`, `reference`, or a target.
        detected: pictures counted.
        pictures: out of so many.
        low: of the interval.
        high: of the interval.
        confidence: of the interval.
    """

    concept: str
    kind: Kind
    model: str
    detected: Count
    pictures: Count
    low: Share
    high: Share
    confidence: Share


class Tolerance(_Record):
    """A limit that checks hold something against.

    Attributes:
        name: stable, for machines.
        limit: the number.
        reason: why it is that number.
    """

    name: str
    limit: float
    reason: str


class Report(_Record):
    """The content of `report.json`.

    Attributes:
        version: of this format.
        verdict: `fail` if a check failed, else `unjudged` if one was not judged, else `pass`.
        artifact: the folder's name.
        manifest: SHA-256 of its `bakeout.json`; if that has another now, this report is of an older state.
        base: the name of the model that was edited.
        edit: digest of the Edit.
        erased: a line for each concept, with its method.
        profile: `quick` or `release`.
        settings: how was drawn: steps, guidance, scheduler, size, seeds, negative prompt, providers, kernels (null
            where no graph has operators of ours), precisions of the targets, and with and for what engines were made
            (null where none are).
        tools: versions.
        checks: all of them, at least one, failed ones first.
        tensors: the table of component parity.
        curves: per step.
        scenes: prompts and pictures.
        detections: empty without a detector.
        detector: which, None where there is none for this model.
        tolerances: the table that the limits are from.
        seconds: how long it took.
    """

    version: Literal[1]
    verdict: Verdict
    artifact: str
    manifest: Sha256
    base: str
    edit: Sha256
    erased: tuple[str, ...]
    profile: Literal["quick", "release"]
    settings: dict[str, JsonValue]
    tools: dict[str, str]
    checks: Annotated[tuple[Check, ...], Field(min_length=1)]
    tensors: tuple[TensorParity, ...]
    curves: tuple[Curve, ...]
    scenes: tuple[Scene, ...]
    detections: tuple[Detection, ...]
    detector: str | None
    tolerances: tuple[Tolerance, ...]
    seconds: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """What is told twice is told alike: nobody turns a failed report into a passed one by a single word."""
        if self.verdict != (due := verdict_of(self.checks)):
            raise ValueError(f"the verdict is {self.verdict}, and the checks say {due}")
        _refuse_twins("check", ((check.target, check.name) for check in self.checks))
        _refuse_twins("picture", (drawn.file for scene in self.scenes for drawn in scene.drawn.values()))
        return self

    def to_json(self) -> bytes:
        """UTF-8, indented, with a newline at the end."""
        said = self.model_dump(mode="json")
        # A folder's name may hold bytes that are no text.
        return (json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """`fail` if a check failed, else `unjudged` if one was not judged or there is none, else `pass`."""
    found = {check.verdict for check in checks}
    return "fail" if "fail" in found else "pass" if found == {"pass"} else "unjudged"


def _refuse_twins(what: str, names: Iterable[object]) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise ValueError(f"two are the same {what}: {twins[0]!a:.200}")
