"""The check of a kernel passes a right one, and none that is wrong in any of the ways in which kernels are."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import ModuleType

import kernel_checks
import pytest
import torch
from torch.nn import functional as F

from bakeout.kernels import ops, reference
from bakeout.kernels.packing import unpack_mask

CPU = torch.device("cpu")


def exact(proj, mask, value):
    """The definition with one rounding, as the kernels have it."""
    return reference.masked_geglu(proj.double(), mask, value.double()).to(proj.dtype)


def halves_swapped(proj, mask, value):
    return exact(torch.cat(proj.chunk(2, -1)[::-1], -1), mask, value)


def not_patched(proj, mask, value):
    return exact(proj, torch.zeros_like(mask), value)


def patched_by_neighbours(proj, mask, value):
    bits = mask if mask.dtype == torch.bool else unpack_mask(mask, value.shape[-1])
    return exact(proj, bits.roll(1, -1), value)


def by_products(proj, mask, value):
    """What would be right for finite numbers: M v + (1 - M) x."""
    bits = (mask if mask.dtype == torch.bool else unpack_mask(mask, value.shape[-1])).to(proj.dtype)
    a, g = proj.chunk(2, -1)
    return bits * value + (1 - bits) * (a * F.gelu(g))


def tanh(proj, mask, value):
    a, g = proj.double().chunk(2, -1)
    bits = mask if mask.dtype == torch.bool else unpack_mask(mask, value.shape[-1])
    return torch.where(bits, value, a * F.gelu(g, approximate="tanh")).to(proj.dtype)


def last_token_left_out(proj, mask, value):
    out = torch.empty(*proj.shape[:-1], value.shape[-1], dtype=proj.dtype)
    out[:, :-1] = exact(proj, mask, value)[:, :-1]
    return out


@pytest.fixture
def errors(monkeypatch):
    """What the check finds of a kernel, over the small odd sizes."""
    monkeypatch.setattr(kernel_checks, "ODD", ((64, 1, 1, 1), (2, 5, 9, 8), (2, 7, 8, 83)))

    def run(kernel, operation="masked_geglu"):
        module = ModuleType("kernel_of_a_test")
        module.__dict__[operation] = kernel
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(ops.KERNELS[operation], "tested", module.__name__)
        return list(kernel_checks.check(operation, "tested", CPU, small=True))

    return run


def test_a_right_kernel_passes(errors):
    found = errors(exact)
    assert len(found) == 3 * len(kernel_checks.DTYPES) * len(kernel_checks.DENSITIES) * len(kernel_checks.FORMS)
    assert all(it["right"] for it in found)
    assert len({it["case"] for it in found}) == len(found)


def test_a_right_linear_passes_and_one_without_its_bias_does_not(errors):
    def linear(x, weight, bias, mask, value):
        bias = None if bias is None else bias.double()
        wide = (x.double(), weight.double(), bias, mask, value.double())
        return reference.masked_geglu_linear(*wide).to(x.dtype)

    assert all(it["right"] for it in errors(linear, "masked_geglu_linear"))
    wrong = errors(lambda x, w, b, mask, value: linear(x, w, None, mask, value), "masked_geglu_linear")
    assert not any(it["right"] for it in wrong if it["density"] < 1 and it["h"] > 1)


@pytest.mark.parametrize(
    "kernel", [halves_swapped, not_patched, patched_by_neighbours, by_products, tanh, last_token_left_out]
)
def test_a_wrong_kernel_does_not_pass(errors, kernel):
    found = [it for it in errors(kernel) if it["h"] > 1 and it["density"] == 0.25]
    # The difference of the two forms of GELU is less than bf16 resolves.
    judged = [it for it in found if kernel is not tanh or it["dtype"] == "float32"]
    assert judged
    assert not any(it["right"] for it in judged)
    json.loads(json.dumps(found, allow_nan=False))


def test_poisoned_memory_is_nan_and_only_for_a_while():
    before = torch.are_deterministic_algorithms_enabled()
    with kernel_checks.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2, dtype=torch.float16).new_empty(4).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def lines(*cases):
    return "".join(json.dumps(it) + "\n" for it in cases)


RIGHT = {"case": "one", "dtype": "float16", "error": 1e-4, "bound": 5e-4, "right": True}
WRONG = {"case": "two", "dtype": "float16", "error": "nan", "bound": 5e-4, "right": False}
WRONG_IN_FP32 = {"case": "three", "dtype": "float32", "error": 1.0, "bound": 1e-6, "right": False}


@pytest.mark.parametrize(
    ("out", "errors", "status", "stop", "wrong"),
    [
        (lines(RIGHT), "", 0, "", 0),
        (lines(RIGHT, WRONG), "", 1, "it is wrong", 1),
        (lines(RIGHT, WRONG_IN_FP32), "", 1, "", 1),
        (lines({"unavailable": "there is no nvcc; install it"}), "", 2, "there is no nvcc; install it", 0),
        ("", "usage: it was called wrongly", 2, "its check ended with status 2: usage: it was called wrongly", 0),
        (lines(RIGHT), "\nillegal address\n\n", -6, "its check ended with status -6: illegal address", 0),
        (lines(RIGHT), "Traceback\nKeyError: 'x'", 1, "its check ended with status 1: KeyError: 'x'", 0),
        (lines(RIGHT, WRONG), "", 0, "its check ended with status 0: it said nothing", 1),
        ("", "", 0, "its check ended with status 0: it said nothing", 0),
        (lines(RIGHT) + '{"case": "cut', "", None, f"its check did not end in {kernel_checks.SECONDS} s", 0),
    ],
)  # fmt: skip
def test_what_a_process_of_a_check_told(out, errors, status, stop, wrong):
    found = kernel_checks.found_in(out, errors, status)
    assert (found.stop, len(found.wrong)) == (stop, wrong)
    assert found.failed == (stop != "there is no nvcc; install it" and bool(stop or wrong))


def test_the_largest_error_is_a_number_and_json_has_it():
    found = kernel_checks.found_in(lines(WRONG, RIGHT), "", 1)
    assert found.worst == {"float16": RIGHT["error"] / RIGHT["bound"]}
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize("kernel", ["triton", "cuda", "nonesuch"])
def test_a_kernel_that_cannot_run_here_is_not_one_that_passed(monkeypatch, capsys, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernel_checks.py", "masked_geglu", kernel, "--small"])
    assert kernel_checks.main() == 2
    assert json.loads(capsys.readouterr().out).keys() == {"unavailable"}
