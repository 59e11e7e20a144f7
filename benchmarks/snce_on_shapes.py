"""What SNCE erases from `shapes`, and what it leaves: neurons, strength, rows, one vector; 60 + 60 prompts a point.

    python benchmarks/snce_on_shapes.py --workers 3

Each point is baked from a recipe and drawn through ONNX Runtime, but for `untouched`, which no artifact may hold and
the reference hooks draw. The detector of `shapes` says what is in the pictures of 60 prompts that name the concept and
of 60 that do not. The i-th prompt of each sixty is drawn from seed i, with the steps and the guidance of the model
card. Writes `docs/snce-sweep.md`, `.json` and `.png`.
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

from bakeout import Recipe
from bakeout.builtin.shapes.detector import load_detector
from bakeout.builtin.shapes.evaluation import GUIDANCE, STEPS, accuracy, generate, scenes_with, scenes_without
from bakeout.builtin.shapes.scenes import ATTRIBUTES, briefly
from bakeout.editor.methods import snce
from bakeout.editor.model import open_model
from bakeout.editor.prompts import pairs_from_pack
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.validate.reference import applied

CONCEPTS = {"star": "object", "yellow": "colour", "striped": "style"}
NEURONS = (1, 10, 20)
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
# No negative prompt, one of words that `shapes` never saw, and the concept.
NEGATIVES = ("", "blurry, low quality", "star")
POLICIES = ("empty", "same", "untouched")
PROMPTS = 60
DETECTED_AT_MOST, KEPT_AT_LEAST = 0.10, 0.90
# What is measured: part of the page, concept, settings of SNCE (None: nothing is erased), negative prompt.
Point = Mapping[str, Any]


def points() -> list[Point]:
    """Everything that is measured, without results."""

    def point(part: str, concept: str, negative_prompt: str = "", **settings: Any) -> Point:
        return {
            "part": part, "concept": concept, "negative_prompt": negative_prompt, "settings": settings or None
        }  # fmt: skip

    return [
        *(point("unedited", concept) for concept in CONCEPTS),
        *(point("unnamed", concept) for concept in CONCEPTS),
        *(point("rows", "star", negative) for negative in NEGATIVES),
        *(
            point("rows", "star", negative, activations=activations, strength=1.0, negative=policy)
            for activations in ("prompt", "concept")
            for policy in POLICIES
            for negative in NEGATIVES
        ),
        *(
            point("vector", concept, strength=strength, mentions="mean", negative="same")
            for concept in CONCEPTS
            for strength in STRENGTHS[1::2]
        ),
        *(
            point("sweep", concept, activations="prompt", neurons=neurons, strength=strength)
            for concept in CONCEPTS
            for neurons in NEURONS
            for strength in STRENGTHS
        ),
        *(
            point("sweep", concept, activations="concept", neurons=1, strength=strength)
            for concept in CONCEPTS
            for strength in STRENGTHS
        ),
    ]


def measure(point: Point) -> Point:
    """`point` with what was seen: of each attribute the share drawn as told, `with` the concept and `without`.

    The part `unnamed` draws the prompts with the concept alone, its word left out.
    """
    torch.set_num_threads(1)
    concept, unnamed = point["concept"], point["part"] == "unnamed"
    attribute = CONCEPTS[concept]
    scenes = {"with": scenes_with(attribute, concept, PROMPTS)}
    if not unnamed:
        scenes["without"] = scenes_without([concept], PROMPTS)
    named = [name for name in ATTRIBUTES if not (unnamed and name == attribute)]
    detector, seen = load_detector(), {}
    with _pipeline(point) as pipeline:
        drawing = _WithNegative(pipeline, point["negative_prompt"])
        for kind, some in scenes.items():
            seen[kind] = accuracy(detector, generate(drawing, [briefly(scene, named) for scene in some]), some)
    return {**point, **seen}


class _WithNegative:
    """A pipeline that is given the same negative prompt for every prompt."""

    def __init__(self, pipeline: Any, negative: str) -> None:
        self.pipeline, self.negative = pipeline, negative

    def __call__(self, prompts: Sequence[str], **settings: Any) -> Any:
        return self.pipeline(prompts, negative_prompt=[self.negative] * len(prompts), **settings)

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)


@contextmanager
def _pipeline(point: Point) -> Iterator[Any]:
    concept, given = point["concept"], point["settings"]
    pack = f"shapes-{CONCEPTS[concept]}"
    if given is not None and given.get("negative") != "untouched":
        edit = {"method": "snce", "concept": concept, "prompts": {"pack": pack}, "settings": given}
        recipe = Recipe.model_validate({"version": 1, "model": "shapes", "targets": ["onnx"], "edits": [edit]})
        with tempfile.TemporaryDirectory() as folder:
            artifact = recipe.bake(Path(folder) / "artifact")
            yield artifact.load(runtime="onnxruntime", sessions=SessionSettings(threads=1))
        return
    model = open_model("shapes")
    pipeline = model.pipeline(dtype=torch.float32)
    if given is None:
        yield pipeline
        return
    found = snce.calibrate(model, pipeline, concept, pairs_from_pack(pack, concept), snce.Settings(**given))
    with applied(found, model, pipeline):
        yield pipeline


def detected(row: Point) -> float:
    """The share of prompts with the concept in whose pictures it is seen."""
    share: float = row["with"][CONCEPTS[row["concept"]]]["share"]
    return share


def own_kept(row: Point) -> float:
    """The other attributes of those prompts: the share drawn as told of the worst."""
    share: float = min(row["with"][name]["share"] for name in ATTRIBUTES if name != CONCEPTS[row["concept"]])
    return share


def others_kept(row: Point) -> float:
    """Of prompts without the concept, the share drawn as told of the worst attribute."""
    share: float = min(row["without"][name]["share"] for name in ATTRIBUTES)
    return share


def reaches_the_target(row: Point) -> bool:
    """Still detected in at most 10 % of its prompts, every attribute of other prompts as told in 90 % or more."""
    return detected(row) <= DETECTED_AT_MOST and others_kept(row) >= KEPT_AT_LEAST


def _cells(row: Point) -> list[str]:
    given = {"activations": "concept", "neurons": 1, "negative": "empty", "mentions": "joined"} | (
        row["settings"] or {}
    )
    erased = row["settings"] is not None
    settings = [
        given["activations"], given["mentions"] if given["activations"] == "concept" else "", given["negative"],
        str(given["neurons"]), f"{given['strength']:g}",
    ] if erased else ["nothing erased" if row["part"] != "unnamed" else "word left out", "", "", "", ""]  # fmt: skip
    others = [""] * (len(ATTRIBUTES) + 1)
    if "without" in row:
        others = [*(f"{row['without'][name]['share']:.0%}" for name in ATTRIBUTES), f"{others_kept(row):.0%}"]
    return [
        row["concept"], *settings, row["negative_prompt"] or "none", f"{detected(row):.0%}", f"{own_kept(row):.0%}",
        *others, "yes" if erased and reaches_the_target(row) else "",
    ]  # fmt: skip


def table(rows: Sequence[Point]) -> str:
    """A markdown table of points."""
    head = [
        "concept", "activations", "mentions", "negative", "neurons", "λ", "negative prompt", "still detected",
        "rest of its own prompts", *ATTRIBUTES, "worst of these", "target",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(rows: Sequence[Point]) -> str:
    """The whole page, as markdown."""

    def part(*names: str) -> str:
        return table([row for row in rows if row["part"] in names])

    return f"""# SNCE on `shapes`: all that was measured

Written by `python benchmarks/snce_on_shapes.py`; what it shows is said in [snce.md](snce.md).
{PROMPTS} prompts that name the concept and {PROMPTS} that do not, seeds 0 to {PROMPTS - 1}, {STEPS} steps,
guidance {GUIDANCE:g}; baked, exported and drawn through ONNX Runtime, but for *untouched* and for what is not erased,
which PyTorch drew.

- *still detected*: of the prompts that name the concept. *rest of its own prompts*: the worst of their other
  attributes.
- *object* to *background*: how often prompts that do not name the concept are drawn as told.
- *target*: still detected in at most {DETECTED_AT_MOST:.0%}, the worst of these {KEPT_AT_LEAST:.0%} or more.
- *word left out*: the prompts of the concept without its word. No erasure can be expected to leave less.

## Neurons and strength

![the sweep](snce-sweep.png)

{part("unedited", "unnamed", "sweep")}

## Rows and negative prompts

{part("rows")}

## One vector for all prompts and positions

{part("vector")}
"""


def chart(rows: Sequence[Point], path: Path) -> None:
    """One panel a concept and kind of activations: both rates against λ, a colour for each number of neurons."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    curves = {"prompt": ("the prompt's activations", NEURONS), "concept": ("the concept's activations", (1,))}
    panels = figure.subplots(len(curves), len(CONCEPTS), sharex=True, sharey=True, squeeze=False)
    for line, (activations, (words, counts)) in zip(panels, curves.items(), strict=True):
        for axes, concept in zip(line, CONCEPTS, strict=True):
            axes.set_title(f"{concept}, {words}")
            axes.axhline(100 * DETECTED_AT_MOST, color="0.8", lw=1)
            axes.axhline(100 * KEPT_AT_LEAST, color="0.8", lw=1)
            for number, neurons in enumerate(counts):
                own = [
                    row for row in rows
                    if row["part"] == "sweep" and row["concept"] == concept
                    and (row["settings"]["activations"], row["settings"]["neurons"]) == (activations, neurons)
                ]  # fmt: skip
                strengths = [row["settings"]["strength"] for row in own]
                name = f"{neurons} neuron{'s' * (neurons > 1)}"
                for rate, style, said in ((others_kept, "o--", "others kept"), (detected, "o-", "still detected")):
                    axes.plot(
                        strengths, [100 * rate(row) for row in own], style, color=f"C{number}", label=f"{said}, {name}"
                    )
            axes.set_xticks(STRENGTHS)
    for axes in panels[-1]:
        axes.set_xlabel("λ")
    for axes in panels[:, 0]:
        axes.set_ylabel("% of pictures")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--again", action="store_true", help="draw the page from the numbers of the last run")
    given = parser.parse_args()
    numbers = given.output / "snce-sweep.json"
    if not given.again:
        wanted = points()
        with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
            running = {pool.submit(measure, point): place for place, point in enumerate(wanted)}
            for done in as_completed(running):
                wanted[running[done]] = done.result()
                print(*_cells(done.result()), file=sys.stderr, flush=True)
        numbers.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    (given.output / "snce-sweep.md").write_text(page(rows), encoding="utf-8")
    chart(rows, given.output / "snce-sweep.png")


if __name__ == "__main__":
    main()
