"""The training loop: it learns, it resumes exactly, and it averages."""

import json

import pytest
import torch
from torch import nn

from bakeout.builtin.shapes.fitting import fit

TRUTH = torch.tensor([[1.0, -2.0, 3.0]])


def line(run, steps, stop_at=None, **options):
    """A linear layer fitted to TRUTH; raises KeyboardInterrupt before step `stop_at`."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1, bias=False)

    def loss_step(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=generator)
        loss = (network(x) - x @ TRUTH.T).square().mean()
        return loss, {"x": x.mean().item()}

    fit("line", run, nn.ModuleDict({"line": network}), loss_step, steps=steps, rate=0.1, save_every=10, **options)
    return network.weight.detach()


def log(run):
    return [json.loads(text) for text in (run / "line.jsonl").read_text().splitlines()]


def test_it_learns_and_logs(tmp_path):
    weight = line(tmp_path, 300, log_every=100)
    assert (weight - TRUTH).norm() < 0.05 * TRUTH.norm()
    entries = log(tmp_path)
    assert [entry["step"] for entry in entries] == [100, 200, 300]
    assert entries[-1]["loss"] < 0.01 * entries[0]["loss"]


@pytest.mark.parametrize("average", [None, 0.9])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, average):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = line(whole, 60, average=average)
    with pytest.raises(KeyboardInterrupt):
        line(broken, 60, stop_at=37, average=average)
    assert not list(broken.glob("*.new"))
    assert torch.equal(line(broken, 60, average=average), expected)


def test_the_average_is_what_is_returned(tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    plain.mkdir()
    averaged.mkdir()
    assert not torch.equal(line(plain, 20), line(averaged, 20, average=0.999))


def test_judging_changes_nothing_and_sees_the_average(tmp_path):
    judged, blind = tmp_path / "judged", tmp_path / "blind"
    judged.mkdir()
    blind.mkdir()
    seen = []

    def judge(networks):
        assert not networks.training
        seen.append(networks["line"].weight.detach().clone())
        return {"judged": 1.0}

    weight = line(judged, 20, average=0.9, judge=judge, judge_every=20)
    assert torch.equal(weight, line(blind, 20, average=0.9))
    assert torch.equal(seen[-1], weight)
    assert log(judged)[-1] == {"step": 20, "judged": 1.0}
