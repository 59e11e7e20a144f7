"""What to draw: prompts with what was erased, and prompts without; and who says what a picture shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from pydantic import ValidationError

from bakeout.editor.errors import InputError
from bakeout.editor.prompts import Pair, pairs_from_file
from bakeout.editor.recipe import Recipe
from bakeout.export.manifest import Manifest
from bakeout.validate.metrics import Pixels
from bakeout.validate.report.schema import Detection
from bakeout.validate.runners import Trial
from bakeout.validate.stats import detection

# As many scenes as the largest profile draws of a kind.
_SCENES = 300


@dataclass(frozen=True)
class Prompts:
    """For one erased concept, prompts that have it and prompts that do not."""

    concept: str
    erased: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Detector:
    """Says what pictures show.

    Attributes:
        name: for the report.
        look: what each picture shows, in words.
        concepts: that it knows, in small letters.
        named: the words that a prompt asks for.
    """

    name: str
    look: Callable[[Sequence[Pixels]], list[str]]
    concepts: frozenset[str]
    named: Callable[[str], set[str]]

    def counts(self, trial: Trial, seen: str) -> bool:
        """Of a prompt with the erased concept: whether it is seen. Of another: whether all that it asks for is."""
        wanted = {trial.concept.strip().lower()} if trial.kind == "erased" else self.named(trial.prompt)
        return wanted <= set(seen.split())


def trials_of(manifest: Manifest, prompts: Path | None, count: int, seed: int) -> tuple[Trial, ...]:
    """`count` prompts with seeds from `seed` on: first half with what was erased, its concepts in turn, then without.

    Of `shapes` they are held-out scenes; of any other model those of the recipe in the manifest. Where there are fewer
    than asked for they come again, with other seeds.

    Args:
        manifest: of the artifact.
        prompts: a file of pairs, with the concept and without, to take instead.
        count: 2 or more.
        seed: of the first one.

    Raises:
        InputError: the artifact does not tell its prompts, or the file is no list of prompts.
    """
    sources = _from_file(manifest, prompts) if prompts is not None else _from_manifest(manifest)
    kept = list(dict.fromkeys(_interleaved([source.kept for source in sources])))
    erased_count = count - count // 2 if kept else count
    erased = [
        (source.erased[i // len(sources) % len(source.erased)], source.concept)
        for i in range(erased_count)
        for source in [sources[i % len(sources)]]
    ]
    return (
        *(Trial(prompt, seed + i, "erased", concept) for i, (prompt, concept) in enumerate(erased)),
        *(Trial(kept[i % len(kept)], seed + erased_count + i, "kept") for i in range(count - erased_count)),
    )


def detector_of(manifest: Manifest) -> Detector | None:
    """Who judges pictures of the artifact's model; nobody but for `shapes`, whose detector knows all that it draws."""
    if not _is_shapes(manifest):
        return None
    from bakeout.builtin.shapes import load_detector
    from bakeout.builtin.shapes.scenes import VALUES, mentioned

    network = load_detector()

    def look(pictures: Sequence[Pixels]) -> list[str]:
        from PIL import Image

        return [" ".join(seen.values()) for seen in network.classify([Image.fromarray(it) for it in pictures])]

    return Detector("the detector of shapes", look, frozenset(VALUES), mentioned)


def detections(
    detector: Detector, model: str, trials: Sequence[Trial], seen: Sequence[str]
) -> tuple[list[Detection], list[bool]]:
    """How often a model's pictures show each concept, and how often the others show what they should.

    Returns:
        The shares, of concepts that the detector knows, and its verdicts on the pictures that it can judge.
    """
    judged = [
        (trial, detector.counts(trial, said))
        for trial, said in zip(trials, seen, strict=True)
        if trial.kind == "kept" or trial.concept.strip().lower() in detector.concepts
    ]
    by_concept: dict[str, list[bool]] = {}
    kept: list[bool] = []
    for trial, verdict in judged:
        (kept if trial.kind == "kept" else by_concept.setdefault(trial.concept, [])).append(verdict)
    found = [detection(concept, "erased", model, verdicts) for concept, verdicts in by_concept.items()]
    if kept:
        concepts = dict.fromkeys(trial.concept for trial in trials if trial.kind == "erased")
        found.append(detection(", ".join(concepts), "kept", model, kept))
    return found, [verdict for _, verdict in judged]


def _is_shapes(manifest: Manifest) -> bool:
    return (manifest.base.format, manifest.base.name) == ("builtin", "shapes")


def _from_manifest(manifest: Manifest) -> list[Prompts]:
    sources = []
    if _is_shapes(manifest):
        sources = _from_shapes([edit.concept for edit in manifest.edits])
    return sources or _from_recipe(manifest)


def _from_shapes(concepts: Sequence[str]) -> list[Prompts]:
    """Held-out scenes; nothing where a concept is no attribute of a scene, as one in a user's own words."""
    from bakeout.builtin.shapes.evaluation import scenes_with, scenes_without
    from bakeout.builtin.shapes.scenes import ATTRIBUTES, prompt

    values = {concept: concept.strip().lower() for concept in concepts}
    of = {value: attribute for attribute, all_values in ATTRIBUTES.items() for value in all_values}
    if any(value not in of for value in values.values()):
        return []
    without = tuple(map(prompt, scenes_without(list(values.values()), _SCENES)))
    return [
        Prompts(concept, tuple(map(prompt, scenes_with(of[value], value, _SCENES))), without)
        for concept, value in values.items()
    ]


def _from_recipe(manifest: Manifest) -> list[Prompts]:
    cure = "give prompts with --prompts FILE, in two columns, with the concept and without"
    try:
        recipe = Recipe.model_validate(manifest.recipe)
        if any(edit.prompts.file is not None for edit in recipe.edits):
            raise InputError(f"the artifact was made with prompts from a file, which it does not hold; {cure}")
        found = [(edit.concept, edit.pairs(Path())) for edit in recipe.edits]
    except ValidationError:
        raise InputError(f"the artifact holds no recipe that tells its prompts; {cure}") from None
    return [Prompts(concept, *_columns(pairs)) for concept, pairs in found]


def _from_file(manifest: Manifest, path: Path) -> list[Prompts]:
    """The file's pairs; each goes with the first concept that it names, or with all of them where it names none."""
    concepts = [edit.concept for edit in manifest.edits]
    every = ", ".join(concepts)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs_from_file(path):
        named = [concept for concept in concepts if concept.lower() in pair.target.lower()]
        groups.setdefault((named or [every])[0], []).append(pair)
    return [Prompts(concept, *_columns(pairs)) for concept, pairs in groups.items()]


def _columns(pairs: Iterable[Pair]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    pairs = list(pairs)
    return tuple(dict.fromkeys(it.target for it in pairs)), tuple(dict.fromkeys(it.reference for it in pairs))


def _interleaved(lists: Sequence[Sequence[str]]) -> list[str]:
    return [it for it in chain.from_iterable(zip_longest(*lists)) if it is not None]
