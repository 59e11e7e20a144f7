"""What `report.html` holds: everything that decides, nothing that could act, and not more than can be opened."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeout.validate.report.gallery import FIRST, LEAST, PROBLEMS, choose
from bakeout.validate.report.html import targets_of, to_page
from bakeout.validate.report.markup import element, number, to_html, visible
from bakeout.validate.report.schema import Check, Drawn, Scene

SAMPLES = ("pass", "fail", "unjudged", "large")
MODELS = ("base", "reference", "onnx")


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text without style and head."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._in = ""
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data):
        if self._in != "style":
            self.words.append(data)

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


@pytest.fixture(scope="module")
def page(samples):
    return lambda name: to_page(*samples(name))


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_in_the_page_acts_or_is_fetched(page, name):
    made = page(name)
    parsed = Parsed(made)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "iframe", "object", "embed", "form", "base", "svg:a"})
    assert [rel for tag, it in parsed.tags if tag == "link" for rel in it.items()] == [
        ("rel", "icon"),
        ("href", "data:,"),
    ]
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", source) for source in parsed.values("src"))
    assert all(re.match(r"#[a-z]+$|pictures/[\w.-]+\.png$|data:,$", address) for address in parsed.values("href"))
    names = {attribute for _, attributes in parsed.tags for attribute in attributes}
    assert not [attribute for attribute in names if attribute.startswith("on") or attribute in ("style", "srcset")]
    style = made[made.index("<style>") : made.index("</style>")]
    assert not re.search(r"url\(|@import|image-set|src\(", style)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_policy_allows_the_page_s_own_style_and_pictures_alone(page, name):
    made = page(name)
    (policy,) = [it["content"] for tag, it in Parsed(made).tags if it.get("http-equiv") == "Content-Security-Policy"]
    style = re.search("<style>(.*?)</style>", made, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'", "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    assert made.index("Content-Security-Policy") < made.index("<style>") < made.index("<body>")


@settings(derandomize=True, max_examples=30, deadline=None)
# Short, because a long text folds, and JSON writes six characters for one.
@given(text=st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.sampled_from([
    "</title><script>1</script>", "</style><b>", "\"'><img src=x onerror=y>", "<!--", "]]>", "&lt;b&gt;", "</bdi></h4>",
])))  # fmt: skip
def test_no_text_becomes_markup(samples, remake, text):
    report, files = samples("pass")

    def said(word):
        first, check = report.scenes[0], report.checks[0]
        drawn = {name: it.model_copy(update={"seen": word, "problem": word}) for name, it in first.drawn.items()}
        return remake(
            report, artifact=word, base=word, erased=(word,), detector=word, tools={word: word},
            settings={word: [word, {word: word}]}, verdict="fail",
            checks=(check.model_copy(update={"name": word, "summary": word, "verdict": "fail"}), *report.checks[1:]),
            scenes=(first.model_copy(update={"prompt": word, "drawn": drawn}), *report.scenes[1:]),
            detections=tuple(it.model_copy(update={"concept": word}) for it in report.detections),
            tensors=(report.tensors[0].model_copy(update={"component": word, "call": word, "problem": word}),),
            tolerances=(report.tolerances[0].model_copy(update={"name": word, "reason": word}),),
        )  # fmt: skip

    def structure(word):
        return [(tag, list(attributes)) for tag, attributes in Parsed(to_page(said(word), files)).tags]

    assert structure(text or "-") == structure("x" * len(text or "-"))


def test_what_cannot_be_seen_is_shown(page):
    text = Parsed(page("fail")).text
    assert "[U+202E]txt.egnaro[U+202C]" in text
    assert "[U+0007]" in text
    assert visible("\u202e\ud800\ufeff") == "[U+202E][U+D800][U+FEFF]"
    assert visible("a é 星 \U0001f469\u200d\U0001f3a8\n") == "a é 星 \U0001f469\u200d\U0001f3a8\n"


def test_a_long_prompt_is_folded_and_whole(page):
    made = page("fail")
    assert "x" * 160 + "…" in made
    assert f"<bdi>{'x' * 2000}</bdi>" in made
    assert "all 2,000 characters" in made


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_says_what_the_report_says(samples, page, name):
    report, _ = samples(name)
    text = Parsed(page(name)).text
    wanted = [
        report.artifact, report.base, report.edit, report.manifest, f"{len(report.scenes)} prompts",
        *report.erased, *(check.summary for check in report.checks), *(it.reason for it in report.tolerances),
        *report.tools.values(), *report.settings, *(it.problem for it in report.tensors if it.problem),
    ]  # fmt: skip
    assert not [words for words in wanted if visible(words) not in text]
    for it in report.detections:
        assert f"{it.model} {it.detected} of {it.pictures} {100 * it.low:.1f} to {100 * it.high:.1f} %" in text
    assert ("There is no detector" in text) == (report.detector is None)


def test_the_verdict_comes_first_and_failures_before_all_else(page):
    text = Parsed(page("fail")).text
    order = ["Validation of starless", "Fail", "Failed: components (onnx), step-parity (onnx)", "Checks", "✕ fail",
             "lacks pooler_output", "Erasure Detector"]  # fmt: skip
    places = [text.index(words, text.index("Validation of")) for words in order]
    assert places == sorted(places)


def test_the_worst_tensor_is_on_top(page):
    made = page("fail")
    rows = re.findall("<tr>(.*?)</tr>", made[made.index('<section id="tensors">') :], re.DOTALL)[1:]
    assert ["badge fail" in row for row in rows[:4]] == [True, True, True, False]
    assert "the artifact has no such output" in rows[0]
    assert "512 of 2,048 elements are not finite" in rows[1]
    assert "[0, 3, 7, 7]: not finite for -1.25" in rows[1]


def test_every_picture_has_a_text_and_every_table_its_heads(page):
    parsed = Parsed(page("fail"))
    assert all(it["alt"] for tag, it in parsed.tags if tag == "img")
    assert all(it.get("scope") in ("row", "col") for tag, it in parsed.tags if tag == "th")
    assert all(it["aria-label"] for tag, it in parsed.tags if tag == "svg" and it.get("role") == "img")
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_600_prompts_give_a_page_that_can_be_opened(samples, page):
    report, files = samples("large")
    made = page("large")
    shown = made.count("<img ") // 4
    assert 2 * FIRST <= shown <= 2 * (FIRST + LEAST)
    assert len(made) < 1_000_000
    assert f"{shown // 2} of 300 shown" in Parsed(made).text
    # The rest is there by name.
    linked = set(re.findall(r'href="(pictures/[^"]+)"', made))
    assert linked == set(files)
    assert len(report.scenes) == 600


def test_a_large_picture_is_shown_smaller(page):
    sizes = {(it["width"], it["height"]) for tag, it in Parsed(page("unjudged")).tags if tag == "img"}
    assert sizes == {("256", "256")}
    small = {(it["width"], it["height"], it.get("class")) for tag, it in Parsed(page("pass")).tags if tag == "img"}
    assert small == {("64", "64", "pixels")}


def scene(index, kind="erased", problem=None, psnr=40.0, models=MODELS):
    values = {"ssim": 0.9, "max_difference": 9, "seen": None}
    drawn = {
        name: Drawn(file=f"pictures/{index}-{name}.png", psnr_db=psnr if name == "onnx" else None,
                    problem=problem if name == "onnx" else None, **values)
        for name in models
    }  # fmt: skip
    return Scene(prompt="a star", seed=index, kind=kind, drawn=drawn)


def test_scenes_with_a_problem_and_those_least_like_the_reference_are_shown():
    scenes = [scene(index, psnr=90.0 - index) for index in range(100)]
    scenes[50] = scene(50, problem="black")
    scenes[60] = scene(60, models=("base", "reference"))
    choice = choose(scenes, "erased", MODELS)
    assert choice.shown == (50, 60, *range(FIRST), *range(100 - LEAST, 100))
    assert choice.least == set(range(100 - LEAST, 100))
    assert choice.with_problem == 2
    assert sorted([*choice.shown, *choice.left_out]) == list(range(100))
    assert choose(scenes, "kept", MODELS).shown == ()


def test_not_even_broken_scenes_make_the_page_endless():
    choice = choose([scene(index, problem="black") for index in range(600)], "erased", MODELS)
    assert len(choice.shown) == PROBLEMS
    assert choice.with_problem == 600
    assert len(choice.left_out) == 600 - PROBLEMS


def test_a_validation_that_got_nowhere_has_a_page(samples, remake):
    report = samples("pass")[0]
    check = report.checks[0].model_copy(update={"verdict": "unjudged", "summary": "There was no memory."})
    nothing = dict.fromkeys(("erased", "tensors", "curves", "scenes", "detections", "tolerances"), ())
    bare = remake(report, verdict="unjudged", checks=(check,), detector=None, settings={}, tools={}, **nothing)
    text = Parsed(to_page(bare, {})).text
    for words in ("Could not judge", "There was no memory.", "None was drawn.", "No steps were compared.", "0 prompts"):
        assert words in text


def test_targets_are_all_that_a_report_names(samples):
    assert targets_of(samples("fail")[0]) == ("onnx", "diffusers")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0.0, "0"), (3.14e-7, "3.14e-7"), (1e-4, "1e-4"), (0.05, "0.05"), (1.0, "1"), (243.0, "243"),
     (123456.0, "1.23e5"), (-2.5e-9, "-2.5e-9"), (1e-10, "1e-10")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_an_element_keeps_the_order_of_text_and_children():
    made = element("p", "a", element("b", "b"), "c", None, element("br"), "<d>", class_="x", aria_label='"', title=None)
    assert to_html(made) == '<!doctype html>\n<p class="x" aria-label="&quot;">a<b>b</b>c<br>&lt;d&gt;</p>\n'


def test_a_limit_says_on_which_side_of_it_is_well(samples, remake):
    report, pictures = samples("pass")
    checks = tuple(
        Check(name=name, target=None, verdict="pass", summary="It is.", measured=83, limit=48, bound=bound)
        for name, bound in (("one", "at least"), ("other", "at most"))
    )
    page = to_page(remake(report, checks=checks), pictures)
    assert re.findall(r"83<span class=\"bound\">([^<]*)</span>", page) == ["at least 48", "at most 48"]
