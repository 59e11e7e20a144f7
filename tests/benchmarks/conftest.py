"""The benchmarks are programs beside each other, each of which finds the others in its own folder."""

import sys
from pathlib import Path

import pytest
import torch

# Last, so that none of them stands for a library of its name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Inputs are random, and the same in every run."""
    torch.manual_seed(0)
