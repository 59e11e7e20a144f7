"""A small convolutional network that says what a picture of `shapes` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from bakeout.builtin.shapes.scenes import ATTRIBUTES, SIZE

WEIGHTS = Path(__file__).parent / "detector.safetensors"
_WIDTHS = (16, 32, 48, 64)


class Verdict(dict[str, str]):
    """Attribute -> value; `probabilities` has attribute -> value -> probability."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: dict[str, dict[str, float]] = {}


class Detector(nn.Module):
    """Four strided convolutions and one more, then a linear head an attribute.

    features.{0,3,6,9,12}.weight [16|32|48|64|64, in, 3, 3]; heads.<attribute>.weight [number of values, 64 * 4 * 4].
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out in _WIDTHS:
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            width = out
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width * (SIZE // 16) ** 2, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits [n, number of values] an attribute, of float pictures [n, 3, 64, 64] in -1 .. 1."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def classify(self, pictures: Sequence[Image.Image] | NDArray[np.uint8]) -> list[Verdict]:
        """The likeliest value of each attribute, of RGB images or uint8 [n, 64, 64, 3]; any other size is resized."""
        logits = self(tensor_from_pictures(pictures))
        found: list[Verdict] = [Verdict() for _ in range(len(pictures))]
        for name, values in ATTRIBUTES.items():
            for verdict, row in zip(found, functional.softmax(logits[name].float(), dim=-1), strict=True):
                verdict[name] = values[int(row.argmax())]
                verdict.probabilities[name] = dict(zip(values, row.tolist(), strict=True))
        return found


def tensor_from_pictures(pictures: Sequence[Image.Image] | NDArray[np.uint8]) -> Tensor:
    """Float [n, 3, 64, 64] in -1 .. 1 from RGB images or uint8 [n, 64, 64, 3]."""
    if not isinstance(pictures, np.ndarray):
        resized = [picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
        pictures = np.stack([np.asarray(picture, np.uint8) for picture in resized])
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
        raise ValueError(f"pictures are uint8 [n, {SIZE}, {SIZE}, 3], not {pictures.dtype} {list(pictures.shape)}")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_detector(path: Path = WEIGHTS) -> Detector:
    """The shipped detector, in float32 and in eval mode."""
    from safetensors.torch import load_file

    detector = Detector()
    detector.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return detector.eval()
