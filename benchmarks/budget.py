"""The bytes and flops of the fused operations, and what they predict: the tables of docs/kernels.md.

    PYTHONPATH=src python benchmarks/budget.py

Counted are the bytes that must move through device memory, each input read once and each output written once, and the
flops of the products. A launch cannot be faster than either allows. A prediction adds what launches reach of a card's
own copy bandwidth and matrix rate, and what starting and draining one takes; of `masked_geglu_linear` it is the model
by which the kernel chooses its tiles, which reads them from L2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

GROUP = 16  # bytes of values that are read, or not, at a time
HALF = 2  # bytes of an fp16 or bf16 element


@dataclass(frozen=True)
class Shape:
    """The tokens of a transformer block, and the width of its FFN: h = 4d.

    Attributes:
        model: the family that has it, at 512 px, or 1024 px for SDXL.
        batch: pictures, both branches of guidance counted.
        tokens: tokens of a picture; N.
        d: features of a token.
    """

    model: str
    batch: int
    tokens: int
    d: int

    @property
    def h(self) -> int:
        """The features that GEGLU gives."""
        return 4 * self.d

    @property
    def rows(self) -> int:
        """The tokens of the batch."""
        return self.batch * self.tokens

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, N {self.tokens}, d {self.d}"


SHAPES = (
    *(Shape("SD 1.5", 2, n, d) for n, d in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))),
    *(Shape("SD 1.5", 16, n, d) for n, d in ((4096, 320), (1024, 640), (256, 1280))),
    *(Shape("SDXL", 2, n, d) for n, d in ((4096, 640), (1024, 1280))),
)


@dataclass(frozen=True)
class Card:
    """A GPU: bytes a second that a copy moves, read and written; fp16 flops a second of a large product."""

    copy: float
    matmul: float


# What was assumed before anything ran on one.
H100 = Card(copy=3.0e12, matmul=790e12)
MULTIPROCESSORS, CLOCK = 132, 1.7e9  # of an H100; a second


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        bytes: that it moves through device memory.
        flops: of its products.
        tiles: seconds that its tiles take where something else is thought to bound them.
    """

    bytes: float
    flops: float = 0.0
    tiles: float = 0.0


OF_COPY = 0.92  # of the copy's bandwidth, by a kernel of one pass
OF_PRODUCT = 0.80  # of the matrix rate, by the library's Linear
LAUNCH = 1.5e-6  # seconds between one kernel's last store and the next one's full speed


def floor(launches: Sequence[Launch], card: Card) -> float:
    """Seconds below which no machine of the card's rates runs these kernels in turn."""
    return sum(max(it.bytes / card.copy, it.flops / card.matmul) for it in launches)


def predicted(launches: Sequence[Launch], card: Card) -> float:
    """Seconds that these kernels are expected to take in turn."""
    return sum(
        LAUNCH + max(it.bytes / card.copy / OF_COPY, it.flops / card.matmul / OF_PRODUCT, it.tiles) for it in launches
    )


def patch_bytes(shape: Shape, density: float, size: int = HALF) -> float:
    """The packed mask [N, h], and the values of the groups in which a share `density` of random bits sets one."""
    features = GROUP // size
    values = shape.tokens * shape.h / features * (1 - (1 - density) ** features) * GROUP
    return shape.tokens * -(-shape.h // 8) + values


def masked_geglu_bytes(shape: Shape, density: float, size: int = HALF) -> float:
    """What `masked_geglu` moves: both halves in, one out, and the patch, which the batch shares."""
    return 3 * shape.rows * shape.h * size + patch_bytes(shape, density, size)


def linear_bytes(shape: Shape, size: int = HALF) -> int:
    """What FFN-1's Linear reads: x [rows, d], W [2h, d], b [2h]."""
    return (shape.rows * shape.d + 2 * shape.h * shape.d + 2 * shape.h) * size


def masked_geglu_linear_bytes(shape: Shape, density: float, size: int = HALF) -> float:
    """What `masked_geglu_linear` moves: the Linear's inputs and the patch in, h features out."""
    return linear_bytes(shape, size) + shape.rows * shape.h * size + patch_bytes(shape, density, size)


def linear_flops(shape: Shape) -> int:
    """Of x Wᵀ of FFN-1: two for each product of numbers."""
    return 2 * shape.rows * shape.d * 2 * shape.h


def tiles_of_masked_geglu_linear(shape: Shape) -> float:
    """The seconds of its tiles on an H100 in fp16, by the model that chooses them.

    Raises:
        KernelUnavailable: Triton is not there.
    """
    from bakeout.kernels.masked_geglu_linear import clocks, config_for

    sizes = (MULTIPROCESSORS, shape.batch, shape.tokens, shape.h, HALF * shape.d)
    return clocks(config_for("wgmma", *sizes), *sizes) / CLOCK


def versions(shape: Shape, density: float) -> Mapping[str, Sequence[Launch]]:
    """The kernels, in turn, of every way to compute GEGLU and FFN-1 in fp16."""
    out = shape.rows * shape.h * HALF
    where = shape.tokens * shape.h * (HALF + 1)  # the bool mask and all values
    gelu, product, patch = Launch(2 * out), Launch(3 * out), Launch(2 * out + where)
    fused = Launch(masked_geglu_bytes(shape, density))
    linear = Launch(linear_bytes(shape) + 2 * out, linear_flops(shape))
    return {
        "masked_geglu": (fused,),
        "GEGLU, patched, eager": (gelu, product, patch),
        "GEGLU, patched, compiled": (Launch(3 * out + where),),
        "masked_geglu_linear": (
            Launch(masked_geglu_linear_bytes(shape, density), linear_flops(shape), tiles_of_masked_geglu_linear(shape)),
        ),
        "Linear, masked_geglu": (linear, fused),
        "FFN-1, patched, eager": (linear, gelu, product, patch),
        "FFN-1, patched, compiled": (linear, Launch(3 * out + where)),
        "FFN-1, stock, eager": (linear, gelu, product),
        "FFN-1, stock, compiled": (linear, Launch(3 * out)),
    }


def masked_geglu_table(card: Card, density: float) -> list[str]:
    """Per shape: bytes, the floor, and the ratios that are predicted."""
    lines = [
        "| shape | MB | floor, µs | predicted, µs | share of the copy | eager / it | compiled / it |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        ways = versions(shape, density)
        own = predicted(ways["masked_geglu"], card)
        least = floor(ways["masked_geglu"], card)
        ratios = (predicted(ways[f"GEGLU, patched, {how}"], card) / own for how in ("eager", "compiled"))
        megabytes = ways["masked_geglu"][0].bytes / 1e6
        cells = (f"{megabytes:.1f}", f"{1e6 * least:.1f}", f"{1e6 * own:.1f}", f"{least / own:.0%}")
        lines.append(_row(shape, cells, ratios))
    return lines


def masked_geglu_linear_table(card: Card, density: float) -> list[str]:
    """Per shape: flops, bytes with and without the fusion, the floors of both, and the ratios that are predicted."""
    others = {f"FFN-1, {it}": it for it in ("patched, eager", "patched, compiled", "stock, eager", "stock, compiled")}
    others |= {"Linear, masked_geglu": "Linear, masked_geglu"}
    lines = [
        "| shape | GFLOP | MB, stock | MB, fused | floor, stock, µs | floor, fused, µs "
        "| patched, eager / it, at the floors | predicted, fused, µs | "
        + " | ".join(f"{it} / it" for it in others.values())
        + " |",
        "|---" * (8 + len(others)) + "|",
    ]
    for shape in SHAPES:
        ways = versions(shape, density)
        fused, stock = ways["masked_geglu_linear"], ways["FFN-1, stock, eager"]
        own = predicted(fused, card)
        cells = (
            f"{fused[0].flops / 1e9:.1f}",
            *(f"{sum(it.bytes for it in way) / 1e6:.0f}" for way in (stock, fused)),
            *(f"{1e6 * floor(way, card):.0f}" for way in (stock, fused)),
            f"{floor(ways['FFN-1, patched, eager'], card) / floor(fused, card):.2f}",
            f"{1e6 * own:.0f}",
        )
        lines.append(_row(shape, cells, (predicted(ways[it], card) / own for it in others)))
    return lines


def _row(shape: Shape, cells: Sequence[str], ratios: Iterable[float]) -> str:
    return f"| {shape} | {' | '.join((*cells, *(f'{it:.2f}' for it in ratios)))} |"


if __name__ == "__main__":
    print(*masked_geglu_table(H100, 0.01), "", *masked_geglu_linear_table(H100, 0.01), sep="\n")
