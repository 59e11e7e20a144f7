"""What the patched GEGLU costs in ONNX Runtime on a CPU: by the library, by its function body, and without a patch.

    python benchmarks/masked_geglu_cpu.py
    python benchmarks/masked_geglu_cpu.py --rounds 5 --threads 4

A graph has one operator: `MaskedGeglu` with a random mask and random values as constants, at the sizes of the FFNs of
SD 1.5 at 512 px, batch 2; or Split, Gelu and Mul, the plain GEGLU. The three run in turn, --rounds times, and every
round begins with another one. A ratio is that of times in the same round, and what is told is the median with a 95 %
bootstrap interval. The bytes per second are those of proj and output, which have to move, over the library's time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bakeout.kernels.build import library

BATCH = 2
# Tokens and width of the FFNs of each level.
SIZES = ((4096, 1280), (1024, 2560), (256, 5120))
OPSET = 20

Numbers = NDArray[np.float64]


def geglu(out: str) -> list[onnx.NodeProto]:
    """The plain GEGLU of `proj`."""
    return [
        helper.make_node("Split", ["proj"], ["a", "g"], axis=-1, num_outputs=2),
        helper.make_node("Gelu", ["g"], ["gate"]),
        helper.make_node("Mul", ["a", "gate"], [out]),
    ]


def plain(width: int) -> bytes:
    """The graph without a patch."""
    return graph(width, geglu("out"), [], [])


def patched(width: int, mask: NDArray[np.bool_], value: NDArray[np.float32]) -> bytes:
    """The graph with one."""
    names = ["proj", "mask", "value"]
    body = [*geglu("hidden"), helper.make_node("Where", ["mask", "value", "hidden"], ["out"])]
    own = helper.make_function("bakeout", "MaskedGeglu", names, ["out"], body, [helper.make_opsetid("", OPSET)])
    node = helper.make_node("MaskedGeglu", names, ["out"], domain="bakeout")
    constants = [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(value, "value")]
    return graph(width, [node], constants, [own])


def graph(
    width: int,
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    functions: Sequence[onnx.FunctionProto],
) -> bytes:
    """A graph from `proj` [batch, tokens, 2 width] to `out` [batch, tokens, width]."""
    shapes = {"proj": ("batch", "tokens", 2 * width), "out": ("batch", "tokens", width)}
    ends = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    made = helper.make_graph(nodes, "geglu", [ends["proj"]], [ends["out"]], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("bakeout", 1)]
    model = helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=10)
    return bytes(model.SerializeToString())


def call_of(model: bytes, proj: NDArray[np.float32], width: int, threads: int, own: str | None) -> Callable[[], object]:
    """A call of a graph in a session of its own, which writes into the same memory each time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if own is not None:
        options.register_custom_ops_library(own)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    out = np.empty((*proj.shape[:-1], width), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("proj", proj)
    binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), out)


def timed(calls: Sequence[Callable[[], object]], rounds: int) -> Numbers:
    """Seconds of each call in each round [rounds, calls]."""
    seconds = np.empty((rounds + 1, len(calls)))
    for number in range(rounds + 1):
        for place in np.roll(np.arange(len(calls)), number).tolist():
            started = time.perf_counter()
            calls[place]()
            seconds[number, place] = time.perf_counter() - started
    return seconds[1:]  # the first warms up


def told(ratios: Numbers) -> str:
    """The median of the rounds' ratios with its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def row(tokens: int, width: int, share: float, rounds: int, threads: int) -> str:
    """The measurements of one size, as a row of Markdown."""
    generator = np.random.default_rng(0)
    proj = generator.standard_normal((BATCH, tokens, 2 * width), np.float32)
    mask = generator.random((tokens, width)) < share
    value = generator.standard_normal((tokens, width), np.float32)
    edited, own = patched(width, mask, value), str(library("cpu"))
    seconds = timed(
        [
            call_of(edited, proj, width, threads, own),
            call_of(edited, proj, width, threads, None),
            call_of(plain(width), proj, width, threads, None),
        ],
        rounds,
    )
    cells = (f"{tokens} x {width}", told(seconds[:, 0] / seconds[:, 1]), told(seconds[:, 0] / seconds[:, 2]))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.01, help="of the features that are patched")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    given = parser.parse_args()
    head = ("tokens x width", "library / body", "library / unpatched")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for tokens, width in SIZES:
        print(row(tokens, width, given.share, given.rounds, given.threads), flush=True)


if __name__ == "__main__":
    main()
