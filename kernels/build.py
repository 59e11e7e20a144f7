"""The shared libraries of `csrc/`, compiled where they are asked for: once, in the user's cache folder.

    cpu     the C++ sources, by the C++ compiler
    cuda    those and the CUDA C++ sources, by nvcc: one library for PyTorch, ONNX Runtime and TensorRT

A library's name has a digest of the sources, the command line and the compilers' versions. What is in the folder is
loaded into the process, so nobody else may have written it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from bakeout.kernels.cache import cache_folder, check_private
from bakeout.kernels.errors import KernelUnavailable

CSRC: Final = Path(__file__).parent / "csrc"
# The first of these that nvcc knows is kept as PTX too, which the driver compiles for the GPUs that none of them is
# for: those of 11.0, and those to come.
ARCHITECTURES: Final = (80, 86, 89, 90, 100, 120)
_SUFFIXES: Final = {"cpu": (".cc",), "cuda": (".cc", ".cu")}
_CXX_FLAGS: Final = ("-O3", "-std=c++17", "-shared")


def library(kind: Literal["cpu", "cuda"]) -> Path:
    """The library, built if it is not there. Processes may ask at the same time.

    The C++ compiler is $CXX, c++, g++ or clang++. nvcc is that of $CUDA_HOME, that on PATH, or that of the package
    nvidia-cuda-nvcc.

    Raises:
        KernelUnavailable: a compiler is missing or fails, or the cache folder cannot be used or is not the user's
            alone.
    """
    if os.name != "posix":
        raise KernelUnavailable("the compiled kernels are built on Linux and macOS only; choose another kernel")
    cxx = _cxx()
    command = (cxx, *_CXX_FLAGS, "-fPIC", "-fvisibility=hidden") if kind == "cpu" else _nvcc_command(_nvcc(), cxx)
    sources = [path for path in sorted(CSRC.iterdir()) if path.is_file()]
    versions = [_run((program, "--version")).stdout for program in dict.fromkeys((command[0], cxx))]
    path = cache_folder("kernels", "built kernel") / f"{kind}-{_digest(sources, [*command, *versions])}.so"
    if not os.path.lexists(path):
        _build(command, [source for source in sources if source.suffix in _SUFFIXES[kind]], path)
    check_private(path, stat.S_ISREG)
    return path


def ptx(source: str, macros: Mapping[str, str | int]) -> str:
    """The PTX that nvcc makes of one of the CUDA C++ sources, for the first of `ARCHITECTURES` and all later GPUs.

    Args:
        source: the name of a file of `csrc/`.
        macros: what is defined for the preprocessor, by name.

    Raises:
        KernelUnavailable: a compiler is missing or fails.
    """
    command = (
        _nvcc(), f"-ccbin={_cxx()}", "-O3", "-std=c++17", "-DBAKEOUT_CUDA", "-ptx", f"-arch=compute_{ARCHITECTURES[0]}",
        *(f"-D{name}={value}" for name, value in macros.items()), str(CSRC / source),
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        done = _run((*command, "-o", str(path)), TMPDIR=folder)
        if done.returncode or not path.is_file():
            raise KernelUnavailable(
                f"{command[0]} cannot compile the kernel ({_first_error(done.stderr)}); mend or change the compiler"
            )
        return path.read_text(encoding="utf-8")


def _cxx() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    if named:
        raise KernelUnavailable(f"the C++ compiler {named!a:.200} of $CXX is not there; let CXX name one, or unset it")
    raise KernelUnavailable("there is no C++ compiler to build the kernel; install g++ or clang++, or let CXX name one")


def _nvcc() -> str:
    for path in _nvcc_places():
        if found := shutil.which(path):
            return found
    raise KernelUnavailable(
        "there is no nvcc to build the CUDA kernel; install the CUDA toolkit, or run `pip install 'bakeout[nvcc]'`"
    )


def _nvcc_places() -> Iterator[str]:
    if home := os.environ.get("CUDA_HOME"):
        yield str(Path(home) / "bin" / "nvcc")
    yield "nvcc"
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from (str(path) for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True))


def _nvcc_command(nvcc: str, cxx: str) -> tuple[str, ...]:
    listed = _run((nvcc, "--list-gpu-arch")).stdout.split()
    known = [number for number in ARCHITECTURES if f"compute_{number}" in listed]
    if not known:
        raise KernelUnavailable(f"{nvcc} knows no GPU that the CUDA kernel is for; install CUDA 12 or newer")
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    others = f"-gencode=arch=compute_{known[0]},code=compute_{known[0]}"
    # The package's nvcc does not look for its libraries where the package has them.
    lib = Path(nvcc).resolve().parents[1] / "lib"
    libraries = [f"-L{lib}"] if (lib / "libcudart_static.a").is_file() else []
    return (
        nvcc, f"-ccbin={cxx}", *_CXX_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "-DBAKEOUT_CUDA", "--threads=0",
        *code, others, "-cudart=static", *libraries, "-Xlinker=--exclude-libs=ALL",
    )  # fmt: skip


def _digest(sources: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256()
    named = (part for path in sources for part in (path.name.encode(), path.read_bytes()))
    for part in (*(word.encode() for word in words), *named):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _build(command: Sequence[str], sources: Sequence[Path], path: Path) -> None:
    # Aside, and renamed: another process that asks meanwhile, or after a build that was killed, sees all or nothing.
    try:
        with TemporaryDirectory(dir=path.parent, prefix="building-") as aside:
            new = Path(aside) / path.name
            done = _run((*command, "-o", str(new), *map(str, sources)), TMPDIR=aside)
            if done.returncode or not new.is_file():
                raise KernelUnavailable(
                    f"{command[0]} cannot build the kernel ({_first_error(done.stderr)}); mend or change the compiler"
                )
            new.chmod(0o600)
            new.replace(path)
    except OSError as error:
        raise KernelUnavailable(
            f"the built kernel cannot be kept ({error}); let XDG_CACHE_HOME name a folder that you can write"
        ) from error


def _run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - the compilers that the user has chosen
            command, env=os.environ | {"LC_ALL": "C"} | environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        raise KernelUnavailable(
            f"{command[0]} does not start ({error.strerror}); mend or change the compiler"
        ) from error


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it does not say why")[:300]
