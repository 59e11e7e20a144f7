import math
from types import SimpleNamespace

import pytest
import torch

from bakeout.editor.errors import InputError
from bakeout.validate.contract import Interface
from bakeout.validate.parity import (
    Expected,
    check_components,
    check_detector,
    check_edit,
    check_erased,
    check_kept,
    check_pictures,
    component_parity,
    curve,
    drawn,
    is_out_of_memory,
    reason,
    within,
)
from bakeout.validate.report.schema import Detection, Drawn
from bakeout.validate.runners import Call, png_from_floats
from bakeout.validate.stats import detection
from bakeout.validate.tolerances import COMPONENT, DRIFT, FAR, FAR_STEP, PARITY, STEP, TABLE, VAE

OUT = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
INTERFACES = {"unet": Interface({"sample": 4}, {"out_sample": 4})}
EXPECTED = [
    Expected("erased", Call("unet", "step 1 of 3", {"sample": OUT}), {"out_sample": OUT}, {"out_sample": 0.3}),
    Expected("kept", Call("unet", "step 1 of 3", {"sample": OUT}), {"out_sample": OUT}, {"out_sample": 0.1}),
]


def rows_of(answer):
    """Component parity of a pipeline whose UNet answers so."""
    pipeline = SimpleNamespace(unet=SimpleNamespace(run=lambda inputs: answer(inputs["sample"])))
    return component_parity("onnx", pipeline, INTERFACES, EXPECTED)


def fails(sample):
    raise RuntimeError("node 7 is broken\nand more")


def test_a_network_at_rounding_level_passes():
    rows = rows_of(lambda sample: {"out_sample": sample * (1 + 1e-6), "another": sample})
    assert [(row.component, row.output, row.kind, row.problem) for row in rows] == [
        ("unet", "out_sample", "erased", None), ("unet", "out_sample", "kept", None),
    ]  # fmt: skip
    assert rows[0].relative_rms == pytest.approx(1e-6, rel=0.1)
    assert rows[0].sqnr_db == pytest.approx(120, abs=1)
    assert (rows[0].base_relative_rms, rows[0].limit) == (0.3, COMPONENT.limit)
    check = check_components("onnx", rows)
    assert check.verdict == "pass"
    assert check.measured == max(row.relative_rms for row in rows)


def spoilt(sample, value):
    out = sample.clone()
    out[1, 2, 3, 0] = value
    return {"out_sample": out}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda sample: {"out_sample": sample * (1 + 1e-4)}, "whose distance to the reference's is"),
        (lambda sample: {"out_sample": sample.roll(1)}, "whose distance to the reference's is"),
        (lambda sample: spoilt(sample, math.nan), "1 of 128 elements are not finite"),
        (lambda sample: spoilt(sample, math.inf), "1 of 128 elements are not finite"),
        (lambda sample: {"other": sample}, "the output is missing"),
        (lambda sample: {"out_sample": sample[:1]}, r"its shape is \[1, 4, 4, 4\] in place of \[2, 4, 4, 4\]"),
        (lambda sample: {"out_sample": sample.flatten()}, "its shape"),
        (fails, "it does not run .RuntimeError: node 7 is broken.$"),
    ],
)  # fmt: skip
def test_another_answer_fails_with_its_sentence(answer, said):
    import re

    rows = rows_of(answer)
    check = check_components("onnx", rows)
    assert check.verdict == "fail"
    assert re.search(said.removesuffix("$"), check.summary)
    assert "and more" not in check.summary


def test_the_worst_element_is_in_the_row():
    (row, _) = rows_of(lambda sample: spoilt(sample, 99.0))
    assert (row.worst.index, row.worst.artifact, row.worst.reference) == ((1, 2, 3, 0), 99, float(OUT[1, 2, 3, 0]))
    (row, _) = rows_of(lambda sample: {"out_sample": sample})
    assert (row.worst, row.relative_rms, row.sqnr_db) == (None, 0, None)


def test_one_bad_row_of_many_fails():
    good = rows_of(lambda sample: {"out_sample": sample})
    (bad, _) = rows_of(lambda sample: {"out_sample": sample * 1.01})
    assert check_components("onnx", [*good, bad, *good]).verdict == "fail"


def test_each_network_is_held_against_its_own_limit():
    unet, vae = (
        row.model_copy(update={"component": name, "limit": limit.limit, "relative_rms": COMPONENT.limit * 1.5})
        for (row, _), name, limit in (
            (rows_of(lambda sample: {"out_sample": sample}), "unet", COMPONENT),
            (rows_of(lambda sample: {"out_sample": sample}), "vae_decoder", VAE),
        )
    )
    assert check_components("onnx", [vae]).verdict == "pass"
    assert check_components("onnx", [vae, unet]).verdict == "fail"
    assert check_components("onnx", [vae, unet]).limit == COMPONENT.limit


def test_memory_is_no_finding():
    def short(sample):
        raise MemoryError

    with pytest.raises(MemoryError):
        rows_of(short)


STEPS, TRIALS = 5, 6
BASE_STEPS, BASE_FINAL = torch.full((STEPS, TRIALS), 0.1), torch.full((TRIALS,), 0.5)


def erased(steps, final):
    return {it.name: it.verdict for it in check_erased("onnx", torch.as_tensor(steps), BASE_STEPS, final, BASE_FINAL)}


def test_the_verdict_on_what_was_erased():
    near = erased(BASE_STEPS * 0.04, BASE_FINAL * 0.04)
    assert set(near.values()) == {"pass"}
    assert list(near) == ["step-parity", "step-parity-worst-prompt", "final-parity", "final-parity-worst-prompt"]
    assert set(erased(BASE_STEPS * 0.06, BASE_FINAL * 0.06).values()) == {"fail"}
    assert set(erased(BASE_STEPS, BASE_FINAL).values()) == {"fail"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_everywhere(value):
    steps, final = torch.zeros(STEPS, TRIALS), torch.zeros(TRIALS)
    steps[2, 3], final[3] = value, value
    assert set(erased(steps, final).values()) == {"fail"}
    assert {it.verdict for it in check_kept("onnx", steps, final)} == {"fail"}


def test_one_step_and_one_prompt_are_enough_to_fail():
    steps = torch.zeros(STEPS, TRIALS)
    steps[3] = 0.006
    found = erased(steps, torch.zeros(TRIALS))
    assert (found["step-parity"], found["final-parity"]) == ("fail", "pass")
    steps, final = torch.zeros(STEPS, TRIALS), torch.zeros(TRIALS)
    steps[1, 1], final[4] = 0.008, 0.04
    assert erased(steps, final) == {
        "step-parity": "pass", "step-parity-worst-prompt": "fail",
        "final-parity": "pass", "final-parity-worst-prompt": "fail",
    }  # fmt: skip


def test_where_the_base_is_near_only_rounding_is_granted():
    near_base = torch.full((STEPS, TRIALS), 1e-6)
    within_rounding = check_erased("onnx", near_base * 50, near_base, near_base[0], near_base[0])
    assert {it.verdict for it in within_rounding} == {"pass"}
    beyond = check_erased("onnx", torch.full_like(near_base, STEP.limit * 1.1), near_base, near_base[0], near_base[0])
    assert {it.name for it in beyond if it.verdict == "fail"} == {"step-parity", "step-parity-worst-prompt"}


def test_kept_prompts_are_at_rounding_level():
    steps, final = torch.full((STEPS, TRIALS), STEP.limit * 0.9), torch.full((TRIALS,), DRIFT.limit * 0.9)
    assert [it.verdict for it in check_kept("onnx", steps, final)] == ["pass", "pass"]
    assert [it.verdict for it in check_kept("onnx", steps * 1.2, final)] == ["fail", "pass"]
    assert [it.verdict for it in check_kept("onnx", steps, final * 1.2)] == ["pass", "fail"]


CONCEPTS = ["star", "striped"] * 3


def edit(base_steps=BASE_STEPS, base_final=BASE_FINAL):
    return check_edit(CONCEPTS, base_steps, base_final, CONCEPTS)


def test_an_edit_that_is_seen_on_every_concept_passes():
    assert edit().verdict == "pass"
    assert edit().measured == 0.5


@pytest.mark.parametrize(
    "changed",
    [
        {"base_final": torch.zeros(TRIALS)},
        {"base_steps": torch.zeros(STEPS, TRIALS)},
        # One of the two concepts is not erased at all.
        {"base_final": torch.tensor([0.5, 0.0] * 3)},
        {"base_steps": torch.tensor([0.1, 0.0] * 3).repeat(STEPS, 1)},
        # One prompt in three moves far, so their mean does.
        {"base_final": torch.tensor([5.0, 5.0, 0.01, 0.01, 0.01, 0.01])},
        {"base_final": torch.full((TRIALS,), math.nan)},
        {"base_final": torch.full((TRIALS,), math.inf)},
        {"base_steps": torch.full((STEPS, TRIALS), math.inf)},
    ],
)
def test_where_the_edit_does_nothing_nothing_is_judged(changed):
    check = edit(**changed)
    assert check.verdict == "unjudged"
    assert "to prove anything" in check.summary


def seen(base: int, reference: int, concept: str = "star") -> tuple[Detection, Detection]:
    verdicts = ((model, [it < count for it in range(4)]) for model, count in (("base", base), ("reference", reference)))
    first, second = (detection(concept, "erased", model, found) for model, found in verdicts)
    return first, second


@pytest.mark.parametrize(
    ("base", "reference", "verdict"),
    [(4, 0, "pass"), (4, 3, "pass"), (4, 4, "unjudged"), (2, 3, "unjudged"), (0, 0, "unjudged")],
)
def test_an_edit_after_which_the_detector_sees_the_concept_as_often_is_not_judged(base, reference, verdict):
    check = check_edit(CONCEPTS, BASE_STEPS, BASE_FINAL, CONCEPTS, [seen(4, 0, "striped"), seen(base, reference)])
    assert check.verdict == verdict
    told = f"sees 'star' in {reference} of 4 pictures of the reference and in {base} of the base's" in check.summary
    assert told == (verdict == "unjudged")


def test_where_the_base_is_far_enough_the_base_itself_would_fail():
    assert PARITY.limit * FAR_STEP.limit > STEP.limit
    assert PARITY.limit * FAR.limit > DRIFT.limit
    final, steps = (
        torch.full(shape, far.limit).double() * 1.01 for shape, far in (((TRIALS,), FAR), ((STEPS, TRIALS), FAR_STEP))
    )
    assert check_edit(CONCEPTS, steps, final, CONCEPTS).verdict == "pass"
    assert {it.verdict for it in check_erased("onnx", steps, steps, final, final)} == {"fail"}


def picture(**changed):
    given = {"file": "pictures/1-onnx.png", "psnr_db": 80.0, "ssim": 1.0, "max_difference": 1, "problem": None}
    return Drawn(**{**given, "seen": None, **changed})


GOOD = [picture(), picture(psnr_db=None, max_difference=0)]


def test_pictures_like_the_reference_s_pass():
    check = check_pictures("onnx", GOOD, GOOD, (2, 2))
    assert (check.verdict, check.measured) == ("pass", 80)
    assert check_pictures("onnx", GOOD[1:], GOOD[1:], (1, 1)).verdict == "pass"


@pytest.mark.parametrize(
    ("odd", "distinct", "said"),
    [
        ({"psnr_db": 47.0}, (2, 2), "47.0 dB"),
        ({"problem": "one colour all over"}, (2, 2), "one colour"),
        ({}, (1, 2), "1 different pictures among 2"),
    ],
)
def test_other_pictures_fail(odd, distinct, said):
    check = check_pictures("onnx", [GOOD[1], picture(**odd)], GOOD, distinct)
    assert check.verdict == "fail"
    assert said in check.summary


def test_what_the_reference_draws_badly_is_not_the_artifact_s_fault():
    flat = [picture(problem="one colour all over")]
    assert check_pictures("onnx", flat, flat, (1, 1)).verdict == "pass"


def test_a_detector_that_disagrees():
    assert check_detector("onnx", [True] * 99 + [False], [True] * 100).verdict == "pass"
    assert check_detector("onnx", [True, False], [False, True]).verdict == "fail"


@pytest.mark.parametrize("measured", [None, math.nan, math.inf, 1.01])
def test_within(measured):
    assert within("it", None, measured, 1, "It is").verdict == "fail"
    assert within("it", None, 1.0, 1, "It is").verdict == "pass"


def test_a_curve_is_over_the_prompts():
    made = curve("onnx", "kept", torch.tensor([[3.0, 4.0], [0.0, math.inf]]), forced=True)
    assert made.relative_rms == (pytest.approx(math.sqrt(12.5)), None)


def test_a_picture_is_compared_as_it_is_in_the_file():
    grey = torch.full((16, 16, 3), 0.5).numpy()
    lighter = png_from_floats(grey + 10 / 255)
    found = drawn("pictures/1-onnx.png", lighter, None, "star", png_from_floats(grey))
    assert (found.max_difference, found.seen) == (10, "star")
    assert found.psnr_db == pytest.approx(20 * math.log10(25.5))
    own = drawn("pictures/1-reference.png", lighter, None, None, None)
    assert own.psnr_db is own.ssim is own.max_difference is None


def test_memory_is_recognised_behind_another_error():
    failed = ValueError("it failed")
    failed.__cause__ = RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer")
    assert is_out_of_memory(failed)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("a shape is wrong"))
    assert not is_out_of_memory(None)
    assert not is_out_of_memory(FileNotFoundError("allocation-study/unet/model.onnx is missing"))


def test_a_reason_is_one_printable_line():
    assert reason(ValueError("one\x1b[31m\ntwo")) == "ValueError: one [31m"
    assert reason(InputError("unet lacks a file; mend it")) == "unet lacks a file; mend it"


def test_every_limit_has_its_reason_and_its_name_once():
    assert len({it.name for it in TABLE}) == len(TABLE)
    assert all(it.reason.endswith(".") and it.limit > 0 for it in TABLE)
