"""The Edit: what a method found, as static operations at named sites, and nothing about how they will be realised.

At one Linear with weight W [d_out, d_in] and bias b, for input x and output y, the operations mean together

    x' = where(M_in, v_in, x)                                 PatchActivation(at="input")
    y  = b + sum_j W_ij (1 - P_ij) (E_ij e_j + (1 - E_ij) x'_j)    P: PatchWeightInput without value, E, e: with one
    y' = where(M_out, v_out, y)                               PatchActivation(at="output")
    y" = y' + sum of v                                        ShiftActivation, SteerLatents (which read y')

that is: weight edits, then patches, then shifts, and a patch's constants go through the already edited weight. The
methods are of ConceptPrune (Chavhan et al., 2024; pruning: P), ActErase (patches) and SNCE (shifts, latents).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError
from bakeout.editor.records import canonical, decode, digest, encode
from bakeout.editor.sites import Site

FORMAT_VERSION = 1
_METADATA_KEY = "bakeout.edit"
# Of latents and calls; far beyond what any model draws or is trained for.
_MAX_COUNT = 4096
_VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Ours, and nothing that could forge a line of a report.
SITE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Which rows of a batch an operation on a text encoder acts on: all, all but those of an empty prompt, or all but those
# of a negative prompt, which only the eager reference can tell.
Rows = Literal["all", "prompted", "conditional"]
# What a sparse autoencoder does to its input first; see `SteerLatents`.
InputNorm = Literal["none", "layer_norm", "constant_norm"]


class _Operation:
    """What the four records share: equality by value, a digest, and a place in the order of an Edit."""

    site: str
    rank: ClassVar[int]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the record's type, fields, and its tensors' dtypes, shapes and bytes."""
        return digest(self)

    @property
    def touched(self) -> tuple[int, int, str]:
        """How many of how many things the operation changes, and what they are: weights, features, neurons."""
        raise NotImplementedError

    def __repr__(self) -> str:
        count, of, what = self.touched
        return f"{type(self).__name__} {self.site}: {count:,} of {of:,} {what} ({count / max(of, 1):.2%})"


@dataclass(frozen=True, eq=False, repr=False)
class PatchWeightInput(_Operation):
    """What single weights of a Linear see: W ⊙ (1 - M), b + (W ⊙ M) e.

    Attributes:
        site: a site with a weight [d_out, d_in].
        mask: bool [d_out, d_in], M.
        value: float [d_in], e, what the masked weights see in place of the input; None is zero: pruning.
    """

    site: str
    mask: Tensor
    value: Tensor | None = None
    rank: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_site(self.site)
        _check_mask(self.site, self.mask, (2,))
        if self.value is not None:
            _check_value(self.site, self.value, (self.mask.shape[1],))

    @property
    def touched(self) -> tuple[int, int, str]:
        """Weights that no longer see their input."""
        return int(self.mask.sum()), self.mask.numel(), "weights"


@dataclass(frozen=True, eq=False, repr=False)
class PatchActivation(_Operation):
    """Features of a Linear's input or output at a constant: where(M, v, x).

    Patches of one place that hold in the same call and row are one: M is the OR of their masks, v the mean over those
    whose mask holds (ActErase, Eq. 7-8).

    Attributes:
        site: a site with a weight [d_out, d_in].
        at: `input` or `output` of the Linear.
        mask: bool [d] (features, at every token) or [tokens, d] (valid for one number of tokens only), M.
        value: float, as the mask, v; zero wherever the mask is not set, whatever is given there.
        latents: with a mask [tokens, d] in the UNet, the only height and width of latents that it is valid for; None
            says nothing, and no graph can hold it.
        rows: `all`, or `conditional`: those of prompts and not those of negative prompts, which only the eager
            reference can tell.
        calls: of a drawing's calls of the UNet, from 0, the first one in which the patch acts and the first one after
            those, which only the eager reference can tell; None is every call.
    """

    site: str
    at: Literal["input", "output"]
    mask: Tensor
    value: Tensor = field(metadata={"where": "mask"})
    latents: tuple[int, int] | None = None
    rows: Literal["all", "conditional"] = "all"
    calls: tuple[int, int] | None = None
    rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_site(self.site)
        _check(self.site, self.at in ("input", "output"), "a patch is at the input or the output")
        _check_mask(self.site, self.mask, (1, 2))
        _check_value(self.site, self.value, tuple(self.mask.shape))
        object.__setattr__(self, "value", self.value.where(self.mask, 0))
        for name, least in (("latents", 1), ("calls", 0)):
            pair = getattr(self, name)
            if pair is not None:
                whole = len(pair) == 2 and all(type(it) is int and least <= it <= _MAX_COUNT for it in pair)
                _check(self.site, whole, f"{name} are no two whole numbers from {least} to {_MAX_COUNT}")
                # A file gives back a list.
                object.__setattr__(self, name, tuple(pair))
        _check(self.site, self.latents is None or self.mask.ndim == 2, "a mask of features is for latents of any size")
        _check(self.site, self.calls is None or self.calls[0] < self.calls[1], "there are no calls in which it acts")
        _check(self.site, self.rows in ("all", "conditional"), "the rows are neither all nor conditional")

    @property
    def touched(self) -> tuple[int, int, str]:
        """Features (or pairs of token and feature) that are constant now."""
        return int(self.mask.sum()), self.mask.numel(), "features" if self.mask.ndim == 1 else "tokens x features"


@dataclass(frozen=True, eq=False, repr=False)
class ShiftActivation(_Operation):
    """A constant added to a site's output: y + v.

    Shifts of one site add up, but the very same shift given twice counts once, also without a neuron.

    Attributes:
        site: a site of any kind.
        value: float [d_out] or [tokens, d_out], v, with the strength in it.
        rows: `all`; `prompted`: not those of an empty prompt; or `conditional`: not those of a negative prompt.
        neuron: what the shift stands for, as `<SAE's hash>:<neuron>`; of two shifts for one neuron the stronger counts.
        strength: λ, already in `value`.
    """

    site: str
    value: Tensor
    rows: Rows = "all"
    neuron: str = ""
    strength: float = 1.0
    rank: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_site(self.site)
        _check(self.site, self.value.ndim in (1, 2), "a shift is [(n,) d_out]")
        _check_value(self.site, self.value, tuple(self.value.shape))
        _check(self.site, isinstance(self.neuron, str), "the neuron is not a name")
        _check(self.site, type(self.strength) in (int, float), "the strength is not a number")
        _check_rows_and_strength(self.site, self.rows, [self.strength])
        # 1 and 1.0 are one strength and must have one digest.
        object.__setattr__(self, "strength", float(self.strength))

    @property
    def touched(self) -> tuple[int, int, str]:
        """Entries of the shift that are not zero."""
        what = "features" if self.value.ndim == 1 else "tokens x features"
        return int(self.value.count_nonzero()), self.value.numel(), what


@dataclass(frozen=True, eq=False, repr=False)
class SteerLatents(_Operation):
    """Neurons of a TopK sparse autoencoder taken out of a site's output: y - s(y) sum_r λ_r z_r D_:r.

        z = relu(topk(E (n(y) - c) + e, k)),  n(y) = (y - t(y)) / s(y)

    Of equal activations the lower index counts as the larger. The norm n is, with t and s of each token alone: `none`,
    t = 0 and s = 1; `layer_norm`, t = mean(y) and s = std(y) + 1e-5 with d - 1 in the variance; `constant_norm`, t = 0
    and s = ‖y‖ / sqrt(d).

    Attributes:
        site: a site of any kind.
        encoder: float [m, d_out], E (W_enc).
        encoder_bias: float [m], e (b_enc).
        center: float [d_out], c (b_pre).
        k: how many latents of a token are not zero.
        neurons: int64 [r], rising.
        directions: float [d_out, r], D: the neurons' columns of W_dec.
        strengths: float [r], λ.
        rows: as in ShiftActivation.
        input_norm: n.
    """

    site: str
    encoder: Tensor
    encoder_bias: Tensor
    center: Tensor
    k: int
    neurons: Tensor
    directions: Tensor
    strengths: Tensor
    rows: Rows = "all"
    input_norm: InputNorm = "none"
    rank: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_site(self.site)
        _check(self.site, self.encoder.ndim == 2 and self.neurons.ndim == 1, "the encoder is not [m, d] or R not [r]")
        latents, width = self.encoder.shape
        count = len(self.neurons)
        for value, shape in (
            (self.encoder, (latents, width)), (self.encoder_bias, (latents,)), (self.center, (width,)),
            (self.directions, (width, count)), (self.strengths, (count,)),
        ):  # fmt: skip
            _check_value(self.site, value, shape)
        rising = self.neurons.dtype == torch.int64 and bool((self.neurons.diff() > 0).all())
        inside = count > 0 and int(self.neurons.min()) >= 0 and int(self.neurons.max()) < latents
        _check(self.site, rising and inside, f"the neurons are not rising numbers below {latents}")
        k_fits = type(self.k) is int and 1 <= self.k <= latents
        _check(self.site, k_fits, f"k is {self.k!a:.20}: it must be a whole number between 1 and {latents}")
        _check(self.site, self.input_norm in get_args(InputNorm), "there is no such norm of the input")
        _check_rows_and_strength(self.site, self.rows, self.strengths.tolist())

    @property
    def touched(self) -> tuple[int, int, str]:
        """Neurons that are taken out."""
        return len(self.neurons), len(self.encoder), "neurons"


Operation: TypeAlias = PatchWeightInput | PatchActivation | ShiftActivation | SteerLatents
_OPERATIONS: Mapping[str, type[Operation]] = {
    record.__name__: record for record in (PatchWeightInput, PatchActivation, ShiftActivation, SteerLatents)
}


@dataclass(frozen=True)
class Origin:
    """Where operations come from.

    Attributes:
        method: a key of `bakeout.editor.methods.METHODS`.
        concept: what was erased, in the user's words.
        settings: the method's settings as they were used, JSON.
        prompts: SHA-256 of the prompt pairs.
        pairs: how many there were.
    """

    method: str
    concept: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: str = ""
    pairs: int = 0

    def __post_init__(self) -> None:
        texts = (self.method, self.concept, self.prompts)
        if not all(isinstance(text, str) for text in texts) or not self.method.isidentifier():
            raise ValueError("an origin's method, concept and prompts are not texts")
        if not isinstance(self.settings, Mapping) or type(self.pairs) is not int or self.pairs < 0:
            raise ValueError("an origin's settings are not a table, or its pairs not a number")
        # As a file gives them back: a tuple is a list there.
        object.__setattr__(self, "settings", json.loads(canonical(dict(self.settings))))


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What methods found: operations, at most one of a sort at a site (`merge` sees to that), and their origins.

    Both are kept in an order of their own, so that the order in which they were given changes nothing.
    """

    operations: tuple[Operation, ...]
    origins: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        operations = sorted(self.operations, key=lambda it: (_natural(it.site), it.rank, it.digest))
        object.__setattr__(self, "operations", tuple(operations))
        object.__setattr__(self, "origins", tuple(sorted(self.origins, key=lambda it: canonical(vars(it)))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the operations and origins: Edits are equal when their digests are."""
        parts = [*(operation.digest for operation in self.operations), *(canonical(vars(it)) for it in self.origins)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __repr__(self) -> str:
        head = "; ".join(
            f"{it.method} {it.concept!r}" + (f" ({it.pairs} pair{'s' * (it.pairs > 1)})" if it.pairs else "")
            for it in self.origins
        )
        return "\n  ".join([f"Edit[{head}]" if head else "Edit", *map(repr, self.operations)])

    def save(self, path: Path) -> None:
        """Write `to_bytes` to a file. Raises OSError."""
        path.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The Edit as one safetensors file; masks are packed, eight to a byte.

        The same Edit gives the same bytes. What is not tensors is JSON in the file's metadata.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        records = []
        for number, operation in enumerate(self.operations):
            said, own = encode(operation)
            records.append(said)
            # The library refuses tensors that share memory, as one value at several sites does.
            copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}
            tensors |= {f"{number:04}.{name}": tensor for name, tensor in copies.items()}
        said = {"version": FORMAT_VERSION, "operations": records, "origins": [vars(it) for it in self.origins]}
        # One key: the library writes several in an order that changes from run to run.
        return save(tensors, metadata={_METADATA_KEY: canonical(said)})

    @classmethod
    def load(cls, path: Path) -> Edit:
        """Read what `save` wrote. Raises InputError for any other file, and for one of a newer version."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        text = read_header(path).metadata.get(_METADATA_KEY)
        if text is None:
            raise InputError(f"{path} holds no Edit; give the edit.safetensors of an artifact")
        try:
            said = json.loads(text)
            version = said["version"]
            if type(version) is not int or version != FORMAT_VERSION:
                raise InputError(
                    f"{path} is of version {version!a:.20} and this bakeout reads {FORMAT_VERSION}; "
                    "install the bakeout that wrote it"
                )
            tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for name, tensor in load_file(path).items():
                number, _, own_name = name.partition(".")
                tensors[number][own_name] = tensor
            operations = [
                decode(record, tensors.pop(f"{number:04}", {}), _OPERATIONS)
                for number, record in enumerate(said["operations"])
            ]
            if tensors:
                raise ValueError("it has tensors of no operation")
            return cls(tuple(operations), tuple(Origin(**origin) for origin in said["origins"]))
        except InputError:
            raise
        except (
            ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError,
        ) as error:  # fmt: skip
            what = str(error).partition("\n")[0]
            raise InputError(
                f"{path} is not a whole Edit ({type(error).__name__}: {what:.200}); take it from the artifact again"
            ) from None


def check_fits(operation: Operation, site: Site) -> None:
    """Raise InputError if `operation` cannot act on `site`: other widths, no Linear, or no prompts to tell apart."""
    if isinstance(operation, PatchWeightInput | PatchActivation) and site.weight is None:
        raise InputError(f"{site.name} is no Linear, so {type(operation).__name__} cannot act on it; use a site of one")
    given: tuple[int, ...]
    expected: tuple[int, ...] = (site.d_out,)
    if isinstance(operation, PatchWeightInput):
        given, expected = tuple(operation.mask.shape), (site.d_out, site.d_in)
    elif isinstance(operation, PatchActivation):
        given, expected = (operation.mask.shape[-1],), (site.d_in if operation.at == "input" else site.d_out,)
    elif isinstance(operation, ShiftActivation):
        given = (operation.value.shape[-1],)
    else:
        given = (operation.encoder.shape[1],)
    if given != expected:
        raise InputError(
            f"this Edit was made for another model: at {site.name} it has width {_sizes(given)} where the model has "
            f"{_sizes(expected)}; use the model that it was made for"
        )
    tells_rows = site.component.startswith("text_encoder") or isinstance(operation, PatchActivation)
    if getattr(operation, "rows", "all") != "all" and not tells_rows:
        raise InputError(f"{site.name} sees no prompts, so an operation there cannot skip any; use rows = 'all'")


def _sizes(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check(site: str, holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(f"{site!a:.200}: {fault}")


def _check_site(site: str) -> None:
    _check(site, isinstance(site, str) and SITE_NAME.fullmatch(site) is not None, "this is not the name of a site")


def _check_mask(site: str, mask: Tensor, dimensions: tuple[int, ...]) -> None:
    fits = mask.dtype == torch.bool and mask.ndim in dimensions and mask.numel() > 0
    _check(site, fits, f"the mask is not bool of {' or '.join(map(str, dimensions))} dimensions")


def _check_value(site: str, value: Tensor, shape: tuple[int, ...]) -> None:
    _check(site, tuple(value.shape) == shape, f"a value has shape {list(value.shape)}, not {list(shape)}")
    fits = value.dtype in _VALUE_DTYPES and value.numel() > 0 and bool(value.isfinite().all())
    _check(site, fits, "a value is not finite floating point")


def _check_rows_and_strength(site: str, rows: str, strengths: Sequence[float]) -> None:
    _check(site, rows in get_args(Rows), f"the rows are none of {', '.join(get_args(Rows))}")
    _check(site, all(math.isfinite(strength) for strength in strengths), "a strength is not finite")
