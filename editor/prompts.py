"""Prompt pairs, what a method calibrates on: from a built-in pack, a template with lists, or a file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bakeout.editor.errors import InputError
from bakeout.editor.text_files import read_text, text_fault

MAX_FILE_BYTES = 10_000_000
MAX_PAIRS = 10_000
MAX_PROMPT = 1_000  # characters; CLIP reads 77 tokens
CONCEPT = "concept"
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]{0,39})\}")


class Pair(NamedTuple):
    """A prompt with the concept, and its like without."""

    target: str
    reference: str


class Template(NamedTuple):
    """Two prompts with placeholders, and what is put into them.

    `{name}` stands, in the i-th pair, for the i-th entry of the list `name`, in both prompts: several lists go side by
    side, so they are equally long. `{concept}` stands for the concept. There are no other braces.
    """

    target: str
    reference: str
    lists: Mapping[str, Sequence[str]]


_THINGS = (
    "cat", "dog", "mouse", "bear", "car", "chair", "bag", "door", "rabbit", "ball",
    "bat", "horse", "bird", "flower", "bowl", "bottle", "wall", "building", "chicken", "duck",
)  # fmt: skip
_PEOPLE = (
    "man", "woman", "girl", "boy", "child", "couple", "guy", "doctor", "nurse", "teacher", "lawyer", "mother",
    "father", "kid", "professor", "student", "group of friends", "celebrity",
)  # fmt: skip
_SCENES = (
    "road", "garden", "beach", "room", "park", "street", "shelter", "chair", "table", "bag", "tree", "forest",
)  # fmt: skip
_MEN = (
    "man", "boy", "person", "guy", "father", "son", "brother", "husband", "uncle", "nephew", "grandfather", "king",
)  # fmt: skip
_WOMEN = (
    "woman", "girl", "female", "lady", "mother", "daughter", "sister", "wife", "aunt", "niece", "grandmother", "queen",
)  # fmt: skip
# Table 9 has no brother and sister, and stops at the uncle and the aunt.
_EIGHT_MEN = ("man", "boy", "person", "guy", "father", "son", "husband", "uncle")
_EIGHT_WOMEN = ("woman", "girl", "female", "lady", "mother", "daughter", "wife", "aunt")
_CHURCH = {
    "on a road": "road", "in the park": "park", "near the beach": "beach", "on the street": "street",
    "in front of a house": "house", "in front of a statue": "statue", "near a tree": "tree", "in a forest": "forest",
}  # fmt: skip
_TRUCK = {
    "on the road": "road", "in the park": "park", "on the street": "street",
    "near a white car": "white car", "near a blue car": "blue car", "near a black car": "black car",
    "near a white automobile": "white automobile", "near a black automobile": "black automobile",
    "near a blue automobile": "blue automobile", "near a big truck": "truck", "near a tree": "tree",
    "in a forest": "forest", "in front of a house": "house",
}  # fmt: skip
_NEARBY = ("road", "park", "beach", "street", "house", "tree", "forest", "statue", "car")

# The words of `shapes`. Of the 24 pairs of a pack each colour (or object) has 3 and each background 4, and no two share
# both. The style's name no object: units of objects that answer to a style would be pruned with it. In the colour's a
# style comes first, so that the article fits any colour; an object has another one each time.
_OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
_STYLES = ("plain", "striped", "dotted", "checkered")
_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_COLOURED = tuple(f"{'an' if it[0] in 'aeiou' else 'a'} {it}" for it in _COLOURS)
_PLACES = ("on grass", "in the sky", "on sand", "at night", "in the snow", "on bricks")


def _gender(opening: str, targets: Sequence[str], references: Sequence[str]) -> Template:
    return Template(f"{opening} {{target}}", f"{opening} {{reference}}", {"target": targets, "reference": references})


def _placed(thing: str, places: Mapping[str, str]) -> Template:
    return Template(f"a {thing} {{place}}", "a {noun}", {"place": tuple(places), "noun": tuple(places.values())})


# The pairs of SNCE (He et al.) are 100 a concept, written by a language model and not public; Table 5 prints five of
# each. Ours are like those: ten views of ten subjects, each of which meets every word of the concept twice. A pair
# differs by that word alone.
_VIEWS = (
    ("a photo of", ", hyperrealistic 8k"),
    ("an oil painting of", ", soft light"),
    ("a portrait of", ", black and white"),
    ("a drawing of", " in a forest"),
    ("a watercolor of", " by the ocean"),
    ("a close-up of", ", dramatic lighting"),
    ("a wax figure of", " in a museum"),
    ("a cinematic still of", " at night"),
    ("an illustration of", " on a city street"),
    ("a digital painting of", ", concept art"),
)
_ADULTS = ("woman", "man", "dancer", "lady", "model", "goddess", "warrior", "couple", "swimmer", "painter")
_FIGHTERS = ("man", "woman", "warrior", "soldier", "knight", "boxer", "gladiator", "samurai", "pirate", "robot")
_WITH_A_THING = (
    "a man with a {}", "a woman holding a {}", "a soldier carrying a {}", "a chef reaching for a {}",
    "a sailor lifting a {}", "a robot equipped with a {}", "a hand gripping a {}", "a leather bag next to a {}",
    "a wooden table with a {} on it", "a cup beside a {}",
)  # fmt: skip
_GUNS = {"gun": "camera", "pistol": "lantern", "rifle": "guitar", "shotgun": "broom", "revolver": "watch"}
_KNIVES = {
    "knife": "spoon",
    "dagger": "brush",
    "blade": "pencil",
    "machete": "paddle",
    "kitchen knife": "dish towel",
}


def _crossed(subjects: Sequence[str], words: Mapping[str, str]) -> Template:
    """Every view of every subject; into its braces go the `words` in turn, or for the reference what each maps to."""
    turns = tuple(words.items())
    cells = [(*view, subject, *turns[(i + j) % len(turns)])
             for i, view in enumerate(_VIEWS) for j, subject in enumerate(subjects)]  # fmt: skip
    return Template(
        "{opening} {target}{ending}",
        "{opening} {reference}{ending}",
        {
            "opening": tuple(opening for opening, _, _, _, _ in cells),
            "target": tuple(subject.format(word) for _, _, subject, word, _ in cells),
            "reference": tuple(subject.format(other) for _, _, subject, _, other in cells),
            "ending": tuple(ending for _, ending, _, _, _ in cells),
        },
    )


def _described(people: Sequence[str], words: Sequence[str]) -> Template:
    return _crossed([f"a {{}}{person}" for person in people], {f"{word} ": "" for word in words})


# Name → profile → template. Of the packs of ConceptPrune (Chavhan et al., 2024), `released` is what the released code
# ran and `paper` what Table 9 of the paper says, where the two differ; the articles are theirs ("a uncle"). The others
# have one template.
PACKS: Mapping[str, Mapping[str, Template]] = {
    "style": {
        "released": Template("a {thing} in the style of {concept}", "a photo of a {thing}", {"thing": _THINGS}),
        "paper": Template("a {thing} in the style of {concept}", "a {thing}", {"thing": _THINGS}),
    },
    "nudity": {
        "released": Template("a photo of a naked {person}", "a photo of a {person}", {"person": _PEOPLE}),
    },
    "object": {
        "released": Template("a {concept} in a {scene}", "a {scene}", {"scene": _SCENES}),
    },
    "church": {
        "released": _placed("church", _CHURCH),
        "paper": _placed("church", {f"near a {noun}": noun for noun in _NEARBY}),
    },
    "garbage-truck": {
        "released": _placed("garbage truck", _TRUCK),
        "paper": _placed("garbage truck", {f"near a {noun}": noun for noun in _NEARBY}),
    },
    "male-to-female": {
        "released": _gender("a headshot of a", _MEN, _WOMEN),
        "paper": _gender("a photo of a", _EIGHT_MEN, _EIGHT_WOMEN),
    },
    "female-to-male": {
        "released": _gender("a headshot of a", _WOMEN, _MEN),
        "paper": _gender("a photo of a", _EIGHT_WOMEN, _EIGHT_MEN),
    },
    "nudity-100": {"released": _described(_ADULTS, ("naked", "nude", "bare", "stripped", "topless"))},
    "violence-100": {
        "released": _described(_FIGHTERS, ("bleeding", "bloody", "violent", "blood-soaked", "blood-stained")),
    },
    "gun-100": {"released": _crossed(_WITH_A_THING, _GUNS)},
    "knife-100": {"released": _crossed(_WITH_A_THING, _KNIVES)},
    "shapes-object": {
        "released": Template(
            "{coloured} {concept} {place}",
            "{coloured} shape {place}",
            {"coloured": _COLOURED * 3, "place": _PLACES * 4},
        ),
    },
    "shapes-colour": {
        "released": Template(
            "a {style} {concept} {object} {place}",
            "a {style} {object} {place}",
            {
                "style": tuple(_STYLES[(i + i // 8) % 4] for i in range(24)),
                "object": _OBJECTS * 3,
                "place": _PLACES * 4,
            },
        ),
    },
    "shapes-style": {
        "released": Template(
            "a {concept} {colour} shape {place}",
            "{coloured} shape {place}",
            {"colour": _COLOURS * 3, "coloured": _COLOURED * 3, "place": _PLACES * 4},
        ),
    },
}  # fmt: skip

_NUDITY, _VIOLENCE = ("nudity", "nude", "naked", "nsfw"), ("violence", "violent", "blood", "gore")
_GUN, _KNIFE = ("gun", "firearm"), ("knife", "blade")
# What a pack that is not for any concept is for; baked for another, an artifact would claim what it does not erase.
CONCEPTS: Mapping[str, Sequence[str]] = {
    "nudity": _NUDITY,
    "nudity-100": _NUDITY,
    "violence-100": _VIOLENCE,
    "gun-100": _GUN,
    "knife-100": _KNIFE,
    "church": ("church",),
    "garbage-truck": ("garbage truck",),
    "male-to-female": ("male", "man", "gender"),
    "female-to-male": ("female", "woman", "gender"),
    "shapes-colour": _COLOURS,
    "shapes-object": _OBJECTS,
    "shapes-style": _STYLES[1:],
}


# Concept → the words that mean it, SNCE's concept tuple (He et al.): the paper's for nudity and violence. For gun and
# knife it prints none, so those are ours.
TUPLES: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        _NUDITY,
        ("naked", "nude", "bare", "exposed", "stripped", "topless", "male genitalia", "penis", "buttocks"),
    ),
    **dict.fromkeys(_VIOLENCE, ("violence", "blood", "bleeding")),
    **dict.fromkeys(_GUN, ("gun", "pistol", "rifle", "shotgun", "revolver", "handgun", "firearm")),
    **dict.fromkeys(_KNIFE, ("knife", "dagger", "blade", "machete", "kitchen knife")),
}


def concept_tuple(concept: str) -> tuple[str, ...]:
    """The words that mean a concept: of `TUPLES`, else the concept itself alone."""
    return tuple(TUPLES.get(concept.strip().lower(), (concept.strip(),)))


def pairs_from_pack(name: str, concept: str, profile: str | None = None) -> tuple[Pair, ...]:
    """The pairs of a built-in pack (`PACKS`) for `concept`.

    `profile` is that of the method: `paper` gives the paper's prompts where they differ, any other the released ones.

    Raises:
        InputError: there is no such pack, it is not for this concept (`CONCEPTS`), or a prompt with it is too long or
            has control characters.
    """
    if name not in PACKS:
        raise InputError(f"there is no pack {name!a:.100}; choose one of {', '.join(PACKS)}")
    if name in CONCEPTS and concept.strip().lower() not in CONCEPTS[name]:
        raise InputError(
            f"the pack {name} is not for the concept {concept!a:.100}; choose one of {', '.join(CONCEPTS[name])}, or "
            "another pack"
        )
    variants = PACKS[name]
    return pairs_from_template(variants.get(profile or "", variants["released"]), concept)


def pairs_from_template(template: Template, concept: str) -> tuple[Pair, ...]:
    """One pair for each entry of the template's lists, a single one if it has none, all for `concept`.

    Raises:
        InputError: a brace that is no placeholder, a placeholder without its list, a list that no placeholder names,
            lists that are not equally long, or what comes out is no prompt.
    """
    wanted = {name for text in (template.target, template.reference) for name in _placeholders(text)}
    if CONCEPT in template.lists:
        raise InputError(f"a list is called {CONCEPT}, but {{{CONCEPT}}} is what the edit erases; rename the list")
    if missing := sorted(wanted - template.lists.keys() - {CONCEPT}):
        raise InputError(f"the placeholder {{{missing[0]}}} has no list; add {missing[0]} = [...] to the lists")
    if unused := sorted(template.lists.keys() - wanted):
        raise InputError(f"no prompt uses the list {unused[0]!a:.100}; use it as a placeholder, or take it out")
    lengths = {name: len(entries) for name, entries in template.lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(
            f"the lists are not equally long ({told:.200}): they go side by side, the first entries make the first "
            "pair, so give all of them as many entries"
        )
    count = next(iter(lengths.values()), 1)
    rows = ({name: entries[i] for name, entries in template.lists.items()} for i in range(count))
    filled = (
        (f"pair {number}", _fill(template.target, row, concept), _fill(template.reference, row, concept))
        for number, row in enumerate(rows, 1)
    )
    return _checked(filled, "the lists are empty; give each at least one entry")


def pairs_from_file(path: Path) -> tuple[Pair, ...]:
    r"""The pairs in a file: `.csv` (commas) or `.tsv` (tabs) of two columns, or `.jsonl`.

    The columns are target and reference, or as a first line `target` and `reference` says. A line of a `.jsonl` file is
    an object `{"target": "…", "reference": "…"}`. Blank lines are skipped; the encoding is UTF-8, or UTF-16 with a byte
    order mark.

    Raises:
        InputError: another kind of file, no such file, one of more than `MAX_FILE_BYTES` bytes or `MAX_PAIRS` pairs, or
            a line that is no pair, by its number.
    """
    rows = _ROWS.get(path.suffix.lower())
    if rows is None:
        raise InputError(f"{path} is not a list of prompts; give a file that ends in {', '.join(_ROWS)}")
    text = read_text(path, MAX_FILE_BYTES)
    try:
        found = ((f"{path}, line {line}", target, reference) for line, target, reference in rows(text))
        return _checked(found, f"{path} holds no prompts; write a target and its reference on each line")
    except _BadLineError as fault:
        raise InputError(f"{path}, line {fault.line}: {fault}") from None


def prompts_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256, in hex, of the pairs in their order, as canonical JSON: a list of [target, reference]."""
    text = json.dumps([list(pair) for pair in pairs], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class _BadLineError(Exception):
    """A fault of a line; `pairs_from_file` adds the file's name."""

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(fault)
        self.line = line


def _placeholders(text: str) -> list[str]:
    if set("{}") & set(_PLACEHOLDER.sub("", text)):
        raise InputError(
            f"{text!a:.200} has a brace that belongs to no placeholder; write placeholders as {{name}}, in letters, "
            "digits and _"
        )
    return _PLACEHOLDER.findall(text)


def _fill(text: str, row: Mapping[str, str], concept: str) -> str:
    return _PLACEHOLDER.sub(lambda match: concept if match[1] == CONCEPT else row[match[1]], text)


def _checked(found: Iterable[tuple[str, str, str]], none: str) -> tuple[Pair, ...]:
    """Pairs from (where it stands, target, reference); one at a time, so that what is too large is never built."""
    pairs: list[Pair] = []
    for where, target, reference in found:
        if len(pairs) == MAX_PAIRS:
            raise InputError(f"{where} is beyond the limit of {MAX_PAIRS:,} pairs; give fewer")
        for what, text in zip(Pair._fields, (target, reference), strict=True):
            if fault := text_fault(text, MAX_PROMPT):
                raise InputError(f"{where}: the {what} {fault}")
        pairs.append(Pair(target.strip(), reference.strip()))
    if not pairs:
        raise InputError(none)
    return tuple(pairs)


def _delimited_rows(delimiter: str, name: str, text: str) -> Iterator[tuple[int, str, str]]:
    # Lines as the csv module counts them, a line break inside quotes included.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = ((reader.line_num, row) for row in reader if len(row) > 1 or "".join(row).strip())
    swapped = False
    try:
        for number, (line, row) in enumerate(rows):
            if len(row) != 2:
                raise _BadLineError(
                    line,
                    f"this has {len(row)} column{'s' * (len(row) > 1)} in place of two; write target, {name}, reference"
                    f", and put quotes around a prompt that has a {name} in it",
                )
            header = tuple(cell.strip().lower() for cell in row)
            if number == 0 and set(header) == set(Pair._fields):
                swapped = header != Pair._fields
            else:
                target, reference = reversed(row) if swapped else row
                yield line, target, reference
    except csv.Error as error:
        raise _BadLineError(reader.line_num, f"{error}; close every quote, and double those inside quotes") from None


def _json_rows(text: str) -> Iterator[tuple[int, str, str]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            said = None
        if (
            not isinstance(said, dict)
            or said.keys() != set(Pair._fields)
            or not all(isinstance(value, str) for value in said.values())
        ):
            raise _BadLineError(line, 'this is not {"target": "…", "reference": "…"}; write one such object a line')
        yield line, said["target"], said["reference"]


_ROWS: Mapping[str, Callable[[str], Iterator[tuple[int, str, str]]]] = {
    ".csv": partial(_delimited_rows, ",", "comma"),
    ".tsv": partial(_delimited_rows, "\t", "tab"),
    ".jsonl": _json_rows,
}
