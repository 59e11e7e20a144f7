"""What ConceptPrune erases from `shapes`, and what it leaves: k, t̂ and both profiles, 100 + 100 prompts a point.

    python benchmarks/conceptprune_on_shapes.py

Erases an object and a style, each from 100 prompts that name it, and draws 100 prompts that do not; the detector of
`shapes` says what is in the pictures. The i-th prompt of each hundred is drawn from seed i, edited and unedited, with
the steps and the guidance of the model card. Pictures are drawn through the reference hooks. Writes
`docs/conceptprune-sweep.md`, `.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bakeout.builtin.shapes.detector import Detector, load_detector
from bakeout.builtin.shapes.evaluation import (
    GUIDANCE,
    STEPS,
    Share,
    accuracy,
    generate,
    scenes_with,
    scenes_without,
)
from bakeout.builtin.shapes.scenes import ATTRIBUTES, Scene, prompt
from bakeout.editor.edit import Edit
from bakeout.editor.methods import conceptprune
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import pairs_from_pack
from bakeout.validate.reference import applied

CONCEPTS = {"star": ("object", "shapes-object"), "striped": ("style", "shapes-style")}
SPARSITIES = (0.01, 0.02, 0.03, 0.05, 0.1)
FIRST_CALLS = (5, 10, 20)
PROMPTS = 100
DETECTED_AT_MOST, KEPT_AT_LEAST = 0.10, 0.90

Found = Mapping[str, Share]


def point(
    model: Model, pipeline: Any, detector: Detector, edit: Edit | None, scenes: Sequence[Sequence[Scene]]
) -> list[Found]:
    """For each list of scenes, how often the detector sees each attribute as its scenes have it."""
    with nullcontext() if edit is None else applied(edit, model, pipeline):
        pictures = [generate(pipeline, [prompt(scene) for scene in some]) for some in scenes]
    return [accuracy(detector, drawn, some) for drawn, some in zip(pictures, scenes, strict=True)]


def kept(edited: Found, unedited: Found, but: str | None = None) -> float:
    """The worst attribute's rate of being drawn as told, as a part of its unedited rate."""
    return min(edited[name]["share"] / unedited[name]["share"] for name in ATTRIBUTES if name != but)


def measure(
    sparsities: Sequence[float], first_calls: Sequence[int], votes: Sequence[float], work: Path
) -> list[dict[str, Any]]:
    """A row a point. The sums of squares are kept in `work`: they serve every k."""
    model, detector = open_model("shapes"), load_detector()
    pipeline = model.pipeline(dtype=torch.float32)
    rows: list[dict[str, Any]] = []
    for concept, (attribute, pack) in CONCEPTS.items():
        scenes = (scenes_with(attribute, concept, PROMPTS), scenes_without([concept], PROMPTS))
        unedited = point(model, pipeline, detector, None, scenes)
        for profile in conceptprune.PROFILES:
            pairs = pairs_from_pack(pack, concept, profile)
            grid = [(k, calls, vote) for vote in votes for calls in first_calls for k in sparsities]
            for k, calls, vote in grid:
                settings = conceptprune.Settings(
                    profile=profile,  # type: ignore[arg-type]
                    sparsity=k, first_calls=calls, vote=vote,
                )  # fmt: skip
                edit = conceptprune.calibrate(model, pipeline, concept, pairs, settings, work=work)
                drawn = point(model, pipeline, detector, edit, scenes)
                touched = [operation.touched for operation in edit.operations]
                weights = sum(site.d_in * site.d_out for site in model.sites_of("ffn2"))
                rows.append(
                    {
                        "concept": concept,
                        "profile": profile,
                        "sparsity": k,
                        "first_calls": calls,
                        "vote": vote,
                        "pruned": sum(count for count, _, _ in touched) / weights,
                        "detected": drawn[0][attribute],
                        "kept": kept(drawn[1], unedited[1]),
                        "kept_on_its_prompts": kept(drawn[0], unedited[0], attribute),
                        "with": drawn[0],
                        "without": drawn[1],
                        "unedited": unedited,
                    }
                )
                print(*_cells(rows[-1]), file=sys.stderr, flush=True)
    return rows


def reaches_the_target(row: Mapping[str, Any]) -> bool:
    """Still detected in at most 10 % of its prompts, every attribute of other prompts at 90 % of its rate or more."""
    return bool(row["detected"]["share"] <= DETECTED_AT_MOST and row["kept"] >= KEPT_AT_LEAST)


def _cells(row: Mapping[str, Any]) -> list[str]:
    others = [row["without"][name]["share"] for name in ATTRIBUTES]
    return [
        row["concept"], row["profile"], f"{row['sparsity']:.1%}", str(row["first_calls"]), f"{row['vote']:g}",
        f"{row['pruned']:.2%}", f"{row['detected']['share']:.0%}",
        *(f"{share:.0%}" for share in others), f"{row['kept']:.0%}", f"{row['kept_on_its_prompts']:.0%}",
        "yes" if reaches_the_target(row) else "",
    ]  # fmt: skip


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, as markdown."""
    head = [
        "concept", "profile", "k", "t̂", "vote", "pruned", "still detected",
        *ATTRIBUTES, "others kept", "rest of its own prompts kept", "target",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *map(_cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# ConceptPrune on `shapes`: the whole sweep

Written by `python benchmarks/conceptprune_on_shapes.py`; what it shows is said in [conceptprune.md](conceptprune.md).
{PROMPTS} prompts that name the concept and {PROMPTS} that do not, seeds 0 to {PROMPTS - 1}, {STEPS} steps, guidance
{GUIDANCE:g}; calibrated with the settings' defaults (50 steps, guidance 7.5, seed 0).

- *pruned*: the share of all FFN-2 weights. *still detected*: of the prompts that name the concept.
- *object* to *background*: how often prompts that do not name the concept are drawn as told.
- *others kept*: the worst of these four, as a part of the unedited rate. *rest of its own prompts kept*: the same for
  the other three attributes of the prompts that name the concept.
- *target*: still detected in at most {DETECTED_AT_MOST:.0%}, others kept at {KEPT_AT_LEAST:.0%} or more.

![the sweep](conceptprune-sweep.png)

{table}
"""


def chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a concept and profile: both rates against k, a colour for each t̂; without votes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(len(CONCEPTS), len(conceptprune.PROFILES), sharex=True, sharey=True, squeeze=False)
    for line, concept in zip(panels, CONCEPTS, strict=True):
        for axes, profile in zip(line, conceptprune.PROFILES, strict=True):
            axes.set_title(f"{concept}, profile {profile}")
            axes.axhline(100 * DETECTED_AT_MOST, color="0.8", lw=1)
            axes.axhline(100 * KEPT_AT_LEAST, color="0.8", lw=1)
            for number, calls in enumerate(sorted({row["first_calls"] for row in rows})):
                own = [
                    row for row in rows
                    if (row["concept"], row["profile"], row["first_calls"], row["vote"]) == (concept, profile, calls, 0)
                ]  # fmt: skip
                k = [100 * row["sparsity"] for row in own]
                colour = f"C{number}"
                axes.plot(k, [100 * row["kept"] for row in own], "o--", color=colour, label=f"others kept, t̂ = {calls}")
                axes.plot(
                    k, [100 * row["detected"]["share"] for row in own], "o-", color=colour,
                    label=f"still detected, t̂ = {calls}",
                )  # fmt: skip
            axes.set_xscale("log")
            ticks = sorted({100 * row["sparsity"] for row in rows})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("k, % of a row of FFN-2")
    for axes in panels[:, 0]:
        axes.set_ylabel("% of pictures")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--first-calls", type=int, nargs="+", default=FIRST_CALLS)
    parser.add_argument("--vote", type=float, nargs="+", default=[0.0])
    parser.add_argument("--again", action="store_true", help="draw the page from the numbers of the last run")
    given = parser.parse_args()
    numbers = given.output / "conceptprune-sweep.json"
    if not given.again:
        with tempfile.TemporaryDirectory() as work:
            rows = measure(given.sparsity, given.first_calls, given.vote, Path(work))
        numbers.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    (given.output / "conceptprune-sweep.md").write_text(page(rows), encoding="utf-8")
    chart(rows, given.output / "conceptprune-sweep.png")


if __name__ == "__main__":
    main()
