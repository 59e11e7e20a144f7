from types import SimpleNamespace

import numpy as np
import pytest

from bakeout.builtin.shapes.scenes import draw, mentioned, sample_scene
from bakeout.editor.errors import InputError
from bakeout.validate.erasure import detections, detector_of, trials_of
from bakeout.validate.runners import Trial

PAIRS = "target,reference\na star at sea,the sea\na star at home,a home\nstripes,plain\n"


def manifest(*concepts, base=("builtin", "shapes"), recipe=None):
    """What of a manifest matters here."""
    return SimpleNamespace(
        edits=[SimpleNamespace(concept=it) for it in concepts],
        base=SimpleNamespace(format=base[0], name=base[1]),
        recipe=recipe or {},
    )


ELSEWHERE = ("folder", "my-model")


def recipe(*prompts):
    return {
        "model": "m",
        "edits": [{"method": "conceptprune", "concept": concept, "prompts": it} for concept, it in prompts],
    }


def test_scenes_of_shapes_are_held_out_and_half_of_them_show_the_concept():
    trials = trials_of(manifest("star"), None, 24, 5)
    assert [trial.seed for trial in trials] == list(range(5, 29))
    assert [trial.kind for trial in trials] == ["erased"] * 12 + ["kept"] * 12
    assert all(("star" in mentioned(trial.prompt)) == (trial.kind == "erased") for trial in trials)
    assert {trial.concept for trial in trials[:12]} == {"star"}
    assert len({trial.prompt for trial in trials}) > 20


def test_several_concepts_take_turns_and_none_is_in_what_is_kept():
    trials = trials_of(manifest("star", "striped"), None, 12, 0)
    assert [trial.concept for trial in trials[:6]] == ["star", "striped"] * 3
    assert all(trial.concept in mentioned(trial.prompt) for trial in trials[:6])
    assert not any({"star", "striped"} & mentioned(trial.prompt) for trial in trials[6:])


def test_a_release_draws_600():
    trials = trials_of(manifest("Star "), None, 600, 0)
    assert sum(trial.kind == "erased" for trial in trials) == 300
    assert len({(trial.prompt, trial.seed) for trial in trials}) == 600


def test_where_everything_is_erased_nothing_is_kept():
    from bakeout.builtin.shapes.scenes import OBJECTS

    trials = trials_of(manifest(*OBJECTS), None, 8, 0)
    assert {trial.kind for trial in trials} == {"erased"}


def test_other_models_have_the_prompts_of_their_recipe():
    made = recipe(
        ("cat", {"target": "a {concept} {place}", "reference": "{place}", "lists": {"place": ["here", "up"]}})
    )
    trials = trials_of(manifest("cat", base=ELSEWHERE, recipe=made), None, 8, 0)
    assert [trial.prompt for trial in trials] == ["a cat here", "a cat up"] * 2 + ["here", "up"] * 2
    assert len({trial.seed for trial in trials}) == 8
    assert detector_of(manifest("cat", base=ELSEWHERE)) is None


def test_a_concept_in_the_user_s_words_has_the_prompts_of_its_recipe_on_shapes_too():
    made = recipe(("red things", {"target": "a red star", "reference": "a star"}))
    trials = trials_of(manifest("red things", recipe=made), None, 2, 0)
    assert [trial.prompt for trial in trials] == ["a red star", "a star"]


@pytest.mark.parametrize("made", [{}, {"version": 9}, recipe(("cat", {"pack": "no such"})), {"edits": "x" * 99}])
def test_without_a_recipe_prompts_are_asked_for(made):
    with pytest.raises(InputError, match="--prompts FILE"):
        trials_of(manifest("cat", base=ELSEWHERE, recipe=made), None, 4, 0)


def test_prompts_from_a_file_are_asked_for():
    with pytest.raises(InputError, match=r"from a file.*--prompts FILE"):
        trials_of(manifest("cat", base=ELSEWHERE, recipe=recipe(("cat", {"file": "cats.csv"}))), None, 4, 0)


def test_given_prompts_go_with_the_concept_that_they_name(tmp_path):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    trials = trials_of(manifest("star", "striped"), tmp_path / "pairs.csv", 6, 0)
    assert [(trial.prompt, trial.concept) for trial in trials if trial.kind == "erased"] == [
        ("a star at sea", "star"), ("stripes", "star, striped"), ("a star at home", "star"),
    ]  # fmt: skip
    assert [trial.prompt for trial in trials if trial.kind == "kept"] == ["the sea", "plain", "a home"]


def test_the_detector_counts_what_was_erased_and_what_was_asked_for():
    detector = detector_of(manifest("star"))
    erased, kept = Trial("a red star on grass", 0, "erased", "Star"), Trial("a ring with stripes", 1, "kept")
    assert detector.counts(erased, "star red plain grass")
    assert not detector.counts(erased, "ring red plain grass")
    assert detector.counts(kept, "ring red striped grass")
    assert not detector.counts(kept, "ring red plain grass")


def test_the_detector_looks():
    scene = sample_scene(np.random.default_rng(0))
    (seen,) = detector_of(manifest("star")).look([draw(scene)])
    assert seen == " ".join(scene.labels.values())


def test_detections_are_of_each_concept_and_of_what_is_kept():
    detector = detector_of(manifest("star", "striped"))
    trials = [
        Trial("a star", 0, "erased", "star"), Trial("a striped ring", 1, "erased", "striped"),
        Trial("a star", 2, "erased", "star"), Trial("a moon", 3, "kept"), Trial("x", 4, "erased", "odd things"),
    ]  # fmt: skip
    seen = ["star red plain sky", "ring red plain sky", "moon red plain sky", "moon red plain sky", "star"]
    found, verdicts = detections(detector, "onnx", trials, seen)
    assert [(it.concept, it.kind, it.detected, it.pictures) for it in found] == [
        ("star", "erased", 1, 2), ("striped", "erased", 0, 1), ("star, striped, odd things", "kept", 1, 1),
    ]  # fmt: skip
    assert verdicts == [True, False, False, True]


@pytest.mark.parametrize(
    ("pack", "concept"), [("shapes-object", "star"), ("shapes-style", "striped"), ("shapes-colour", "red")]
)
def test_every_sort_of_concept_that_shapes_draws_is_judged_whatever_the_method(pack, concept):
    made = manifest(concept, recipe={"model": "shapes", "edits": [
        {"method": "snce", "concept": concept, "prompts": {"pack": pack}}
    ]})  # fmt: skip
    trials = trials_of(made, None, 60, 0)
    assert [concept in mentioned(trial.prompt) for trial in trials] == [True] * 30 + [False] * 30
    assert len({trial.prompt for trial in trials}) > 50
    detector = detector_of(made)
    seen = [" ".join(mentioned(trial.prompt)) for trial in trials]
    found, verdicts = detections(detector, "onnx", trials, seen)
    assert [(it.concept, it.kind, it.detected, it.pictures) for it in found] == [
        (concept, "erased", 30, 30), (concept, "kept", 30, 30),
    ]  # fmt: skip
    assert all(verdicts)
    gone = [" ".join(mentioned(trial.prompt) - {concept}) for trial in trials]
    assert [it.detected for it in detections(detector, "onnx", trials, gone)[0]] == [0, 30]
