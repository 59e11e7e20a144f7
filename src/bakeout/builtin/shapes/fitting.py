"""One training loop for every network of `shapes`: seeded by step, resumable, logged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

LossStep = Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, float]]]


def fit(
    name: str,
    run: Path,
    networks: nn.ModuleDict,
    loss_step: LossStep,
    *,
    steps: int,
    rate: float,
    weight_decay: float = 0.01,
    warm_up: int = 100,
    average: float | None = None,
    log_every: int = 50,
    save_every: int = 250,
    judge: Callable[[nn.ModuleDict], Mapping[str, float]] | None = None,
    judge_every: int = 1000,
) -> nn.ModuleDict:
    """Train `networks` for `steps` steps of AdamW on a warm-up and cosine schedule; return them in eval mode.

    `loss_step(step, generator)` gives the loss and numbers to log; everything random must come from the generator,
    which is seeded by the step, so that a run that was interrupted and resumed does what an uninterrupted one would.
    `average` is the decay of an exponential moving average of the weights, which then is what is judged and returned.
    Writes `<run>/<name>.jsonl` (the log) and `<run>/<name>.pt` (the newest checkpoint).
    """
    optimizer = torch.optim.AdamW(networks.parameters(), lr=rate, weight_decay=weight_decay, fused=True)
    averaged = {key: value.detach().clone() for key, value in networks.state_dict().items()} if average else None
    checkpoint = run / f"{name}.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        averaged = state["averaged"]
    generator = torch.Generator()
    started, logged = time.monotonic(), first
    networks.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        generator.manual_seed(step)
        loss, numbers = loss_step(step, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        if averaged is not None and average is not None:
            _average(averaged, networks, min(average, (step + 1) / (step + 10)))
        done = step + 1
        if done % log_every == 0 or done == steps:
            speed = (done - logged) / (time.monotonic() - started)
            _log(run / f"{name}.jsonl", {"step": done, "loss": loss.item(), **numbers, "steps_per_second": speed})
            started, logged = time.monotonic(), done
        if done % save_every == 0 or done == steps:
            _save(
                checkpoint,
                {
                    "step": done,
                    "networks": networks.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                },
            )
        if judge and (done % judge_every == 0 or done == steps):
            kept = {key: value.clone() for key, value in networks.state_dict().items()}
            networks.load_state_dict(averaged or kept)
            networks.eval()
            _log(run / f"{name}.jsonl", {"step": done, **judge(networks)})
            networks.load_state_dict(kept)
            networks.train()
            started, logged = time.monotonic(), done
    if averaged is not None:
        networks.load_state_dict(averaged)
    return networks.eval()


@torch.no_grad()
def _average(averaged: dict[str, Tensor], networks: nn.Module, decay: float) -> None:
    for key, value in networks.state_dict().items():
        if value.is_floating_point():
            averaged[key].lerp_(value, 1 - decay)
        else:
            averaged[key].copy_(value)


def _log(path: Path, entry: Mapping[str, float]) -> None:
    line = json.dumps({key: round(value, 6) for key, value in entry.items()})
    print(path.stem, line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _save(path: Path, state: Mapping[str, object]) -> None:
    temporary = path.with_suffix(".pt.new")
    torch.save(state, temporary)
    temporary.replace(path)
