"""A sparse autoencoder and its file: safetensors with JSON in the header.

    z = relu(topk(E (n(x) - c) + e, k)),   x̂ = s(x) (D z + c) + t(x),   n(x) = (x - t(x)) / s(x)

(SNCE, He et al., Eq. 1-2; TopK: Gao et al., 2024, "Scaling and evaluating sparse autoencoders".) The norms n are those
of `bakeout.editor.edit.SteerLatents`. A ReLU autoencoder is one whose k is all of its latents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.edit import SITE_NAME, InputNorm
from bakeout.editor.errors import InputError

FORMAT_VERSION = 1
_METADATA_KEY = "bakeout.sae"
# The name of each field's tensor in the file.
_NAMES = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "center": "b_pre"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EPSILON = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """A TopK or ReLU autoencoder of one site's activations.

    Attributes:
        encoder: float [m, d], E (W_enc).
        encoder_bias: float [m], e (b_enc).
        decoder: float [d, m], D (W_dec).
        center: float [d], c (b_pre).
        k: how many latents of a token are not zero at most; m for ReLU.
        activation: `topk` or `relu`.
        input_norm: n.
        site: the site whose output it reads, as `bakeout.editor.sites` names it: text_encoder.layer.9.
        source_format: `bakeout`, or from which format it was imported.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    center: Tensor
    k: int
    activation: Literal["topk", "relu"]
    input_norm: InputNorm
    site: str
    source_format: str = "bakeout"

    def __post_init__(self) -> None:
        if self.encoder.ndim != 2:
            raise ValueError(f"W_enc is {list(self.encoder.shape)}, not [m, d]")
        latents, width = self.encoder.shape
        shapes = {"encoder_bias": (latents,), "decoder": (width, latents), "center": (width,)}
        for name, shape in {"encoder": (latents, width), **shapes}.items():
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{_NAMES[name]} is {list(tensor.shape)}, not {list(shape)}")
            if tensor.dtype not in _DTYPES or not tensor.numel() or not tensor.isfinite().all():
                raise ValueError(f"{_NAMES[name]} is not finite floating point")
        if type(self.k) is not int or not 1 <= self.k <= latents or (self.activation == "relu") > (self.k == latents):
            raise ValueError(f"k is {self.k!a:.20}: it must be a whole number from 1 to {latents}, and that for ReLU")
        if self.activation not in ("topk", "relu") or self.input_norm not in get_args(InputNorm):
            raise ValueError("its activation or the norm of its input is not known")
        if not (isinstance(self.site, str) and SITE_NAME.fullmatch(self.site)):
            raise ValueError(f"{self.site!a:.100} is not the name of a site")
        if not (isinstance(self.source_format, str) and self.source_format.isidentifier()):
            raise ValueError(f"{self.source_format!a:.100} is not the name of a format")

    @property
    def width(self) -> int:
        """d, of what it reads."""
        return self.encoder.shape[1]

    @property
    def latents(self) -> int:
        """m, the number of its neurons."""
        return len(self.encoder)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it computes: its tensors in fp32, k and the norm; not of where it comes from."""
        total = hashlib.sha256(json.dumps([self.k, self.input_norm]).encode())
        for name in _NAMES:
            tensor: Tensor = getattr(self, name)
            total.update(f"{name} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return total.hexdigest()

    def to(self, *args: Any, **kwargs: Any) -> SparseAutoencoder:
        """On another device or in another dtype, as `torch.Tensor.to` takes them."""
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in _NAMES})

    def norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """t(x) and s(x) of activations [..., d]: each [..., 1]."""
        if self.input_norm == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + _EPSILON
        zero = torch.zeros_like(x[..., :1])
        if self.input_norm == "constant_norm":
            return zero, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return zero, zero + 1

    def preactivations(self, x: Tensor) -> Tensor:
        """E (n(x) - c) + e of activations [..., d]: [..., m]."""
        shift, scale = self.norm(x)
        normed = x if self.input_norm == "none" else (x - shift) / scale
        return F.linear(normed - self.center, self.encoder, self.encoder_bias)

    def encode(self, x: Tensor) -> Tensor:
        """The latents z of activations [..., d], of which at most k a token are not zero: [..., m].

        Of equal preactivations that of the lower index counts as the larger, on any device.
        """
        return keep_largest(self.preactivations(x), self.k).relu()

    def decode(self, z: Tensor) -> Tensor:
        """D z + c, which is n(x̂), of latents [..., m]: [..., d]."""
        return F.linear(z, self.decoder, self.center)

    def reconstruct(self, x: Tensor) -> Tensor:
        """x̂ of activations [..., d], of the same shape."""
        shift, scale = self.norm(x)
        return self.decode(self.encode(x)) * scale + shift

    def save(self, path: Path) -> None:
        """Write the autoencoder to a file; the same one gives the same bytes. Raises OSError."""
        path.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content: tensors W_enc, b_enc, W_dec and b_pre, everything else as JSON in the metadata."""
        from safetensors.torch import save

        tensors = {
            name: getattr(self, field).detach().cpu().clone(memory_format=torch.contiguous_format)
            for field, name in _NAMES.items()
        }
        said = {
            "version": FORMAT_VERSION, "k": self.k, "activation": self.activation, "input_norm": self.input_norm,
            "site": self.site, "source_format": self.source_format,
        }  # fmt: skip
        return save(tensors, metadata={_METADATA_KEY: json.dumps(said, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> SparseAutoencoder:
        """Read what `save` wrote, as it is stored. Raises InputError for any other file, and for a newer version."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        header = read_header(path)
        text = header.metadata.get(_METADATA_KEY)
        if text is None:
            raise InputError(
                f"{path} is no sparse autoencoder of bakeout; bring one from elsewhere in with `bakeout sae import`"
            )
        try:
            said = json.loads(text)
            version = said.pop("version")
            if type(version) is not int or version != FORMAT_VERSION:
                raise InputError(
                    f"{path} is of version {version!a:.20} and this bakeout reads {FORMAT_VERSION}; install the "
                    "bakeout that wrote it"
                )
            if header.tensors.keys() != set(_NAMES.values()):
                raise ValueError("its tensors are others")
            stored = load_file(path)
            fields: dict[str, Any] = {field: stored[name] for field, name in _NAMES.items()}
            return cls(**fields, **said)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            fault = str(error).partition("\n")[0]
            raise InputError(
                f"{path} is not a whole sparse autoencoder ({type(error).__name__}: {fault:.200}); take it from its "
                "source again"
            ) from None

    def __repr__(self) -> str:
        kind = f"TopK {self.k}" if self.activation == "topk" else "ReLU"
        return f"SparseAutoencoder {self.site}: {self.width} → {self.latents:,}, {kind}"


def keep_largest(values: Tensor, k: int) -> Tensor:
    """The k largest of the last dimension, the rest zero; of equal ones that of the lower index is the larger."""
    if k == values.shape[-1]:
        return values
    least = values.topk(k, dim=-1).values[..., -1:]
    larger, equal = values > least, values == least
    room = k - larger.sum(-1, keepdim=True)
    return values.where(larger | (equal & (equal.cumsum(-1) <= room)), 0.0)


@dataclass(frozen=True)
class Fidelity:
    """How well an autoencoder tells what it was given.

    Attributes:
        variance_explained: 1 - sum ‖x - x̂‖² / sum ‖x - mean‖², over all tokens and features; 1 is exact.
        l0: latents above zero, mean over tokens.
        dead_share: latents that were above zero at no token.
        tokens: how many were given.
    """

    variance_explained: float
    l0: float
    dead_share: float
    tokens: int


def fidelity(autoencoder: SparseAutoencoder, activations: Tensor, batch: int = 4096) -> Fidelity:
    """Measure `autoencoder` on activations [tokens, d], `batch` tokens at a time; sums are fp64.

    Raises:
        ValueError: fewer than two tokens, or all of them equal.
    """
    tokens = len(activations)
    mean = activations.double().mean(0)
    error = spread = active = 0.0
    alive = torch.zeros(autoencoder.latents, dtype=torch.bool, device=activations.device)
    for x in torch.split(activations, batch):
        z = autoencoder.encode(x)
        shift, scale = autoencoder.norm(x)
        error += float((autoencoder.decode(z) * scale + shift - x).double().square().sum())
        spread += float((x.double() - mean).square().sum())
        active += float((z > 0).sum())
        alive |= (z > 0).any(0)
    if not spread:
        raise ValueError("the activations do not vary")
    return Fidelity(1 - error / spread, active / tokens, float((~alive).double().mean()), tokens)
