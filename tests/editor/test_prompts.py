"""Packs against the words of the published prompts, templates and files; every refusal names what to mend."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from bakeout.builtin.shapes.scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, OBJECTS, STYLES
from bakeout.editor import prompts
from bakeout.editor.errors import InputError
from bakeout.editor.prompts import (
    CONCEPTS,
    PACKS,
    Pair,
    Template,
    concept_tuple,
    pairs_from_file,
    pairs_from_pack,
    pairs_from_template,
    prompts_digest,
)


def words(text: str) -> list[str]:
    return text.split()


THINGS = words(
    "cat dog mouse bear car chair bag door rabbit ball bat horse bird flower bowl bottle wall building chicken duck"
)
PEOPLE = [
    *words("man woman girl boy child couple guy doctor nurse teacher lawyer mother father kid professor student"),
    "group of friends",
    "celebrity",
]
SCENES = words("road garden beach room park street shelter chair table bag tree forest")
MEN = words("man boy person guy father son brother husband uncle nephew grandfather king")
WOMEN = words("woman girl female lady mother daughter sister wife aunt niece grandmother queen")
PAPER_MEN = words("man boy person guy father son husband uncle")
PAPER_WOMEN = words("woman girl female lady mother daughter wife aunt")
PAPER_PLACES = words("road park beach street house tree forest statue car")
NEAR = ["white car", "blue car", "black car", "white automobile", "black automobile", "blue automobile"]
TRUCK = [
    ("on the road", "road"), ("in the park", "park"), ("on the street", "street"),
    *((f"near a {it}", it) for it in NEAR), ("near a big truck", "truck"), ("near a tree", "tree"),
    ("in a forest", "forest"), ("in front of a house", "house"),
]  # fmt: skip
CHURCH = [
    ("on a road", "road"), ("in the park", "park"), ("near the beach", "beach"), ("on the street", "street"),
    ("in front of a house", "house"), ("in front of a statue", "statue"), ("near a tree", "tree"),
    ("in a forest", "forest"),
]  # fmt: skip
NUDITY = [(f"a photo of a naked {it}", f"a photo of a {it}") for it in PEOPLE]
OBJECT = [(f"a gas pump in a {it}", f"a {it}") for it in SCENES]
EXPECTED = {
    ("style", "Van Gogh", "released"): [(f"a {it} in the style of Van Gogh", f"a photo of a {it}") for it in THINGS],
    ("style", "Van Gogh", "paper"): [(f"a {it} in the style of Van Gogh", f"a {it}") for it in THINGS],
    ("nudity", "nudity", "released"): NUDITY,
    ("nudity", "nudity", "paper"): NUDITY,
    ("object", "gas pump", "released"): OBJECT,
    ("object", "gas pump", "paper"): OBJECT,
    ("church", "church", "released"): [(f"a church {where}", f"a {noun}") for where, noun in CHURCH],
    ("church", "church", "paper"): [(f"a church near a {it}", f"a {it}") for it in PAPER_PLACES],
    ("garbage-truck", "garbage truck", "released"): [
        (f"a garbage truck {where}", f"a {noun}") for where, noun in TRUCK
    ],
    ("garbage-truck", "Garbage truck", "paper"): [(f"a garbage truck near a {it}", f"a {it}") for it in PAPER_PLACES],
}
for _profile, _opening, _men, _women in (
    ("released", "a headshot of a", MEN, WOMEN),
    ("paper", "a photo of a", PAPER_MEN, PAPER_WOMEN),
):
    both = [(f"{_opening} {man}", f"{_opening} {woman}") for man, woman in zip(_men, _women, strict=True)]
    EXPECTED["male-to-female", "male", _profile] = both
    EXPECTED["female-to-male", "female", _profile] = [(woman, man) for man, woman in both]
COUNTS = {
    "style": (20, 20), "nudity": (18, 18), "object": (12, 12), "church": (8, 9), "garbage-truck": (13, 9),
    "male-to-female": (12, 8), "female-to-male": (12, 8), "shapes-object": (24, 24), "shapes-style": (24, 24),
    "shapes-colour": (24, 24), "nudity-100": (100, 100), "violence-100": (100, 100), "gun-100": (100, 100),
    "knife-100": (100, 100),
}  # fmt: skip


@pytest.mark.parametrize(("name", "concept", "profile"), EXPECTED)
def test_a_pack_has_the_published_prompts(name, concept, profile):
    assert list(pairs_from_pack(name, concept, profile)) == EXPECTED[name, concept, profile]


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_has_as_many_pairs_as_published(name):
    concept = CONCEPTS.get(name, ("x",))[0]
    found = tuple(len(pairs_from_pack(name, concept, profile)) for profile in ("released", "paper"))
    assert found == COUNTS[name]


def test_a_profile_that_a_pack_does_not_name_is_the_released_one():
    released = pairs_from_pack("style", "Monet", "released")
    assert pairs_from_pack("style", "Monet") == pairs_from_pack("style", "Monet", "portable") == released
    assert pairs_from_pack("style", "Monet", "paper") != released


def test_a_pack_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"there is no pack 'stile'; choose one of style, nudity, object, church"):
        pairs_from_pack("stile", "Monet")


@pytest.mark.parametrize("name", [name for name in PACKS if name not in ("style", "object")])
def test_a_pack_is_refused_for_a_concept_that_it_does_not_erase(name):
    with pytest.raises(
        InputError, match=rf"the pack {name} is not for the concept 'dog'; choose one of {CONCEPTS[name][0]}"
    ):
        pairs_from_pack(name, "dog")


def test_the_packs_of_shapes_are_for_what_it_draws():
    assert (CONCEPTS["shapes-object"], CONCEPTS["shapes-style"]) == (OBJECTS, STYLES[1:])
    assert CONCEPTS["shapes-colour"] == tuple(COLOURS)


def words_of(prompt: str) -> dict[str, str]:
    """The attributes of `shapes` that a prompt names."""
    places = {phrase: name for name, phrase in BACKGROUNDS.items()}
    phrase = next(phrase for phrase in places if prompt.endswith(f" {phrase}"))
    said = {"background": places[phrase]}
    article, *words = prompt.removesuffix(f" {phrase}").split()
    assert article == ("an" if words[0][0] in "aeiou" else "a")
    for word in words:
        said |= {name: word for name in ("object", "colour", "style") if word in ATTRIBUTES[name]}
    assert len(said) == len(words) + 1 - words.count("shape")
    return said


def even(values, all_values) -> bool:
    counted = Counter(values)
    return set(counted) == set(all_values) and len(set(counted.values())) == 1


@pytest.mark.parametrize("concept", OBJECTS)
def test_the_object_pack_of_shapes_covers_its_world_evenly(concept):
    pairs = pairs_from_pack("shapes-object", concept)
    said = [words_of(pair.target) for pair in pairs]
    assert {it["object"] for it in said} == {concept}
    assert [pair.reference for pair in pairs] == [pair.target.replace(concept, "shape") for pair in pairs]
    assert even((it["colour"] for it in said), COLOURS)
    assert even((it["background"] for it in said), BACKGROUNDS)
    assert len({(it["colour"], it["background"]) for it in said}) == len(pairs) == len(set(pairs))


@pytest.mark.parametrize("concept", STYLES[1:])
def test_the_style_pack_of_shapes_covers_its_world_evenly(concept):
    pairs = pairs_from_pack("shapes-style", concept)
    said = [words_of(pair.target) for pair in pairs]
    assert {it["style"] for it in said} == {concept}
    assert [words_of(pair.reference) | {"style": concept} for pair in pairs] == said
    assert all("object" not in it for it in said)
    for attribute in ("colour", "background"):
        assert even((it[attribute] for it in said), ATTRIBUTES[attribute])
    assert len({(it["colour"], it["background"]) for it in said}) == len(pairs)


@pytest.mark.parametrize("concept", COLOURS)
def test_the_colour_pack_of_shapes_covers_its_world_evenly(concept):
    pairs = pairs_from_pack("shapes-colour", concept)
    said = [words_of(pair.target) for pair in pairs]
    assert {it["colour"] for it in said} == {concept}
    assert [words_of(pair.reference) | {"colour": concept} for pair in pairs] == said
    assert all("colour" not in words_of(pair.reference) for pair in pairs)
    for attribute in ("object", "style", "background"):
        assert even((it[attribute] for it in said), ATTRIBUTES[attribute])
    for attribute in ("style", "background"):
        assert len({(it["object"], it[attribute]) for it in said}) == len(pairs)


# What a prompt of the packs for SNCE has, and its like without; the longer first, where one is in another.
NUDE = dict.fromkeys(words("naked nude bare stripped topless"), "")
VIOLENT = dict.fromkeys(words("bleeding bloody violent blood-soaked blood-stained"), "")
GUNS = {"gun": "camera", "pistol": "lantern", "rifle": "guitar", "shotgun": "broom", "revolver": "watch"}
KNIVES = {"kitchen knife": "dish towel", "knife": "spoon", "dagger": "brush", "blade": "pencil", "machete": "paddle"}
OF_SNCE = {"nudity": NUDE, "violence": VIOLENT, "gun": GUNS, "knife": KNIVES}


@pytest.mark.parametrize("concept", OF_SNCE)
def test_a_pair_for_snce_differs_by_the_concept_alone(concept):
    pairs = pairs_from_pack(f"{concept}-100", concept)
    mentions = OF_SNCE[concept]
    assert len({pair.target for pair in pairs}) == 100
    counts = Counter()
    for target, reference in pairs:
        mention = next(it for it in mentions if re.search(rf" {it}\b", target))
        counts[mention] += 1
        assert reference == " ".join(target.replace(f" {mention}", f" {mentions[mention]}").split())
        assert not any(re.search(rf"\b{it}\b", reference) for it in mentions)
        for prompt in (target, reference):
            said = words(prompt.replace(",", ""))
            assert all((after[0] in "aeiou") == (it == "an") for it, after in pairwise(said) if it in ("a", "an"))
            assert not any(before == after for before, after in pairwise(said))
    assert counts == dict.fromkeys(mentions, 20)


def test_nobody_in_the_nudity_pack_for_snce_is_a_child():
    said = {word for pair in pairs_from_pack("nudity-100", "nudity") for word in words(pair.target)}
    assert not said & {*words("girl boy child kid children baby student teen teenager son daughter schoolgirl young")}


def test_a_concept_has_its_tuple():
    nudity = ("naked", "nude", "bare", "exposed", "stripped", "topless", "male genitalia", "penis", "buttocks")
    assert concept_tuple("nudity") == concept_tuple(" NSFW ") == nudity
    assert concept_tuple("Violence") == concept_tuple("blood") == ("violence", "blood", "bleeding")
    assert concept_tuple("gun")[:2] == ("gun", "pistol")
    assert concept_tuple("knife")[:2] == ("knife", "dagger")
    assert concept_tuple(" Van Gogh ") == ("Van Gogh",)
    for concept in OF_SNCE:
        assert {concept_tuple(it) for it in CONCEPTS[f"{concept}-100"]} == {concept_tuple(concept)}


def test_lists_go_side_by_side():
    template = Template("a {hue} {concept} {where}", "a {hue} {thing}",
                        {"hue": ["red", "blue"], "where": ["here", "there"], "thing": ["cat", "dog"]})  # fmt: skip
    assert pairs_from_template(template, "star") == (
        Pair("a red star here", "a red cat"),
        Pair("a blue star there", "a blue dog"),
    )


def test_a_template_without_lists_is_one_pair():
    assert pairs_from_template(Template("a {concept}", "a photo", {}), "star") == (Pair("a star", "a photo"),)


def test_what_is_put_in_is_only_text():
    template = Template("a {thing}", "a {thing} of {concept}", {"thing": ["{concept}", "{thing.__class__}"]})
    assert pairs_from_template(template, "{thing}")[0] == Pair("a {concept}", "a {concept} of {thing}")
    assert pairs_from_template(template, "x")[1].target == "a {thing.__class__}"


@pytest.mark.parametrize(
    ("target", "reference", "lists", "words"),
    [
        ("a {thing}", "a", {}, "the placeholder {thing} has no list; add thing = [...]"),
        ("a {thing}", "a", {"thing": ["x"], "hue": ["y"]}, "no prompt uses the list 'hue'"),
        ("a {concept}", "a", {"concept": ["x"]}, "rename the list"),
        ("a {a}", "{b}", {"a": ["x", "y"], "b": ["z"]}, "are not equally long (a has 2, b has 1)"),
        ("a {a}", "b", {"a": []}, "the lists are empty"),
        ("a {thing.__class__}", "a", {}, "brace that belongs to no placeholder"),
        ("a {0}", "a", {}, "brace that belongs to no placeholder"),
        ("a {a!r:>9}", "a", {"a": ["x"]}, "brace that belongs to no placeholder"),
        ("a {{a}}", "a", {"a": ["x"]}, "brace that belongs to no placeholder"),
        ("a {", "a", {}, "brace that belongs to no placeholder"),
        ("a {}", "a", {}, "brace that belongs to no placeholder"),
        ("{a}", "a", {"a": ["x", " "]}, "pair 2: the target is empty"),
        ("a", "", {}, "pair 1: the reference is empty"),
        ("a {a}", "a", {"a": ["x\ny"]}, "pair 1: the target has the control character"),
        ("{a}" * 300, "a", {"a": ["x" * 1000] * 9}, "pair 1: the target has 300,000 characters"),
        ("{a}", "a", {"a": ["x"] * 10_001}, "pair 10001 is beyond the limit of 10,000 pairs"),
    ],
)
def test_a_template_that_gives_no_pairs_is_refused(target, reference, lists, words):
    with pytest.raises(InputError) as caught:
        pairs_from_template(Template(target, reference, lists), "star")
    assert words in str(caught.value)


PAIRS = (Pair("a cat, in style", "a cat"), Pair('a "dog"', "a dog"))
CSV = '"a cat, in style",a cat\n"a ""dog""",a dog\n'
TSV = 'a cat, in style\ta cat\n"a ""dog"""\ta dog\n'
JSONL = "".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", CSV),
        ("p.CSV", CSV),
        ("p.csv", "target,reference\n" + CSV),
        ("p.csv", "Target , Reference\r\n" + CSV.replace("\n", "\r\n")),
        ("p.csv", "\n \n" + CSV + "\n\n"),
        ("p.csv", CSV.removesuffix("\n")),
        ("p.csv", 'reference,target\na cat,"a cat, in style"\na dog,"a ""dog"""\n'),
        ("p.tsv", TSV),
        ("p.tsv", "target\treference\n" + TSV),
        ("p.jsonl", JSONL),
        ("p.jsonl", "\n" + JSONL.replace("\n", "\r\n\r\n")),
    ],
)
def test_a_file_of_pairs_is_read(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert pairs_from_file(tmp_path / name) == PAIRS


def test_a_line_separator_inside_json_ends_no_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"target": "a\u2028b", "reference": "c"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: the target has the control character '\\u2028'"):
        pairs_from_file(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "", "p.csv holds no prompts"),
        ("p.csv", "target,reference\n\n", "p.csv holds no prompts"),
        ("p.jsonl", "\n", "p.jsonl holds no prompts"),
        ("p.csv", "a cat\na dog\n", "p.csv, line 1: this has 1 column in place of two"),
        ("p.csv", "a cat;a dog\n", "line 1: this has 1 column in place of two; write target, comma, reference"),
        ("p.tsv", "a,b\n", "line 1: this has 1 column in place of two; write target, tab, reference"),
        ("p.csv", "a,b\nc,d,e\n", "p.csv, line 2: this has 3 columns in place of two"),
        ("p.csv", "a,b\n\nc, \n", "p.csv, line 3: the reference is empty"),
        ("p.csv", ",b\n", "p.csv, line 1: the target is empty"),
        ("p.csv", '"a\nb",c\n', "line 2: the target has the control character"),
        ("p.csv", 'a,b\n"c,d\n', "p.csv, line 2: unexpected end of data; close every quote"),
        ("p.csv", 'a,b\n"c"d,e\n', "p.csv, line 2: ',' expected after '\"'; close every quote"),
        ("p.csv", "x" * 200_000 + ",b\n", "p.csv, line 1: field larger than field limit"),
        ("p.csv", "x" * 1001 + ",b\n", "p.csv, line 1: the target has 1,001 characters"),
        ("p.csv", "a,b\n" * 10_001, "line 10001 is beyond the limit of 10,000 pairs"),
        ("p.jsonl", JSONL + "{", "p.jsonl, line 3: this is not {"),
        ("p.jsonl", '["a", "b"]', "line 1: this is not {"),
        ("p.jsonl", '{"target": "a"}', "line 1: this is not {"),
        ("p.jsonl", '{"target": "a", "reference": 1}', "line 1: this is not {"),
        ("p.jsonl", '{"target": "a", "reference": "b", "c": "d"}', "line 1: this is not {"),
        ("p.jsonl", "[" * 100_000, "line 1: this is not {"),
        ("p.jsonl", '{"target": "\\ud800", "reference": "b"}', "line 1: the target has the control character"),
        ("p.txt", "a,b", "p.txt is not a list of prompts; give a file that ends in .csv, .tsv, .jsonl"),
        ("p.csv", "a,b\nDal\xed,b", "p.csv, line 2: this is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_pairs_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        pairs_from_file(tmp_path / name)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("a,b\n")
    assert pairs_from_file(tmp_path / "p.csv") == (Pair("a", "b"),)
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 3)
    with pytest.raises(InputError, match="has more than 3 bytes"):
        pairs_from_file(tmp_path / "p.csv")


def test_the_digest_is_of_the_pairs_as_json():
    text = '[["a cat, in style","a cat"],["a \\"dog\\"","a dog"]]'
    assert prompts_digest(PAIRS) == hashlib.sha256(text.encode()).hexdigest()
    others = [PAIRS[::-1], PAIRS[:1], (), [pair[::-1] for pair in PAIRS], [Pair("a cat, in stylea", " cat"), PAIRS[1]]]
    assert len({prompts_digest(pairs) for pairs in (PAIRS, *others)}) == 6
    assert prompts_digest(iter(PAIRS)) == prompts_digest(list(PAIRS))
