"""What is missing is said in one sentence."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt import device, library


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    module = ModuleType("tensorrt")
    module.__file__ = "tensorrt/__init__.py"
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)


@pytest.mark.claim("without TensorRT, or with one that does not load, one sentence says so")
def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(library, "import_module", lambda _: exec("raise ModuleNotFoundError(name='tensorrt')"))
    with pytest.raises(InputError, match=r"^TensorRT is not installed; run `pip install 'bakeout\[gpu,tensorrt\]'`"):
        library.tensorrt()


def test_a_folder_of_that_name_is_not_the_library(monkeypatch, tmp_path):
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(InputError, match=r"^TensorRT is not installed"):
        library.tensorrt()
    monkeypatch.delitem(sys.modules, "tensorrt")


@pytest.mark.claim("without TensorRT, or with one that does not load, one sentence says so")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("raise OSError('libnvinfer.so.11: cannot open\\nand more')", r"libnvinfer.so.11: cannot open\)"),
        ("import tensorrt_of_nobody", "No module named 'tensorrt_of_nobody'"),
    ],
)
def test_a_library_that_does_not_load(monkeypatch, tmp_path, source, said):
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(InputError, match=f"does not load .*{said}"):
        library.tensorrt()


@pytest.mark.claim("a version of TensorRT that cannot be used is refused in one sentence")
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("10.14.1.48", "10.14.1.48 has a fault in plugins that are written in Python"),
        ("10.13.3.9", "10.13.3.9 is too old"),
        ("10.16.1.11", "10.16.1.11 is too old"),
        ("8.6.1", "8.6.1 is too old"),
        ("", "has no version"),
        (None, "has no version"),
    ],
)
def test_a_version_that_cannot_be_used(monkeypatch, version, said):
    install(monkeypatch, version)
    with pytest.raises(InputError, match=said):
        library.tensorrt()


@pytest.mark.parametrize("version", ["11.0.0.114", "11.4.0.106", "11.4.1"])
def test_a_version_that_can_be_used(monkeypatch, version):
    install(monkeypatch, version)
    assert library.tensorrt().__version__ == version


def test_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="there is no NVIDIA GPU"):
        library.gpu("cuda")


@pytest.mark.claim("a GPU that is too old is refused in one sentence")
@pytest.mark.parametrize(("capability", "fits"), [((7, 0), False), ((6, 1), False), ((7, 5), True), ((12, 0), True)])
def test_a_gpu_older_than_the_library(monkeypatch, capability, fits):
    monkeypatch.setattr(device, "torch_device", torch.device)
    monkeypatch.setattr(library, "_read", lambda _: library.Gpu("Tesla", capability, "580.1", 2, 1))
    if fits:
        assert library.gpu("cuda:0").capability == capability
    else:
        with pytest.raises(InputError, match=r"^Tesla has compute capability \d.\d and TensorRT 11 needs 7.5"):
            library.gpu("cuda:0")


def test_a_logger_keeps_the_first_error_and_prints_nothing(stand_in, capfd):
    log, severity = library.logger(), stand_in.ILogger.Severity
    log.log(severity.WARNING, "slow")
    assert log.said == ""
    log.log(severity.ERROR, "first\n  of all")
    log.log(severity.INTERNAL_ERROR, "second")
    assert log.said == "first of all"
    assert library.logger().said == ""
    assert capfd.readouterr() == ("", "")


def test_a_logger_of_the_real_bindings(bindings):
    log = library.logger()
    assert isinstance(log, bindings.ILogger)
    log.log(bindings.ILogger.Severity.ERROR, "why")
    assert log.said == "why"


@pytest.mark.gpu
def test_what_a_gpu_says():
    found = library.gpu("cuda")
    assert found.capability >= (7, 5)
    assert 0 < found.free <= found.total
    assert found.name
    assert found.driver


@pytest.mark.tensorrt
def test_the_library_is_there():
    assert library.tensorrt().__version__.startswith("11.")
    assert library.logger().said == ""
