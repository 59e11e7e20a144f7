"""Make the engines of a folder of ONNX graphs, or check without TensorRT that they can be made.

model_index.json  scheduler/  tokenizer/  [tokenizer_2/]
text_encoder|[text_encoder_2]|unet|vae_encoder|vae_decoder/{config.json,model.engine}
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bakeout.export.checkpoint import sync_files
from bakeout.export.manifest import Engine, Shapes
from bakeout.export.precision import cast_file
from bakeout.export.tensorrt.build import build
from bakeout.export.tensorrt.dense import write_out
from bakeout.export.tensorrt.engine import ENGINE
from bakeout.export.tensorrt.parity import parity
from bakeout.export.tensorrt.preflight import check
from bakeout.export.tensorrt.shapes import profile_of

GRAPH: Final = "model.onnx"
# In the order in which a picture needs them.
GRAPHS: Final = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")


def check_graphs(
    source: Path,
    scratch: Path,
    precision: str,
    shapes: Shapes,
    progress: Callable[[float], object] | None = None,
    started: Callable[[str], object] | None = None,
) -> None:
    """Cast every graph and check it against what TensorRT's parser reads, which needs neither TensorRT nor a GPU.

    Args:
        source: the fp32 graphs, in the directory contract.
        scratch: a folder for one cast graph at a time.
        precision: of the engines.
        shapes: of the pictures.
        progress: called with the part, of one for the whole, that was just done.
        started: called with the name of each graph.

    Raises:
        InputError: a graph has what cannot be cast, or what TensorRT does not take.
    """
    for graph, part in _graphs(source, started):
        with _cast(source, graph, scratch, precision) as path:
            check(path, profile_of(source, graph, shapes), f"the graph of {graph}")
        if progress is not None:
            progress(part)


def write_engines(
    source: Path,
    folder: Path,
    scratch: Path,
    precision: str,
    shapes: Shapes,
    device: str,
    progress: Callable[[float], object] | None = None,
    started: Callable[[str], object] | None = None,
) -> dict[str, Engine]:
    """Write the engine of every graph, with scheduler, tokenizers and configurations, all flushed to the disk.

    An engine is judged as it ships: its layers compute in the precision asked for, operators of ours are our kernels,
    and it gives what the fp32 graph gives on a CPU.

    Args:
        source: as for `check_graphs`.
        folder: is made; must not exist.
        scratch: as for `check_graphs`.
        precision: of the engines.
        shapes: of the pictures.
        device: of PyTorch: the GPU on which, and for whose kind, the engines are made.
        progress: called with the part, of one for the whole, that was just done.
        started: called with the name of each graph.

    Returns:
        What there is to know of each engine, by graph.

    Raises:
        InputError: as `check_graphs`; TensorRT or a GPU is missing, cannot build an engine, or built another one than
            was asked for.
    """
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in GRAPHS:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    engines = {}
    for graph, part in _graphs(source, started):
        home = folder / graph
        home.mkdir()
        shutil.copyfile(source / graph / "config.json", home / "config.json")
        profile, plan = profile_of(source, graph, shapes), home / ENGINE
        with _cast(source, graph, scratch, precision) as path:
            check(path, profile, f"the graph of {graph}")
            built = build(
                path, plan, graph=graph, precision=precision, profile=profile, device=device,
                progress=None if progress is None else partial(_part_of, progress, part),
            )  # fmt: skip
        error = parity(plan, source / graph / GRAPH, graph=graph, precision=precision, profile=profile, device=device)
        engines[graph] = Engine(
            key=built.key, layers=built.layers, plugins=built.plugins, doubt=ascii(built.doubt)[1:-1][:300], error=error
        )
    sync_files(folder)
    return engines


def _part_of(progress: Callable[[float], object], part: float, done: float) -> None:
    progress(done * part)


def _graphs(source: Path, started: Callable[[str], object] | None) -> Iterator[tuple[str, float]]:
    """The names of the graphs, each with the part of the work that it is: that of its weights."""
    sizes = {
        graph: sum(path.stat().st_size for path in (source / graph).iterdir())
        for graph in GRAPHS
        if (source / graph / GRAPH).is_file()
    }
    for graph, size in sizes.items():
        if started is not None:
            started(graph)
        yield graph, size / sum(sizes.values())


@contextmanager
def _cast(source: Path, graph: str, scratch: Path, precision: str) -> Iterator[Path]:
    with TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / graph / GRAPH
        path.parent.mkdir()
        cast_file(source / graph / GRAPH, path, precision, graph, then=write_out)
        yield path
