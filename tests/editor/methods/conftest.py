"""A pipeline to calibrate on, and how much of it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bakeout.editor.model import Model, open_model


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> tuple[Model, Any]:
    """The tiny model in fp64: two derivations round apart by far less than any two numbers that are compared."""
    model = open_model(tiny_model)
    return model, model.pipeline("cpu", torch.float64)


@contextmanager
def rows_of_calls(pipeline: Any) -> Iterator[list[int]]:
    """The rows of each call of a pipeline's UNet in the block, as they are made."""
    rows: list[int] = []
    with pipeline.unet.register_forward_hook(lambda _, inputs, _output: rows.append(len(inputs[0]))):
        yield rows


@pytest.fixture(scope="session")
def unet_rows() -> Callable[[Any], AbstractContextManager[list[int]]]:
    """`rows_of_calls`."""
    return rows_of_calls
