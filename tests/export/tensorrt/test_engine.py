"""Engines on tensors of torch: whose memory is whose, when buffers and graphs are reused, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import stand_in as trt
import torch
from graphs import small_graph
from onnx import TensorProto

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt import device as devices
from bakeout.export.tensorrt import engine as module
from bakeout.export.tensorrt.engine import CaptureWarning, Engine, Lane


def built(path: Path, source: Path | None = None, dtype: int = TensorProto.FLOAT, most: int = 6) -> Path:
    """The stand-in's plan of a small graph x [n, 4, 8] → y, for n from 1 to `most`."""
    source = source or small_graph(path.with_suffix(".onnx"), dtype)
    builder = trt.Builder(trt.Logger())
    network, config = builder.create_network(), builder.create_builder_config()
    assert trt.OnnxParser(network, trt.Logger()).parse_from_file(str(source))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 4, 8), (2, 4, 8), (most, 4, 8))
    config.add_optimization_profile(profile)
    path.write_bytes(builder.build_serialized_network(network, config))
    return path


@pytest.fixture
def plan(stand_in, tmp_path) -> Path:
    return built(tmp_path / "model.engine")


def given(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(seed))


def expected(plan: Path, x: torch.Tensor) -> torch.Tensor:
    stored = onnx.load(plan.with_suffix(".onnx")).graph.initializer[0]
    return x @ torch.tensor(onnx.numpy_helper.to_array(stored).astype("float32"))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).square().mean() <= 1e-12 * wanted.square().mean())


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often a context was made, run and captured, and a graph replayed."""
    counts = dict.fromkeys(("contexts", "runs", "captures", "replays"), 0)
    run = trt.IExecutionContext.execute_async_v3
    make = trt.ICudaEngine.create_execution_context

    def executed(self: Any, stream_handle: int) -> bool:
        counts["runs"] += 1
        return run(self, stream_handle)

    def made(self: Any, *args: Any) -> Any:
        counts["contexts"] += 1
        return make(self, *args)

    class Counting(trt.CpuStream):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            counts["captures"] += 1

            def replay() -> None:
                counts["replays"] += 1
                work()

            return replay

    monkeypatch.setattr(trt.IExecutionContext, "execute_async_v3", executed)
    monkeypatch.setattr(trt.ICudaEngine, "create_execution_context", made)
    monkeypatch.setattr(devices, "Stream", Counting)
    return counts


def test_an_engine_is_called_by_name(plan):
    engine = Engine(plan, "cuda:0")
    assert engine.inputs.keys() == {"x"}
    assert engine.outputs.keys() == {"y"}
    assert engine.shape("x") == (None, 4, 8)
    assert engine.inputs["x"].dtype is torch.float32
    assert (engine.inputs["x"].least, engine.inputs["x"].most) == ((1, 4, 8), (6, 4, 8))
    for rows in (1, 2, 6):
        x = given(rows)
        for handed in (x, x.double(), x.clone().requires_grad_(), given(rows).transpose(1, 2).contiguous().mT):
            found = engine.run({"x": handed})
            assert found.keys() == {"y"}
            assert close(found["y"], expected(plan, x))
            assert not close(found["y"], expected(plan, given(rows, seed=1)))


@pytest.mark.claim("outputs of an engine are the caller's: no later call writes to them")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_what_a_call_gives_stays(plan, cuda_graphs):
    engine = Engine(plan, "cuda:0", cuda_graphs=cuda_graphs)
    kept = [engine.run({"x": given(2, seed)})["y"] for seed in range(5)]
    kept[3].zero_()
    for seed in (0, 1, 2, 4):
        assert close(kept[seed], expected(plan, given(2, seed)))
    assert len({tensor.data_ptr() for tensor in kept}) == 5


def test_what_is_given_is_not_written_to_or_kept(plan):
    engine = Engine(plan, "cuda:0")
    x = given(2)
    before = x.clone()
    first = engine.run({"x": x})["y"]
    assert torch.equal(x, before)
    x.fill_(3.0)
    assert close(engine.run({"x": given(2)})["y"], first)


@pytest.mark.parametrize("first", [True, False])
def test_it_runs_in_inference_mode_and_outside(plan, first):
    """`complete` encodes an empty prompt in it, and pipelines draw without it."""
    engine = Engine(plan, "cuda:0")
    for inference in (first, not first, first):
        with torch.inference_mode(inference), torch.no_grad():
            found = engine.run({"x": given(2)})["y"]
            assert close(found, expected(plan, given(2)))
    assert engine.run({"x": given(2).requires_grad_()})["y"].requires_grad is False


@pytest.mark.claim("a network runs as a captured CUDA graph from the second call of its shapes, in reused buffers")
def test_the_second_call_is_captured(plan, counted):
    engine = Engine(plan, "cuda:0")
    wanted = {"contexts": 1, "runs": 1, "captures": 0, "replays": 0}
    for seed in range(4):
        assert close(engine.run({"x": given(2, seed)})["y"], expected(plan, given(2, seed)))
        assert counted == wanted
        wanted = {"contexts": 1, "runs": seed + 2, "captures": 1, "replays": seed + 1}
    (call,) = engine._calls.values()
    addresses = [tensor.data_ptr() for tensor in (*call.inputs.values(), *call.outputs.values())]
    engine.run({"x": given(2)})
    assert [tensor.data_ptr() for tensor in (*call.inputs.values(), *call.outputs.values())] == addresses
    # Other shapes have a context of their own, so that the captured graph stays that of its own.
    engine.run({"x": given(3)})
    assert (counted["contexts"], counted["captures"]) == (2, 1)
    replays = counted["replays"]
    assert close(engine.run({"x": given(2, 7)})["y"], expected(plan, given(2, 7)))
    assert counted["replays"] == replays + 1


def test_without_graphs_nothing_is_captured(plan, counted):
    engine = Engine(plan, "cuda:0", cuda_graphs=False)
    for _ in range(3):
        engine.run({"x": given(2)})
    assert counted == {"contexts": 1, "runs": 3, "captures": 0, "replays": 0}


def test_where_capture_is_refused_it_runs_and_warns_once(plan, monkeypatch, counted):
    def refuses(self: Any, work: Callable[[], None]) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(devices.Stream, "capture", refuses)
    engine = Engine(plan, "cuda:0")
    engine.run({"x": given(2)})
    with pytest.warns(CaptureWarning, match=r"without a CUDA graph, which takes longer \(CUDA error: .*capturing\)$"):
        found = engine.run({"x": given(2, 1)})["y"]
    assert close(found, expected(plan, given(2, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run({"x": given(2)})
    assert counted["runs"] == 3


def test_of_many_shapes_the_oldest_is_forgotten(plan, counted, monkeypatch):
    waited = []
    engine = Engine(plan, "cuda:0")
    monkeypatch.setattr(engine._lane.stream, "wait", lambda: waited.append(len(engine._calls)), raising=False)
    for rows in (1, 2, 3, 4, 1, 5):
        engine.run({"x": given(rows)})
    assert counted["contexts"] == 5
    # The GPU may still be at work in the one that goes.
    assert waited == [module._MAX_CALLS]
    engine.run({"x": given(1)})
    assert counted["contexts"] == 5
    engine.run({"x": given(2)})
    assert counted["contexts"] == 6


def test_engines_share_the_memory_in_which_they_compute(stand_in, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(trt.IExecutionContext, "set_device_memory", lambda self, *given: used.append((self, *given)))
    monkeypatch.setattr(trt.IExecutionContext, "execute_async_v3", lambda self, stream_handle: True)
    lane = Lane(torch.device("cpu"))
    engines = [Engine(built(tmp_path / f"{name}.engine"), "cuda", lane=lane) for name in "ab"]
    lane.reserve(9000)
    for engine in engines:
        engine.run({"x": given(1)})
    (_, first, size), (_, second, _) = used
    assert first == second
    assert size >= 9000
    # Where more is needed later, what is in use stays as it is.
    held = lane.memory()
    lane.reserve(20_000)
    assert len(lane.memory()) >= 20_000
    assert held.data_ptr() == first


def test_an_engine_waits_before_it_goes(plan, monkeypatch):
    waited = []
    monkeypatch.setattr(trt.CpuStream, "wait", lambda self: waited.append(True))
    engine = Engine(plan, "cuda:0")
    engine.run({"x": given(1)})
    assert not waited
    del engine
    assert waited == [True]


MISUSE = {
    "nothing": ({}, "lacks 'x'; give it x"),
    "too much": ({"x": given(1), "z": given(1)}, "has no input 'z'"),
    "too many": ({"x": given(7)}, r"made for x of shape \[1, 4, 8\] to \[6, 4, 8\], not \[7, 4, 8\]; draw that many"),
    "none": ({"x": given(0)}, r"not \[0, 4, 8\]"),
    "other width": ({"x": torch.ones(1, 4, 9)}, r"not \[1, 4, 9\]; .* export again with another --size or --batch"),
    "rank": ({"x": torch.ones(4, 8)}, r"not \[4, 8\]"),
}


@pytest.mark.parametrize("fault", MISUSE)
def test_other_inputs_are_refused(plan, fault):
    inputs, words = MISUSE[fault]
    engine = Engine(plan, "cuda:0")
    with pytest.raises(InputError, match=words) as refused:
        engine.run(inputs)
    assert "\n" not in str(refused.value)
    assert close(engine.run({"x": given(2)})["y"], expected(plan, given(2)))


@pytest.mark.claim("an engine of another GPU or version of TensorRT is refused in one sentence")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA Other"}, r"does not load .*incompatible device.* export the model again on this machine"),
        ({"version": "11.5.0.1"}, r"not compatible with this version.* export the model again on this machine"),
    ],
)
def test_an_engine_of_another_machine_is_refused(plan, stand_in, change, words):
    for name, value in change.items():
        setattr(stand_in.world, name, value)
    with pytest.raises(InputError, match=words) as refused:
        Engine(plan, "cuda:0")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"no engine", b"\x00" * 4096])
def test_what_is_no_engine_is_refused(stand_in, tmp_path, content):
    path = tmp_path / "model.engine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read|does not load") as refused:
        Engine(path, "cuda:0")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_failure_is_one_sentence(plan, monkeypatch, method):
    def fails(self: Any, *args: Any, **settings: Any) -> bool:
        return False

    engine = Engine(plan, "cuda:0")
    engine._logger.log(trt.ILogger.Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)\nin reformat")
    monkeypatch.setattr(trt.IExecutionContext, method, fails)
    with pytest.raises(
        InputError, match=r"TensorRT failed in .*engine \(Error Code 1.*\); if memory is short"
    ) as refused:
        engine.run({"x": given(2)})
    assert "\n" not in str(refused.value)


def test_memory_that_is_full_is_one_sentence(plan, monkeypatch):
    def full(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0")

    monkeypatch.setattr(Lane, "memory", full)
    with pytest.raises(InputError, match=r"the GPU's memory is full with what .* computes in; draw fewer"):
        Engine(plan, "cuda:0").run({"x": given(2)})


def test_an_engine_that_does_not_write_is_seen(stand_in, tmp_path):
    """Had the output been taken from anywhere else than what the engine wrote, this would pass."""
    stand_in.world.faults.add("wrong")
    path = built(tmp_path / "model.engine")
    found = Engine(path, "cuda:0").run({"x": given(2)})["y"]
    assert close(found, 1.1 * expected(path, given(2)))
    assert not close(found, expected(path, given(2)))


def real_engine(path: Path, dtype: int = TensorProto.FLOAT) -> Path:
    """TensorRT's own plan of the small graph."""
    import tensorrt

    source = small_graph(path.with_suffix(".onnx"), dtype)
    log = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    assert tensorrt.OnnxParser(network, log).parse_from_file(str(source))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 4, 8), (2, 4, 8), (6, 4, 8))
    config.add_optimization_profile(profile)
    path.write_bytes(builder.build_serialized_network(network, config))
    return path


@pytest.mark.tensorrt
@pytest.mark.claim("TensorRT runs an engine on tensors of torch, captured as a CUDA graph, in order with torch's work")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_real_engine_keeps_the_order_of_work(tmp_path, cuda_graphs):
    plan = real_engine(tmp_path / "model.engine")
    engine = Engine(plan, "cuda", cuda_graphs=cuda_graphs)
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        for seed in range(12):
            rows = 1 + seed % 3
            large = torch.eye(2048, device="cuda")
            for _ in range(20):
                large = large @ large
            # What the engine reads is ready only when all of that is.
            x = given(rows, seed).cuda() * large[0, 0]
            kept.append(engine.run({"x": x})["y"])
            x.fill_(float("nan"))
    captured = [call._replay is not None for call in engine._calls.values()]
    assert captured == [cuda_graphs] * 3
    for seed, found in enumerate(kept):
        assert found.device.type == "cuda"
        wanted = expected(plan, given(1 + seed % 3, seed))
        assert (found.cpu() - wanted).square().mean() <= 1e-10 * wanted.square().mean()


@pytest.mark.tensorrt
def test_a_real_engine_refuses_what_it_was_not_made_for(tmp_path):
    plan = real_engine(tmp_path / "model.engine")
    with pytest.raises(InputError, match=r"of shape \[1, 4, 8\] to \[6, 4, 8\], not \[7, 4, 8\]"):
        Engine(plan, "cuda").run({"x": given(7)})
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not load"):
        Engine(plan, "cuda")
