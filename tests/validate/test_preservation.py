"""Pictures of an edit that leaves the rest of the model alone, and of edits that destroy it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from math import comb, log

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar

from bakeout.builtin.shapes.evaluation import uniform_scenes
from bakeout.builtin.shapes.scenes import draw
from bakeout.editor.edit import Edit, Origin, PatchActivation
from bakeout.editor.model import open_model
from bakeout.validate.erasure import Detector
from bakeout.validate.metrics import Pixels
from bakeout.validate.preservation import check_resemblance, check_seen, concordance
from bakeout.validate.report.schema import Check, Drawn
from bakeout.validate.runners import Trial
from bakeout.validate.stats import Loss, paired_loss
from bakeout.validate.validation import validate

COUNT = 12
BASE = [draw(scene) for scene in uniform_scenes(COUNT)]
Z = 1.959963984540054


def png(pixels: Pixels) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def drawn(model: str, number: int, seen: str = "", problem: str | None = None) -> Drawn:
    return Drawn(
        file=f"pictures/{number:03}-{model}.png", psnr_db=None, ssim=None, max_difference=None, problem=problem,
        seen=seen,
    )  # fmt: skip


def judged(
    reference: Sequence[Pixels], base: Sequence[Pixels] = BASE, odd: Sequence[int] = (), erased: int = 0
) -> Check:
    """The check on pictures, the first `erased` of which are of prompts with what was erased; the base's `odd` show
    nothing."""
    trials = [
        Trial("a thing", number, "erased" if number < erased else "kept", "star" if number < erased else "")
        for number in range(len(base))
    ]
    of_base = [drawn("base", number, problem="it is black" if number in odd else None) for number in range(len(base))]
    of_reference = [drawn("reference", number) for number in range(len(base))]
    pictures = {it.file: png(own) for it, own in zip(of_base, base, strict=True)}
    pictures |= {it.file: png(own) for it, own in zip(of_reference, reference, strict=True)}
    return check_resemblance(trials, of_base, of_reference, pictures)


def noise(count: int = COUNT) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))


def altered(change: Callable[[np.ndarray], np.ndarray], pictures: Sequence[Pixels] = BASE) -> list[Pixels]:
    return [change(it.astype(np.float64)).round().clip(0, 255).astype(np.uint8) for it in pictures]


def grain(picture: np.ndarray) -> np.ndarray:
    return picture + np.random.default_rng(1).normal(0, 20, picture.shape)


def faded(picture: np.ndarray) -> np.ndarray:
    return 128 + (picture - 128) / 8


HARMLESS = {
    "the same": BASE,
    "grain": altered(grain),
    "a little darker": altered(lambda it: it * 0.9),
    "a pixel aside": [np.roll(it, 1, axis=1) for it in BASE],
}
DESTROYED = {
    "black": [np.zeros_like(it) for it in BASE],
    "one colour each": altered(lambda it: np.broadcast_to(it.mean((0, 1)), it.shape)),
    "noise": noise(),
    "one picture for all": [BASE[0]] * COUNT,
    "noise for all": noise(1) * COUNT,
    "another order": BASE[1:] + BASE[:1],
    "negatives": altered(lambda it: 255 - it),
    "hardly any contrast": altered(faded),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_viewer_takes_for_the_same_picture_is_kept(name):
    check = judged(HARMLESS[name])
    assert (check.name, check.target, check.verdict, check.measured) == ("preservation", None, "pass", 0)
    assert f"Of {COUNT} pictures" in check.summary
    assert "0 are no longer the base's" in check.summary


@pytest.mark.parametrize("name", DESTROYED)
def test_a_destroyed_model_fails(name):
    check = judged(DESTROYED[name])
    assert check.verdict == "fail"
    assert check.measured > 0.8
    assert check.limit == 0.25


@pytest.mark.parametrize(("lost", "verdict"), [(3, "pass"), (4, "unjudged"), (6, "unjudged"), (7, "fail")])
def test_it_fails_only_where_too_much_is_certainly_lost(lost, verdict):
    check = judged([*noise(lost), *BASE[lost:]])
    assert (check.verdict, check.measured) == (verdict, lost / COUNT)
    assert f"{lost} are no longer the base's" in check.summary
    assert ("more prompts would tell" in check.summary) == (verdict == "unjudged")


def test_the_picture_that_is_least_like_the_base_s_is_named():
    assert "it being pictures/004-reference.png" in judged([*BASE[:4], 255 - BASE[4], *BASE[5:]]).summary


def test_one_prompt_is_enough_to_pass_and_too_few_to_fail():
    assert judged(BASE[:2], BASE[:2], erased=1).verdict == "pass"
    assert judged(noise(2), BASE[:2], erased=1).verdict == "unjudged"
    assert judged(noise(4), BASE[:4], erased=1).verdict == "fail"


def test_pictures_of_what_was_erased_may_be_lost():
    assert judged([*noise(6), *BASE[6:]], erased=6).measured == 0
    assert judged([*BASE[:6], *noise(6)], erased=6).measured == 1


def test_where_the_base_drew_nothing_there_is_nothing_to_destroy():
    kept = judged([*noise(6), *BASE[6:]], odd=range(6))
    assert (kept.verdict, kept.measured) == ("pass", 0)
    assert "Of 6 pictures" in kept.summary
    nothing = judged(BASE, odd=range(COUNT))
    assert (nothing.verdict, nothing.measured) == ("unjudged", None)
    assert judged(BASE, odd=range(1, COUNT)).verdict == "unjudged"


def test_prompts_that_the_base_draws_alike_tell_nothing_of_another_picture():
    generator = np.random.default_rng(0)
    alike = [altered(lambda it: it + generator.normal(0, 2, it.shape), [BASE[0]])[0] for _ in range(COUNT)]
    assert judged(alike, alike).verdict == "pass"
    other = judged(alike[1:] + alike[:1], alike)
    assert (other.verdict, other.measured) == ("unjudged", None)
    assert "too alike to tell" in other.summary


def test_pictures_of_any_size_are_compared():
    wide = [np.repeat(np.repeat(it, 3, axis=0), 5, axis=1)[:, :300] for it in BASE]
    assert judged(wide, wide).measured == 0
    assert judged(wide[1:] + wide[:1], wide).verdict == "fail"


def test_concordance_is_one_less_the_error_as_a_part_of_what_chance_gives():
    generator = np.random.default_rng(0)
    some, others = generator.normal(1, 2, (3, 50)), generator.normal(0, 1, (4, 50))
    others[0] = 0.7 * some[0] + 1
    found = concordance(some, others)
    assert found.shape == (3, 4)
    for i, a in enumerate(some):
        for j, b in enumerate(others):
            by_chance = np.mean((a[:, None] - b[None]) ** 2)
            assert found[i, j] == pytest.approx(1 - np.mean((a - b) ** 2) / by_chance, abs=1e-12)
    flat = np.full((1, 50), 3.0)
    assert concordance(flat, others) == pytest.approx(np.zeros((1, 4)))
    assert concordance(flat, flat) == 1


def detector(known: Sequence[str] = ("red", "ring")) -> Detector:
    return Detector("eyes", lambda _: [], frozenset(known), lambda prompt: set(prompt.split()) & set(known))


def seen(before: Sequence[bool], after: Sequence[bool], prompt: str = "a red ring") -> Check | None:
    """The check on what a detector sees; pictures of what was erased come first, and say nothing."""
    trials = [Trial("a red star", 0, "erased", "star"), *(Trial(prompt, it, "kept") for it in range(len(before)))]
    base, reference = (
        [drawn(model, 0, "red star"), *(drawn(model, it + 1, "red ring" if found else "red square")
                                        for it, found in enumerate(verdicts))]
        for model, verdicts in (("base", before), ("reference", after))
    )  # fmt: skip
    return check_seen(detector(), trials, base, reference)


def verdicts(count: int, of: int = COUNT) -> list[bool]:
    return [number < count for number in range(of)]


@pytest.mark.parametrize(
    ("kept", "of", "verdict"),
    [(12, 12, "pass"), (9, 12, "pass"), (8, 12, "unjudged"), (5, 12, "unjudged"), (4, 12, "fail"), (0, 12, "fail"),
     (0, 2, "unjudged"), (225, 300, "pass"), (224, 300, "unjudged"), (210, 300, "fail")],
)  # fmt: skip
def test_what_a_detector_no_longer_sees_is_lost(kept, of, verdict):
    check = seen(verdicts(of, of), verdicts(kept, of))
    assert check is not None
    assert (check.name, check.target, check.verdict) == ("preservation-detector", None, verdict)
    assert check.measured == pytest.approx(1 - kept / of)
    assert f"in {of} of the base's and in {kept} of the reference's" in check.summary


def test_what_the_base_did_not_draw_either_is_not_lost():
    check = seen(verdicts(3), verdicts(3))
    assert check is not None
    assert (check.verdict, check.measured) == ("pass", 0)


def test_what_is_gained_makes_up_for_what_is_lost():
    check = seen(verdicts(6), verdicts(6)[::-1])
    assert check is not None
    assert (check.verdict, check.measured) == ("pass", 0)


def test_prompts_that_ask_for_nothing_known_are_not_counted():
    assert seen(verdicts(12), verdicts(0), "a thing") is None
    assert seen(verdicts(0), verdicts(12)) is None


def loss_of(lost: int, gained: int, n: int) -> Loss:
    rest = [False] * (n - lost - gained)
    return paired_loss([True] * lost + [False] * gained + rest, [False] * lost + [True] * gained + rest)


def score(lost: int, gained: int, n: int, difference: float) -> float:
    """How many standard errors the loss is from `difference`, the errors by maximum likelihood under `difference`."""

    def unlikely(q: float) -> float:
        shares = (q + difference, q, 1 - 2 * q - difference)
        return -sum(count * log(max(share, 1e-300)) for count, share in zip((lost, gained, n - lost - gained), shares,
                                                                            strict=True))  # fmt: skip

    ends = (max(0.0, -difference), (1 - difference) / 2)
    q = minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    return (lost - gained - n * difference) / np.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(5, 1, 12), (1, 4, 12), (3, 3, 20), (40, 7, 300)])
def test_the_bounds_of_a_loss_are_where_the_score_has_its_quantiles(lost, gained, n):
    loss = loss_of(lost, gained, n)
    assert loss.share == pytest.approx((lost - gained) / n)
    assert score(lost, gained, n, loss.low) == pytest.approx(Z, abs=1e-4)
    assert score(lost, gained, n, loss.high) == pytest.approx(-Z, abs=1e-4)


@pytest.mark.parametrize(("lost", "gained"), [(0.25, 0.0), (0.3, 0.05), (0.1, 0.1), (0.5, 0.02)])
def test_a_loss_is_in_its_interval_as_often_as_is_said(lost, gained):
    n, within, below = 12, 0.0, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = comb(n, b) * comb(n - b, c) * lost**b * gained**c * (1 - lost - gained) ** (n - b - c)
            it = loss_of(b, c, n)
            within += chance * (it.low - 1e-9 <= lost - gained <= it.high + 1e-9)
            below += chance * (it.low > lost - gained)
    assert within > 0.93
    assert below < 0.04


def test_a_loss_needs_verdicts_in_pairs():
    with pytest.raises(ValueError, match="no verdicts"):
        paired_loss([], [])
    with pytest.raises(ValueError, match="zip"):
        paired_loss([True], [True, True])
    assert paired_loss([True], [False]).high == 1


def test_an_artifact_that_is_the_reference_fails_where_the_edit_destroys_the_model(bake, tmp_path):
    """Whatever else is judged holds the artifact against the reference, and fails nothing."""
    generator = torch.Generator().manual_seed(0)
    patches = tuple(
        PatchActivation(site.name, "input", torch.rand(site.d_in, generator=generator) < 0.9, torch.zeros(site.d_in))
        for site in open_model("shapes").sites_of("ffn2")
    )
    folder = bake("shapes", tmp_path / "artifact", Edit(patches, (Origin("acterase", "star"),)))
    report, _ = validate(folder, count=8, steps=3, device="cpu")
    failed = {check.name for check in report.checks if check.verdict == "fail"}
    assert failed - {"preservation-detector"} == {"preservation"}
