import pytest

from bakeout.intervals import exact_interval
from bakeout.validate.stats import detection, disagreements


def tail(successes, trials, share):
    """P(X <= successes) of a binomial variable, term by term."""
    from math import comb

    return sum(comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes + 1))


@pytest.mark.parametrize(("successes", "trials"), [(1, 12), (5, 24), (150, 300)])
def test_the_bounds_are_where_the_tails_have_half_of_the_rest(successes, trials):
    low, high = exact_interval(successes, trials, 0.95)
    assert tail(successes, trials, high) == pytest.approx(0.025)
    assert 1 - tail(successes - 1, trials, low) == pytest.approx(0.025)


def test_nothing_detected_is_no_proof_of_nothing():
    assert exact_interval(0, 12, 0.95) == (0, pytest.approx(1 - 0.025 ** (1 / 12)))
    assert exact_interval(12, 12, 0.95)[1] == 1
    # What 300 pictures of a release prove: at most 1 % with 95 % confidence, asked from one side.
    assert exact_interval(0, 300, 0.9)[1] < 0.01 < exact_interval(0, 297, 0.9)[1]


def test_a_detection_has_its_interval():
    found = detection("star", "erased", "onnx", [True, False, False])
    assert (found.detected, found.pictures, found.confidence) == (1, 3, 0.95)
    assert (found.low, found.high) == exact_interval(1, 3, 0.95)


def test_equal_shares_may_disagree_everywhere():
    assert disagreements([True, False], [False, True]) == 2
    assert disagreements([True, False], [True, False]) == 0
