"""An engine is built as asked for, once, and only what was asked for is accepted."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from graphs import small_graph
from onnx import TensorProto

from bakeout.editor.errors import InputError
from bakeout.export.precision import cast_file
from bakeout.export.tensorrt import build as building
from bakeout.export.tensorrt import builder, library
from bakeout.export.tensorrt.build import build
from bakeout.export.tensorrt.engine import Engine
from bakeout.export.tensorrt.monitor import Monitor, watched
from bakeout.export.tensorrt.parity import parity

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
PROFILE = {"x": ((1, 4, 8), (2, 4, 8), (4, 4, 8))}
TYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16}


@pytest.fixture
def made(stand_in: Any, tmp_path: Path) -> Any:
    """Builds a small graph; a plan of its own for each call."""
    plans = iter(range(1000))

    def call(precision: str = "fp16", geglu: bool = True, graph: str = "unet", **changed: Any) -> Any:
        path = changed.pop("path", None) or small_graph(tmp_path / precision / "model.onnx", TYPES[precision], geglu)
        plan = tmp_path / f"{next(plans)}.engine"
        given = {"profile": PROFILE, "device": "cuda", "graph": graph, "precision": precision} | changed
        built = build(path, plan, **given)
        return SimpleNamespace(built=built, plan=plan, path=path, world=stand_in.world)

    return call


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_is_built_and_computes(made, tmp_path, precision, geglu):
    done = made(precision, geglu)
    assert re.fullmatch("[0-9a-f]{64}", done.built.key)
    assert (done.built.layers, done.built.plugins, done.built.from_cache) == (4 if geglu else 3, int(geglu), False)
    (tmp_path / "fp32/config.json").parent.mkdir(exist_ok=True)
    (tmp_path / "fp32/config.json").write_text("{}")
    wide = small_graph(tmp_path / "fp32" / "model.onnx", FP32, geglu)
    error = parity(done.plan, wide, graph="unet", precision=precision, profile=PROFILE, device="cuda")
    assert (error == 0) is (precision == "fp32")
    assert Engine(done.plan, "cuda").run({"x": torch.ones(3, 4, 8)})["y"].shape == (3, 4, 8)


def test_the_builder_is_told_what_is_wanted(made):
    done = made("fp16", graph="unet")
    config, trt = done.world.config, library.tensorrt()
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level == 3
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert not config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert 2**28 < config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) < 23_000_000_000
    assert [profile.shapes for profile in config._profiles] == [{"x": list(PROFILE["x"])}]


@pytest.mark.parametrize(
    ("precision", "graph", "tf32"),
    [("fp32", "vae_decoder", False), ("fp16", "vae_decoder", True), ("bf16", "vae_encoder", True),
     ("fp16", "text_encoder", False)],
)  # fmt: skip
def test_only_a_vae_beside_less_precise_networks_computes_in_tf32(made, precision, graph, tf32):
    config = made(precision, False, graph=graph).world.config
    assert config.get_flag(library.tensorrt().BuilderFlag.TF32) is tf32


def test_the_second_time_the_engine_comes_from_the_cache(made):
    first, second = made(), made()
    assert first.world.builds == 1
    assert (second.built.from_cache, second.built.key) == (True, first.built.key)
    assert second.plan.read_bytes() == first.plan.read_bytes()


@pytest.mark.claim("an engine comes from the cache only where all that it depends on is the same")
@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bf16"},
        {"geglu": False},
        {"profile": {"x": ((1, 4, 8), (3, 4, 8), (4, 4, 8))}},
        {"graph": "vae_decoder"},
        {"gpu": "NVIDIA Other"},
        {"version": "11.4.1"},
        {"driver": "581.1"},
        {"capability": (9, 0)},
        {"ptx": "another kernel"},
        {"bakeout": "99"},
    ],
)
def test_whatever_an_engine_depends_on_makes_another_key(made, monkeypatch, changed):
    first, changed = made(), dict(changed)
    world = first.world
    facts = {name: changed.pop(name) for name in ("driver", "capability") if name in changed}
    if facts:
        real = library._read
        monkeypatch.setattr(library, "_read", lambda at: building.Gpu(**(vars(real(at)) | facts)))
    if "gpu" in changed:
        world.gpu = changed.pop("gpu")
    if "version" in changed:
        world.version = changed.pop("version")
        monkeypatch.setattr(library.tensorrt(), "__version__", world.version)
    if "ptx" in changed:
        code = SimpleNamespace(ptx=changed.pop("ptx"))
        monkeypatch.setattr(building.aot, "compiled", lambda _: code)
    if "bakeout" in changed:
        told = changed.pop("bakeout")
        monkeypatch.setattr(building, "version", lambda _: told)
    second = made(**changed)
    assert second.built.key != first.built.key
    assert world.builds == 2


def test_another_weight_makes_another_key(made, tmp_path):
    first = made()
    model = onnx.load(first.path)
    value = next(it for it in model.graph.initializer if it.name == "value")
    value.raw_data = bytes([value.raw_data[0] ^ 1]) + value.raw_data[1:]
    onnx.save(model, first.path)
    assert made(path=first.path).built.key != first.built.key


def test_weights_beside_the_graph_belong_to_the_key(made, tmp_path):
    path = small_graph(tmp_path / "large" / "model.onnx", FP16)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    first = made(geglu=False, path=path)
    data = path.parent / "model.onnx_data"
    data.write_bytes(bytes([*data.read_bytes()[:-1], 0x3C]))
    second = made(geglu=False, path=path)
    assert second.built.key != first.built.key
    assert second.world.builds == 2


@pytest.mark.claim("what the builder timed is there the next time")
def test_what_was_timed_is_there_the_next_time(made):
    made()
    made(geglu=False)
    assert made().world.timings == [0, 1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fp32-layer", r"computes 'proj' from fp32, and not in fp16"),
        ("body", r"has the body of MaskedGeglu as layer 'ff.net.0', and not our kernel"),
        ("no-plugin", r"read 0 of the 1 operators of ours in unet as plugins"),
        ("parser", r"does not take unet: node 'x.low/Cast', a 'Cast': Assertion failed"),
        ("out-of-memory", r"the GPU's memory is too small to build unet \(.*out of memory\)"),
    ],
)
def test_an_engine_that_was_not_asked_for_is_refused_and_not_kept(made, fault, said, tmp_path, stand_in):
    stand_in.world.faults.add(fault)
    with pytest.raises(InputError, match=said):
        made()
    stand_in.world.faults.clear()
    assert not made().built.from_cache


@pytest.mark.claim("an engine that gives NaN, or not what fp32 gives, is refused")
@pytest.mark.parametrize(("fault", "said"), [("nan", "not finite"), ("constant", "everywhere the same"),
                                             ("wrong", r"is 0.1 of y"), ("untouched", "engine of unet")])  # fmt: skip
def test_an_engine_that_gives_something_else_is_found(made, stand_in, tmp_path, fault, said):
    stand_in.world.faults.add(fault)
    done = made("fp32")
    (tmp_path / "fp32/config.json").write_text("{}")
    with pytest.raises(InputError, match=said):
        parity(done.plan, done.path, graph="unet", precision="fp32", profile=PROFILE, device="cuda")


@pytest.mark.claim("too little memory is said before anything is built")
def test_too_little_memory_is_said_before_anything_is_built(made, stand_in, monkeypatch):
    monkeypatch.setattr(library, "_read", lambda _: building.Gpu("Small", (8, 6), "580", 4_000_000_000, 200_000_000))
    with pytest.raises(InputError, match=r"^Small has 0.2 GB of its 4.0 GB free, and to build unet takes at least 0.3"):
        made()
    assert stand_in.world.builds == 0


@pytest.mark.parametrize(
    ("precision", "geglu", "said"), [("bf16", False, "bf16 needs 8.0"), ("fp16", True, "our kernel needs 8.0")]
)
def test_a_gpu_that_is_too_old(made, monkeypatch, precision, geglu, said):
    monkeypatch.setattr(library, "_read", lambda _: building.Gpu("Old", (7, 5), "580", 9_000_000_000, 8_000_000_000))
    with pytest.raises(InputError, match=said):
        made(precision, geglu)
    assert made("fp16", False).built.layers == 3


def test_other_inputs_than_expected_are_refused(made):
    with pytest.raises(InputError, match="other inputs than was expected"):
        made(profile={"y": PROFILE["x"]})


def test_a_library_that_makes_no_builder(made, stand_in, monkeypatch):
    def fails(log: Any) -> None:
        log.log(stand_in.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(stand_in, "Builder", fails)
    with pytest.raises(InputError, match=r"cannot build the engine of unet \(CUDA initialization failure"):
        made()


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_parser_may_tell_no_error_or_several(stand_in, fails):
    node = onnx.NodeProto(name="n", op_type="Odd")
    errors = [stand_in.ParserError(node, f"bad\nthing {number}") for number in range(fails)]
    parser = SimpleNamespace(num_errors=fails, get_error=errors.__getitem__)
    said = builder._parser_error(parser, SimpleNamespace(said=""))
    first = "node 'n', a 'Odd': bad thing 0"
    assert said == ["it does not say why", first, f"{first} (and 1 more)"][fails]


def test_progress_adds_up_to_one(made):
    told: list[float] = []
    made(progress=told.append)
    assert all(part > 0 for part in told)
    assert sum(told) == pytest.approx(1)
    cached: list[float] = []
    assert made(progress=cached.append).built.from_cache
    assert cached == [1.0]


def test_phases_within_phases():
    monitor = Monitor()
    monitor.start("all", None, 4)
    monitor.step("all", 0)
    assert monitor.fraction == 0.25
    monitor.start("inner", "all", 2)
    monitor.step("inner", 0)
    assert monitor.fraction == 0.375
    monitor.finish("inner")
    assert monitor.step("all", 1)
    assert monitor.fraction == 0.5
    monitor.step("nobody started", 3)
    monitor.finish("all")
    assert monitor.fraction == 0.5


@pytest.fixture
def _heard() -> Iterator[None]:
    """Interrupts are raised, also where a shell started the tests in the background and has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.claim("the builder's progress is ours, and an interrupt stops it")
@pytest.mark.usefixtures("_heard")
def test_an_interrupt_stops_the_builder_and_comes_out():
    monitor, stopped = Monitor(), threading.Event()

    def work() -> None:
        monitor.start("all", None, 1000)
        for step in range(1000):
            time.sleep(0.01)
            if not monitor.step("all", step):
                stopped.set()
                return

    threading.Timer(0.1, signal.raise_signal, (signal.SIGINT,)).start()
    with pytest.raises(KeyboardInterrupt):
        watched(work, monitor, None)
    assert stopped.is_set()


@pytest.mark.usefixtures("_heard")
def test_an_interrupted_build_leaves_no_engine(made, stand_in):
    interrupts = iter([signal.SIGINT])

    def before_step() -> None:
        for number in interrupts:
            signal.raise_signal(number)
        time.sleep(0.05)

    stand_in.world.before_step = before_step
    with pytest.raises(KeyboardInterrupt):
        made()
    stand_in.world.before_step = None
    assert stand_in.world.builds == 0
    assert not made().built.from_cache


def test_what_goes_wrong_in_the_builders_thread_comes_out():
    with pytest.raises(InputError, match="why"):
        watched(lambda: (_ for _ in ()).throw(InputError("why")), Monitor(), None)


@pytest.mark.claim("graphs are cast, checked, built, inspected and compared")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_networks_of_a_model_pass_from_graph_to_parity(stand_in, onnx_folders, tmp_path, precision):
    """The whole of what is done for each graph, on the library's stand-in."""
    from bakeout.editor.recipe import Range
    from bakeout.export.manifest import Shapes
    from bakeout.export.tensorrt.preflight import check
    from bakeout.export.tensorrt.shapes import profile_of, shapes_of

    folder = onnx_folders("sd1")
    usual = shapes_of(folder, None)
    shapes = Shapes(batch=Range(min=1, opt=1, max=2), width=usual.width, height=usual.height)
    for graph in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        source, home = folder / graph / "model.onnx", tmp_path / graph
        home.mkdir()
        profile = profile_of(folder, graph, shapes)
        cast_file(source, home / "model.onnx", precision, graph)
        check(home / "model.onnx", profile)
        plan = home / "model.engine"
        build(home / "model.onnx", plan, graph=graph, precision=precision, profile=profile, device="cuda")
        error = parity(plan, source, graph=graph, precision=precision, profile=profile, device="cuda")
        assert 0 <= error < 0.05
        shutil.rmtree(home)


@pytest.mark.claim("an engine has our plugin and not the function body")
@pytest.mark.tensorrt
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_small_engine_on_a_gpu(tmp_path, monkeypatch, precision, geglu):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = small_graph(tmp_path / "low" / "model.onnx", TYPES[precision], geglu)
    given: dict[str, Any] = {"graph": "unet", "precision": precision, "profile": PROFILE, "device": "cuda"}
    first, second = (build(path, tmp_path / name, **given) for name in ("first", "second"))
    assert (first.plugins, first.from_cache, second.from_cache) == (int(geglu), False, True)
    wide = small_graph(tmp_path / "fp32" / "model.onnx", FP32, geglu)
    (tmp_path / "fp32" / "config.json").write_text("{}")
    assert parity(tmp_path / "first", wide, **given) < 0.05


@pytest.mark.claim("TensorRT builds a model's engines in the precision asked for, and unprobed they agree with fp32")
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_networks_of_a_model_on_a_gpu(onnx_folders, tmp_path, monkeypatch, precision):
    from bakeout.export.tensorrt.shapes import profile_of, shapes_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = onnx_folders("sd1")
    shapes = shapes_of(folder, None)
    for graph in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        source, home = folder / graph / "model.onnx", tmp_path / graph
        home.mkdir()
        profile = profile_of(folder, graph, shapes)
        cast_file(source, home / "model.onnx", precision, graph)
        given: dict[str, Any] = {"graph": graph, "precision": precision, "profile": profile, "device": "cuda"}
        build(home / "model.onnx", home / "model.engine", **given)
        assert parity(home / "model.engine", source, **given) >= 0
