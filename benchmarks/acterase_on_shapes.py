"""What ActErase erases from `shapes`, and what it leaves: τ, both profiles, the options, many concepts, other methods.

    python benchmarks/acterase_on_shapes.py --workers 2

Each point is baked from a recipe, exported and drawn through ONNX Runtime. The detector of `shapes` says what is in
the pictures of prompts that name the concept and of as many that do not. The i-th prompt of each is drawn from seed i,
with the steps and the guidance of the model card. Of several concepts at once each has its share of the prompts, and
the artifact is validated as well. Writes `docs/acterase-sweep.md`, `.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr

from bakeout import Artifact, Recipe, open_model
from bakeout.builtin.shapes.detector import load_detector
from bakeout.builtin.shapes.evaluation import GUIDANCE, STEPS, Share, accuracy, generate, scenes_with, scenes_without
from bakeout.builtin.shapes.evaluation import share as share_of
from bakeout.builtin.shapes.scenes import ATTRIBUTES, BACKGROUNDS, prompt
from bakeout.editor.edit import Edit
from bakeout.editor.methods import acterase, conceptprune, snce
from bakeout.export.onnx_pipeline import SessionSettings

PROMPTS, FEWER = 100, 40
# Of a validation.
VALIDATED = 24
DETECTED_AT_MOST, KEPT_AT_LEAST = 0.10, 0.90
SWEPT = ("star", "striped", "yellow")
COMPARED = (*SWEPT, "night")
# The first ones are erased at once, one of each kind before a second one of any.
TEN = ("star", "striped", "yellow", "night", "ring", "dotted", "purple", "heart", "cyan", "moon")
TOGETHER = (2, 3, 5, 10)
TAUS, PAPER_TAUS = (0.01, 0.02, 0.03, 0.05), (0.01, 0.1, 1.0)
PROFILES = tuple(acterase.PROFILES)
KNOWN: Mapping[str, Mapping[str, Any]] = {
    name: next(iter(module.PUBLISHED["shapes"].values()))
    for name, module in {"acterase": acterase, "conceptprune": conceptprune, "snce": snce}.items()
}
# What differs from the settings that work, one at a time, and the profile.
OPTIONS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("paper", {"mask_time": "last"}),
    ("paper", {"mask_time": "union"}),
    ("paper", {"pairs": "union"}),
    ("paper", {"trajectory": "independent"}),
    ("paper", {"tau_scope": "token"}),
    ("paper", {"signed": True}),
    ("portable", {"importance": "edge"}),
    ("paper", {"site": "ffn_output"}),
    ("paper", {"site": "ffn1_input"}),
    ("paper", {"site": "attn"}),
)
# What is measured: part of the page, prompts of each kind, and the edits as a recipe has them; no edit, nothing erased.
Point = Mapping[str, Any]


def points() -> list[Point]:
    """Everything that is measured, without results."""
    known = KNOWN["acterase"]

    def acted(part: str, concepts: Sequence[str], profile: str, prompts: int = PROMPTS, **settings: Any) -> Point:
        return _point(part, [_edit("acterase", concept, settings, profile) for concept in concepts], prompts)

    return [
        *(_point("unedited", [], PROMPTS, concept) for concept in COMPARED),
        *(acted("paper", ["star"], profile, tau=tau) for profile in PROFILES for tau in PAPER_TAUS),
        *(acted("paper", [concept], "paper", tau=0.01) for concept in SWEPT[1:]),
        *(
            acted("sweep", [concept], profile, **{**known, "tau": tau})
            for concept in SWEPT
            for profile in PROFILES
            for tau in TAUS
        ),
        *(
            acted("options", [concept], profile, FEWER, **{**known, **changed})
            for profile, changed in OPTIONS
            for concept in ("star", "yellow")
            if concept == "star" or changed.keys() & {"mask_time", "pairs", "trajectory"}
        ),
        *(acted("several", TEN[:count], profile, **known) for profile in PROFILES for count in TOGETHER),
        *(acted("methods", ["night"], profile, **known) for profile in PROFILES),
        *(
            _point("methods", [_edit(method, concept, KNOWN[method])], PROMPTS)
            for method in ("conceptprune", "snce")
            for concept in COMPARED
        ),
    ]


def _point(part: str, edits: Sequence[Mapping[str, Any]], prompts: int, *concepts: str) -> Point:
    concepts = concepts or tuple(edit["concept"] for edit in edits)
    return {"part": part, "concepts": concepts, "prompts": prompts, "edits": edits}


def _edit(method: str, concept: str, settings: Mapping[str, Any], profile: str | None = None) -> Mapping[str, Any]:
    """As a recipe has it."""
    said = {"method": method, "concept": concept, "prompts": _prompts(concept), "settings": dict(settings)}
    return said if profile is None else {**said, "profile": profile}


def _prompts(concept: str) -> Mapping[str, Any]:
    """A pack's, or for a background, which no pack has, one pair a colour: what pairs name is erased with it."""
    attribute = _attribute(concept)
    if attribute != "background":
        return {"pack": f"shapes-{attribute}"}
    colours = list(ATTRIBUTES["colour"])
    target = f"a {{colour}} shape {BACKGROUNDS[concept]}"
    return {"target": target, "reference": "a {colour} shape", "lists": {"colour": colours}}


def _attribute(concept: str) -> str:
    return next(name for name, values in ATTRIBUTES.items() if concept in values)


class _Recipe(Recipe):
    """A recipe whose calibrations stay in a folder, for the next points that need the same ones."""

    _work: Path = PrivateAttr()

    def bake_with(self, work: Path, folder: Path) -> Artifact:
        """As `bake`, with the calibrations in `work`."""
        self._work = work
        return self.bake(folder, device="cpu")

    def _calibrate(self, model: Any, prompts: Any, _work: Path, *others: Any) -> Edit:
        return super()._calibrate(model, prompts, self._work, *others)


def measure(point: Point, work: Path) -> Point:
    """`point` with what was seen and how much is patched; of several concepts also what a validation says.

    `detected` is of the prompts that name each concept, `own` of what else they ask for, and `others` of prompts that
    name no concept. Calibrations are kept in `work`.
    """
    torch.set_num_threads(1)
    concepts, detector = point["concepts"], load_detector()
    detected: dict[str, Share] = {}
    own = dict.fromkeys(ATTRIBUTES, (0, 0))
    with _artifact(point, work) as artifact:
        pipeline: Any = (
            artifact.load(runtime="onnxruntime", sessions=SessionSettings(threads=1))
            if artifact is not None
            else open_model("shapes").pipeline(dtype=torch.float32)
        )
        for concept in concepts:
            attribute = _attribute(concept)
            scenes = scenes_with(attribute, concept, point["prompts"] // len(concepts))
            pictures = generate(pipeline, [prompt(scene) for scene in scenes], batch=20)
            detected[concept] = accuracy(detector, pictures, scenes)[attribute]
            for seen, scene in zip(detector.classify(pictures), scenes, strict=True):
                for name in (name for name, value in scene.labels.items() if value not in concepts):
                    correct, of = own[name]
                    own[name] = correct + (seen[name] == scene.labels[name]), of + 1
        scenes = scenes_without(concepts, point["prompts"])
        others = accuracy(detector, generate(pipeline, [prompt(scene) for scene in scenes], batch=20), scenes)
        return {
            **point,
            "detected": detected,
            "own": {name: share_of(*counted) for name, counted in own.items() if counted[1]},
            "others": others,
            **(_facts(artifact, validated=point["part"] == "several") if artifact is not None else {}),
        }


@contextmanager
def _artifact(point: Point, work: Path) -> Iterator[Artifact | None]:
    if not point["edits"]:
        yield None
        return
    recipe = _Recipe.model_validate({"version": 1, "model": "shapes", "targets": ["onnx"], "edits": point["edits"]})
    with tempfile.TemporaryDirectory() as folder:
        yield recipe.bake_with(work, Path(folder) / "artifact")


def _facts(artifact: Artifact, *, validated: bool) -> Mapping[str, Any]:
    """The share of what the edit could hold that it holds, and the checks of a validation that did not pass."""
    touched = [operation.touched for operation in artifact.edit.operations]
    said: dict[str, Any] = {
        "touched": sum(count for count, _, _ in touched) / max(1, sum(of for _, of, _ in touched))
    }  # fmt: skip
    if validated:
        with tempfile.TemporaryDirectory() as folder:
            report = artifact.validate(
                folder, targets=["onnx"], count=VALIDATED, device="cpu", sessions=SessionSettings(threads=1)
            )
        said["verdict"] = report.verdict
        said["failed"] = [check.name for check in report.checks if check.verdict == "fail"]
        said["preservation"] = {
            check.name: {"verdict": check.verdict, "lost": check.measured}
            for check in report.checks
            if check.name.startswith("preservation")
        }
    return said


def detected(row: Point) -> float:
    """The share of prompts with a concept in whose pictures it is seen; of several concepts the worst."""
    return max(float(share["share"]) for share in row["detected"].values())


def own_kept(row: Point) -> float:
    """What else those prompts ask for and was not erased: the share drawn as told of the worst attribute."""
    return min(float(share["share"]) for share in row["own"].values())


def others_kept(row: Point) -> float:
    """Of prompts without the concepts, the share drawn as told of the worst attribute."""
    return min(float(share["share"]) for share in row["others"].values())


def reaches_the_target(row: Point) -> bool:
    """Still detected in at most 10 % of its prompts, every attribute of other prompts as told in 90 % or more."""
    return detected(row) <= DETECTED_AT_MOST and others_kept(row) >= KEPT_AT_LEAST


def _cells(row: Point) -> list[str]:
    edit: dict[str, Any] = row["edits"][0] if row["edits"] else {"method": "nothing erased", "settings": {}}
    settings = " ".join(f"{name}={value}" for name, value in edit["settings"].items())
    method = f"{edit['method']} {edit.get('profile', '')}".rstrip()
    preserved = [f"{name} {it['verdict']}, {it['lost']:.0%} lost" for name, it in row.get("preservation", {}).items()]
    return [
        ", ".join(row["concepts"]), method, settings,
        f"{row['touched']:.2%}" if "touched" in row else "", str(row["prompts"]),
        f"{detected(row):.0%}", f"{own_kept(row):.0%}",
        *(f"{row['others'][name]['share']:.0%}" for name in ATTRIBUTES), f"{others_kept(row):.0%}",
        "yes" if row["edits"] and reaches_the_target(row) else "", "; ".join(preserved),
    ]  # fmt: skip


def table(rows: Sequence[Point]) -> str:
    """A markdown table of points; without the column on validations where there was none."""
    head = [
        "concepts", "method", "settings", "patched", "prompts", "still detected", "rest of its own prompts",
        *ATTRIBUTES, "worst of these", "target", "validated",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *map(_cells, rows)]
    shown = len(head) if any("preservation" in row for row in rows) else len(head) - 1
    return "\n".join("| " + " | ".join(line[:shown]) + " |" for line in lines)


def page(rows: Sequence[Point]) -> str:
    """The whole page, as markdown."""

    def part(name: str) -> str:
        return table([row for row in rows if row["part"] == name])

    return f"""# ActErase on `shapes`: all that was measured

Written by `python benchmarks/acterase_on_shapes.py`; what it shows is said in [acterase.md](acterase.md).
Each point is baked, exported and drawn through ONNX Runtime (what is not erased, by PyTorch) with seeds from 0 on,
{STEPS} steps, guidance {GUIDANCE:g}.

- *patched*: the share of what could be held at a constant; of another method, what it touches of what it could.
- *prompts*: so many that name the concept, of several concepts in equal shares, and so many that name none.
- *still detected*: of the prompts that name the concept; of several concepts the worst. *rest of its own prompts*: the
  worst of their other attributes, without what was erased too.
- *object* to *background*: how often prompts that do not name the concept are drawn as told.
- *target*: still detected in at most {DETECTED_AT_MOST:.0%}, the worst of these {KEPT_AT_LEAST:.0%} or more.
- *validated*: what the checks that look for a destroyed model say of {VALIDATED} prompts.

![the sweep](acterase-sweep.png)

## Nothing erased

{part("unedited")}

## The paper's reading: importances of the prompts without the concept must pass τ

{part("paper")}

## τ in both profiles: those of the prompts with it must, and all calls decide on the mask

{part("sweep")}

## The other settings, one at a time

{part("options")}

## Several concepts at once

{part("several")}

## Other methods, and a background

{part("methods")}
"""


def chart(rows: Sequence[Point], path: Path) -> None:
    """A line a profile: both rates against τ for each concept, and against the number of concepts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(len(PROFILES), len(SWEPT) + 1, sharey=True, squeeze=False)
    for line, profile in zip(panels, PROFILES, strict=True):
        own = [row for row in rows if row["edits"] and row["edits"][0].get("profile") == profile]
        for axes, concept in zip(line, SWEPT, strict=False):
            axes.set_title(f"{concept}, profile {profile}")
            for colour, part, words in (("C0", "sweep", "with the concept"), ("C1", "paper", "without (the paper)")):
                _curves(
                    axes, [row for row in own if row["part"] == part and row["concepts"] == [concept]],
                    lambda row: row["edits"][0]["settings"]["tau"], colour, f"τ of the prompts {words}",
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xlim(0.008, 1.25)
            axes.set_xticks([0.01, 0.1, 1], ["1", "10", "100"])
        known = KNOWN["acterase"]["tau"]
        together = [
            row for row in own
            if row["part"] == "several"
            or (row["part"] == "sweep" and row["concepts"] == ["star"] and row["edits"][0]["settings"]["tau"] == known)
        ]  # fmt: skip
        axes = line[-1]
        axes.set_title(f"several concepts, profile {profile}")
        _curves(axes, together, lambda row: len(row["concepts"]), "C0", "")
        axes.set_xticks([1, *TOGETHER])
    for axes in panels[-1]:
        axes.set_xlabel("τ, %" if axes is not panels[-1, -1] else "concepts")
    for axes in panels[:, 0]:
        axes.set_ylabel("% of pictures")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _curves(axes: Any, rows: Sequence[Point], place: Any, colour: str, words: str) -> None:
    """Both rates of points, against their place."""
    for limit in (DETECTED_AT_MOST, KEPT_AT_LEAST):
        axes.axhline(100 * limit, color="0.8", lw=1)
    for rate, style, said in ((others_kept, "o--", "others kept"), (detected, "o-", "still detected")):
        ordered = sorted(rows, key=place)
        axes.plot(
            [place(row) for row in ordered], [100 * rate(row) for row in ordered], style, color=colour,
            label=f"{said}, {words}",
        )  # fmt: skip


def main() -> None:
    """Measure, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--part", nargs="+", help="of the page, to measure again; the other parts stay")
    parser.add_argument("--again", action="store_true", help="draw the page from the numbers of the last run")
    given = parser.parse_args()
    numbers = given.output / "acterase-sweep.json"
    if not given.again:
        wanted, others = points(), []
        if given.part is not None:
            others = [row for row in json.loads(numbers.read_text(encoding="utf-8")) if row["part"] not in given.part]
            wanted = [point for point in wanted if point["part"] in given.part]
        rows = [*others, *_measured(wanted, given.workers)]
        numbers.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    (given.output / "acterase-sweep.md").write_text(page(rows), encoding="utf-8")
    chart(rows, given.output / "acterase-sweep.png")


def _measured(wanted: list[Point], workers: int) -> list[Point]:
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(measure, point, Path(work)): place for place, point in enumerate(wanted)}
        for done in as_completed(running):
            wanted[running[done]] = done.result()
            print(*_cells(done.result()), file=sys.stderr, flush=True)
    return wanted


if __name__ == "__main__":
    main()
