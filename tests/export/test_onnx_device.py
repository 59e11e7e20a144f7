"""ONNX Runtime on a GPU: what its providers are given, that none is replaced by the CPU, and who owns memory."""

from __future__ import annotations

import gc
import shutil
import subprocess
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from bakeout.editor.errors import InputError
from bakeout.editor.recipe import Tensorrt as Serving
from bakeout.export import onnx_gpu, onnx_pipeline
from bakeout.export.onnx_gpu import CUDA, TENSORRT, check_placement, check_started, on_gpu, profiles_for, shapes_for
from bakeout.export.onnx_gpu import with_profile as profiled
from bakeout.export.onnx_pipeline import OnnxGraph, SessionSettings, check_providers, load_onnx_pipeline
from bakeout.export.tensorrt import device as devices

ONE_THREAD = SessionSettings(threads=1)
PAIR = {"onnxruntime-cuda": (CUDA,), "onnxruntime-tensorrt": (TENSORRT, CUDA)}


def write_graph(path: Path, *nodes: onnx.NodeProto, rows: str | int = "rows") -> Path:
    """From `x` [rows, 3] to `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [helper.make_tensor("w", TensorProto.FLOAT, [3, 3], [float(it) for it in range(9)])]
    graph = helper.make_graph(list(nodes), "small", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def product(tmp_path) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="the product")
    return write_graph(tmp_path / "model.onnx", node)


@pytest.fixture
def second_gpu(monkeypatch):
    """As if there were two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.claim("outputs of ONNX Runtime are the caller's: no later call writes to them")
def test_what_a_call_gives_stays(product):
    graph = OnnxGraph(product, ("x",), ("y",), ONE_THREAD)
    given = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    kept = [graph.run({"x": x})["y"] for x in given]
    copies = [tensor.clone() for tensor in kept]
    kept[1].zero_()
    graph.run({"x": torch.ones(4, 3)})
    # Nor does the session have to live as long as they do.
    del graph
    gc.collect()
    weight = torch.arange(9.0).reshape(3, 3)
    for number in (0, 2):
        assert torch.equal(kept[number], copies[number])
        assert (kept[number] - given[number] @ weight).abs().max() < 1e-5
    assert len({tensor.data_ptr() for tensor in kept}) == 3


def test_inputs_are_bound_where_they_lie(product, monkeypatch):
    bound = {}
    bind = onnxruntime.IOBinding.bind_input

    def spied(self: Any, name: str, *args: Any) -> None:
        bound[name] = args
        bind(self, name, *args)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", spied)
    graph = OnnxGraph(product, ("x",), ("y",), ONE_THREAD)
    x = torch.ones(2, 3)
    graph.run({"x": x})
    assert bound == {"x": ("cpu", 0, TensorProto.FLOAT, [2, 3], x.data_ptr())}
    # What is not contiguous, or of another dtype, is copied first, and the copy lives as long as the call.
    rows = torch.arange(6.0).reshape(3, 2).T
    assert torch.equal(graph.run({"x": rows})["y"], rows @ torch.arange(9.0).reshape(3, 3))
    assert bound["x"][-1] != rows.data_ptr()
    assert graph.run({"x": torch.ones(0, 3)})["y"].shape == (0, 3)


def test_a_provider_that_fails_is_not_replaced(product, monkeypatch, capfd):
    calls = []

    def fails(self: Any, *args: Any) -> None:
        calls.append(args)
        self._fallback_providers = ["CPUExecutionProvider"]
        raise RuntimeError("TensorRT is not there")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fails)
    with pytest.raises(InputError, match="TensorRT is not there"):
        OnnxGraph(product, ("x",), ("y",), ONE_THREAD)
    assert len(calls) == 1
    assert capfd.readouterr().out == ""
    # Left to itself, ONNX Runtime tries the CPU and tells only the terminal.
    with pytest.raises(RuntimeError):
        onnxruntime.InferenceSession(product, providers=["CPUExecutionProvider"])
    assert "Falling back to ['CPUExecutionProvider']" in capfd.readouterr().out


@pytest.mark.claim("a provider that ONNX Runtime lacks is refused, never replaced by the CPU")
@pytest.mark.parametrize("runtime", PAIR)
def test_a_provider_that_is_not_installed_is_refused(runtime, second_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    settings = on_gpu(runtime, "cuda", SessionSettings())
    with pytest.raises(
        InputError,
        match=r"has no '\w+'; choose from .*, or install .*pip uninstall onnxruntime, then .*'bakeout\[gpu\]'",
    ):
        check_providers(settings)


@pytest.mark.claim("a provider whose libraries do not load is refused, with what the linker says")
def test_a_provider_that_does_not_start_is_refused(tmp_path, monkeypatch, capfd):
    preloaded = []

    def preload() -> None:
        preloaded.append(True)
        print("Failed to load libcublas.so.13")

    fake = SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        preload_dlls=preload,
        set_default_logger_severity=lambda _: None,
        get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
    )
    # Hashable, as a module is.
    fake = type("Fake", (), vars(fake))
    (tmp_path / "capi").mkdir()
    library = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    check_started(fake, CUDA)
    library.write_text("no library")
    with pytest.raises(
        InputError, match=r"cannot start it \(.*providers_cuda.so.*\): it needs an NVIDIA GPU"
    ) as refused:
        check_started(fake, CUDA)
    assert "\n" not in str(refused.value)
    check_started(fake, "CPUExecutionProvider")
    library.rename(tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so")
    with pytest.raises(InputError, match="it needs the very TensorRT that it was built for"):
        check_started(fake, TENSORRT)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", fake)
    with pytest.raises(InputError, match="cannot start it"):
        check_providers(SessionSettings((TENSORRT,)))
    assert preloaded == [True]
    assert capfd.readouterr() == ("", "")


def test_a_provider_whose_libraries_are_there_is_not_refused(tmp_path):
    """ONNX Runtime's own part of them is there, to all that is loaded, from when it is imported."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("there is no C compiler")
    fake = type("Fake", (), {
        "__file__": str(tmp_path / "__init__.py"),
        "preload_dlls": lambda: None,
        "set_default_logger_severity": lambda _: None,
    })  # fmt: skip
    (tmp_path / "capi").mkdir()
    source = tmp_path / "provider.c"
    for name, symbol in (("cuda", "Provider_GetHost"), ("tensorrt", "createInferBuilder")):
        source.write_text(f"void *{symbol}(void);\nvoid *(*needed)(void) = {symbol};\n")
        library = tmp_path / "capi" / f"libonnxruntime_providers_{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    check_started(fake, CUDA)
    with pytest.raises(InputError, match=r"cannot start it .*createInferBuilder"):
        check_started(fake, TENSORRT)


def test_what_cuda_says_is_told(product, monkeypatch):
    """It stands behind the names of C++ functions, which are longer than a sentence."""
    function = f"/src/cuda_call.cc:154 std::conditional_t<{'THRW, void, ' * 40}> onnxruntime::CudaCall(ERRTYPE) "
    where = " ; GPU=0 ; hostname=here ; file=/src/a.cc ; line=355 ; expr=cudaSetDevice(info_.device_id); \n"

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{function}CUDA failure 35: CUDA driver version is insufficient{where}")

    settings = SessionSettings(device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(InputError, match=r"\(CUDA failure 35: CUDA driver version is insufficient\); see that the GPU"):
        OnnxGraph(product, ("x",), ("y",), settings)
    with pytest.raises(InputError, match=r"insufficient\); export the model again"):
        OnnxGraph(product, ("x",), ("y",), ONE_THREAD)


def test_the_gpu_of_a_session_does_not_become_the_current_one(product, monkeypatch):
    """ONNX Runtime makes it so wherever it computes, and leaves it so."""
    inside, made = [], []

    @contextmanager
    def current(device: torch.device) -> Any:
        inside.append(device)
        yield
        inside.pop()

    def session(*_: Any) -> Any:
        made.append(list(inside))
        return session_of(product)

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(onnx_pipeline, "_session", session)
    OnnxGraph(product, ("x",), ("y",), SessionSettings((CUDA,), device="cuda:1"))
    assert (made, inside) == ([[torch.device("cuda", 1)]], [])
    graph = OnnxGraph(product, ("x",), ("y",), ONE_THREAD)
    assert made[1:] == [[]]
    graph.run({"x": torch.ones(1, 3)})


def session_of(path: Path, *, recorded: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(recorded)))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


SHAPES = (
    helper.make_node("Shape", ["x"], ["s"]),
    helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
    helper.make_node("Add", ["f", "f"], ["y"]),
)


@pytest.mark.claim("networks of ONNX Runtime that would compute on the CPU are refused, by the node")
@pytest.mark.parametrize("op", ["MatMul", "Softmax", "Erf", "Conv", "TopK", "Resize", "Sigmoid"])
def test_only_shapes_may_be_computed_on_the_cpu(tmp_path, product, op):
    arithmetic = write_graph(tmp_path / "shapes.onnx", *SHAPES)
    # Here the only provider is the CPU's.
    check_placement(arithmetic, session_of(arithmetic), "CPUExecutionProvider")
    with pytest.raises(InputError, match=r"would compute 'MatMul' \('the product'\) on the CPU, because"):
        check_placement(product, session_of(product), "CPUExecutionProvider")
    with pytest.raises(InputError, match=r"CUDAExecutionProvider computes nothing of .*shapes.onnx"):
        check_placement(arithmetic, session_of(arithmetic), CUDA)
    node = SimpleNamespace(op_type=op, domain="", name="n")
    placed = [
        SimpleNamespace(ep_name=CUDA, get_nodes=lambda: [SimpleNamespace(op_type="Conv", domain="", name="c")]),
        SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: [node]),
    ]
    session = SimpleNamespace(
        get_provider_graph_assignment_info=lambda: placed, get_providers=lambda: [CUDA, "CPUExecutionProvider"]
    )
    with pytest.raises(InputError, match=f"compute '{op}' .* because CUDAExecutionProvider cannot"):
        check_placement(product, session, CUDA)
    node.op_type = "Concat"
    check_placement(product, session, CUDA)
    # An operator of ours, or one that ONNX Runtime fused, is no arithmetic with shapes, whatever it is called.
    node.domain = "bakeout"
    with pytest.raises(InputError, match="on the CPU"):
        check_placement(product, session, CUDA)


def test_what_our_graphs_do_with_integers_may_lie_on_the_cpu(onnx_folders):
    """A provider for GPUs leaves it there, and none of the rest: that would be seen in every graph."""
    whole = {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
    seen = set()
    for path in sorted(onnx_folders("sd1").glob("*/model.onnx")):
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        kinds = {it.name: it.type.tensor_type.elem_type for it in (*graph.input, *graph.output, *graph.value_info)}
        kinds |= {it.name: it.data_type for it in graph.initializer}
        seen |= {
            node.op_type
            for node in graph.node
            if {kinds.get(name) for name in (*node.input, *node.output) if name} <= whole
        }
        with pytest.raises(InputError, match="on the CPU"):
            check_placement(path, session_of(path), "CPUExecutionProvider")
    assert {"ArgMax", "Concat"} <= seen <= onnx_gpu._INDEX_ARITHMETIC


@pytest.mark.parametrize("runtime", PAIR)
def test_the_settings_of_a_gpu(runtime, second_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = SessionSettings((CUDA,), {CUDA: {"use_tf32": "0"}}) if runtime == "onnxruntime-cuda" else SessionSettings()
    for device, number in (("cuda:0", "0"), ("cuda", "1"), (torch.device("cuda", 1), "1")):
        made = on_gpu(runtime, device, own)
        assert made.providers == PAIR[runtime]
        assert made.device == f"cuda:{number}"
        assert {options["device_id"] for options in made.provider_options.values()} == {number}
    if runtime == "onnxruntime-cuda":
        assert made.provider_options == {CUDA: {"device_id": "1", "use_tf32": "0"}}
        assert made.kernels == "auto"
        return
    assert made.kernels == "function"
    options = made.provider_options[TENSORRT]
    # No flag of a precision, with which the network would not be strongly typed, and no engine found by names alone.
    assert options.keys() == {"device_id", "trt_timing_cache_enable", "trt_timing_cache_path"}
    assert Path(options["trt_timing_cache_path"]).is_relative_to(tmp_path)
    profile = {
        "sample": ((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 16, 16)),
        "timestep": ((), (), ()),
        "encoder_hidden_states": ((1, 77, 32), (2, 77, 32), (8, 77, 32)),
    }
    assert profiled(made, profile).provider_options[TENSORRT].items() >= {
        "trt_profile_min_shapes": "sample:1x4x8x8,encoder_hidden_states:1x77x32",
        "trt_profile_opt_shapes": "sample:2x4x8x8,encoder_hidden_states:2x77x32",
        "trt_profile_max_shapes": "sample:8x4x16x16,encoder_hidden_states:8x77x32",
    }.items()  # fmt: skip
    assert profiled(made, profile).provider_options[CUDA] == made.provider_options[CUDA]


def test_each_graph_has_the_profile_of_the_recipe(onnx_folders):
    folder = onnx_folders("sd1")
    assert shapes_for("onnxruntime-cuda", folder, None, Serving()) is None
    wanted = Serving.model_validate({"width": 64, "height": [32, 64, 128], "batch": [1, 2, 4]})
    shapes = shapes_for("onnxruntime-tensorrt", folder, None, wanted)
    profiles = profiles_for(folder, shapes)
    assert profiles.keys() == {path.parent.name for path in folder.glob("*/model.onnx")}
    least, usual, most = profiles["unet"]["sample"]
    assert (least[0], usual[0], most[0]) == (1, 4, 8)
    assert (least[2:], usual[2:], most[2:]) != (least[2:],) * 3


@pytest.mark.parametrize(
    ("runtime", "device", "settings", "words"),
    [
        ("onnxruntime-cuda", "cpu", {}, "'cpu' is no NVIDIA GPU; give one, as cuda"),
        ("onnxruntime-cuda", "cuda:2", {}, r"there is no NVIDIA GPU cuda:2 here \(torch sees 2"),
        ("onnxruntime-cuda", "gpu", {}, "'gpu' is no device"),
        ("onnxruntime-cuda", "cuda", {"providers": ("AzureExecutionProvider",)}, "not AzureExecutionProvider"),
        ("onnxruntime-cuda", "cuda", {"providers": (TENSORRT, CUDA)}, "has the providers CUDAExecutionProvider, not"),
        ("onnxruntime-tensorrt", "cuda", {"providers": (CUDA,)}, "has the providers TensorrtExecutionProvider, CUDA"),
        (
            "onnxruntime-cuda", "cuda", {"provider_options": {"CPUExecutionProvider": {"a": "b"}}},
            "options for 'CPUExecutionProvider', which onnxruntime-cuda does not use",
        ),
        ("onnxruntime-tensorrt", "cuda", {"kernels": "library"}, "no kernels of ours; choose the kernels 'function'"),
    ],
)  # fmt: skip
def test_settings_that_no_gpu_has_are_refused(runtime, device, settings, words, second_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=words):
        on_gpu(runtime, device, SessionSettings(**settings))


def test_without_a_gpu_it_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match=r"torch sees 0, and this torch is built without CUDA\); draw on a machine"):
        devices.torch_device("cuda")


def test_what_the_cpu_may_do_is_no_network():
    """None of what takes time, or may take part in an edit, is called arithmetic with shapes."""
    heavy = {
        "MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "LayerNormalization", "InstanceNormalization",
        "GroupNormalization", "ReduceMean", "Erf", "Gelu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Pow", "TopK", "ScatterND",
        "Resize", "Sin", "Cos", "Relu", "MaskedGeglu", "Attention",
    }  # fmt: skip
    assert not heavy & onnx_gpu._INDEX_ARITHMETIC


@pytest.mark.gpu
@pytest.mark.claim("ONNX Runtime draws on a GPU what it draws on a CPU, with tensors bound there")
@pytest.mark.parametrize("runtime", PAIR)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_gpu_draws_what_the_cpu_draws(onnx_folders, runtime, family):
    if PAIR[runtime][0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {PAIR[runtime][0]}")
    folder = onnx_folders(family)
    whole = {CUDA: {"use_tf32": "0"}} if runtime == "onnxruntime-cuda" else {}
    settings = on_gpu(runtime, "cuda", SessionSettings(PAIR[runtime], whole))
    try:
        check_providers(settings)
    except InputError as refusal:
        pytest.skip(str(refusal))
    shapes = shapes_for(runtime, folder, None, Serving.model_validate({"batch": [1, 1, 2]}))
    ours = load_onnx_pipeline(folder, settings, profiles={} if shapes is None else profiles_for(folder, shapes))
    pictures = [
        pipeline(
            prompt=["a", "bc"], num_inference_steps=3, output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        ).images
        for pipeline in (ours, load_onnx_pipeline(folder, ONE_THREAD))
    ]  # fmt: skip
    assert [picture.device.type for picture in pictures] == ["cuda", "cpu"]
    # A grey value is 4e-3; TensorRT multiplies in TF32.
    assert (pictures[0].cpu() - pictures[1]).abs().max() < (4e-3 if runtime == "onnxruntime-cuda" else 2e-2)


@pytest.mark.gpu
def test_drawing_on_another_gpu_leaves_the_current_one(product):
    if torch.cuda.device_count() < 2 or CUDA not in onnxruntime.get_available_providers():
        pytest.skip("it takes two GPUs and the CUDAExecutionProvider")
    before = torch.cuda.current_device()
    other = torch.device("cuda", 1 - before)
    graph = OnnxGraph(product, ("x",), ("y",), on_gpu("onnxruntime-cuda", other, SessionSettings()))
    assert torch.cuda.current_device() == before
    found = graph.run({"x": torch.ones(2, 3, device=other)})["y"]
    assert found.device == other
    assert torch.cuda.current_device() == before


@pytest.mark.gpu
def test_what_torch_still_computes_is_waited_for(product):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDAExecutionProvider")
    graph = OnnxGraph(product, ("x",), ("y",), on_gpu("onnxruntime-cuda", "cuda", SessionSettings()))
    side = torch.cuda.Stream()
    weight = torch.arange(9.0, device="cuda").reshape(3, 3)
    for seed in range(20):
        with torch.cuda.stream(side):
            large = torch.full((4096, 4096), float(seed), device="cuda")
            for _ in range(5):
                large = large @ torch.eye(4096, device="cuda")
            found = graph.run({"x": large[:, :3]})["y"]
            large.fill_(-1.0)
        assert found.device.type == "cuda"
        wanted = torch.full((4096, 3), float(seed), device="cuda") @ weight
        side.synchronize()
        assert (found - wanted).abs().max() <= 1e-2 * (1 + seed)
