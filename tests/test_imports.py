"""Imports go one way between the folders, and what is declared is what is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

FOLDERS = ("editor", "export", "kernels", "validate")
# Which other parts of bakeout each part may import. The command line may import all, and nothing may import it.
MAY_IMPORT = {
    "kernels": set(),
    "editor": set(),
    "export": {"editor", "kernels"},
    "validate": {"editor", "kernels", "export", "front", "builtin"},
    "builtin": {"editor", "front"},
    "front": {"editor", "kernels", "export", "validate", "builtin"},
    "cli": {"editor", "kernels", "export", "validate", "builtin", "front"},
}
# The name under which a package is installed, where it is not the name under which it is imported.
DISTRIBUTIONS = {"PIL": "pillow", "onnx_ir": "onnx-ir"}


def part_of(module: str) -> str:
    """The part of bakeout to which a dotted module name belongs."""
    name = [*module.split("."), "front"][1]
    return "cli" if name in ("cli", "__main__") else name if name in (*FOLDERS, "builtin") else "front"


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that the source of `module` imports: absolute, relative, or by a string that is a constant."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            # `from bakeout import kernels` names a part only together with what it takes.
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "bakeout" else {origin}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    own = part_of(module)
    allowed = MAY_IMPORT[own] | {own}
    return {
        name
        for name in imported(source, module, is_package)
        # A root folder by its bare name works only where the checkout happens to be the working directory.
        if name.split(".")[0] in FOLDERS or (name.split(".")[0] == "bakeout" and part_of(name) not in allowed)
    }


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    """Every source file of the package, and its dotted name."""
    package = root / "src" / "bakeout"
    for top in (package, *(package / folder for folder in FOLDERS)):
        for path in sorted(top.rglob("*.py")):
            yield (
                path,
                ".".join(("bakeout", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"),
            )


def test_imports_go_one_way(root):
    found = dict.fromkeys(part_of(module) for _, module in modules(root))
    assert {"front", "cli", "editor", "builtin"} <= found.keys()
    wrong = {
        str(path.relative_to(root)): bad
        for path, module in modules(root)
        if (bad := violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bakeout.kernels.dispatch", "import bakeout.editor.model"),
        ("bakeout.kernels.dispatch", "import bakeout"),
        ("bakeout.kernels.dispatch", "from bakeout import editor"),
        ("bakeout.kernels.dispatch", "from bakeout.editor import model"),
        ("bakeout.kernels.dispatch", "from ..editor import model"),
        ("bakeout.kernels.dispatch", "from .. import editor"),
        ("bakeout.editor.methods.snce", "from ...export.lower import lower"),
        ("bakeout.editor.model", "def later():\n    from bakeout.kernels import reference"),
        ("bakeout.editor.model", "if TYPE_CHECKING:\n    from bakeout.validate.parity import Verdict"),
        ("bakeout.editor.model", "import importlib\nimportlib.import_module('bakeout.export.lower')"),
        ("bakeout.editor.model", "__import__('bakeout.builtin.shapes')"),
        ("bakeout.export.lower", "from bakeout.validate import reference"),
        ("bakeout.validate.audit", "from bakeout.cli import main"),
        ("bakeout.generate", "from bakeout import cli"),
        ("bakeout.builtin.shapes.train", "from bakeout.export import lower"),
        ("bakeout.export.lower", "import kernels.reference"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bakeout.editor.model", "from bakeout.editor.errors import InputError"),
        ("bakeout.editor.methods.snce", "from ..errors import InputError"),
        ("bakeout.export.lower", "from bakeout.kernels import reference"),
        ("bakeout.validate.audit", "from bakeout import export"),
        ("bakeout.cli", "from bakeout.validate import parity"),
        ("bakeout.kernels.dispatch", "import torch, bakeout_elsewhere"),
    ],
)
def test_a_right_import_is_allowed(module, source):
    assert not violations(source, module)


def test_a_root_folder_shadows_no_library(root):
    assert not [folder for folder in FOLDERS if (root / folder / "__init__.py").exists()]


def test_every_imported_package_is_declared(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.match(r"[\w-]+", requirement)[0].lower()
        for requirement in chain(project["dependencies"], *project["optional-dependencies"].values())
    }
    names = {
        name.split(".")[0]
        for path, module in modules(root)
        for name in imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    }
    foreign = names - set(sys.stdlib_module_names) - {"bakeout"}
    assert "torch" in foreign
    assert {DISTRIBUTIONS.get(name, name).lower() for name in foreign} <= declared


@pytest.mark.parametrize(
    "line", ["import bakeout", "import bakeout.cli", "import bakeout; dir(bakeout)", "import bakeout.generate"]
)
def test_what_help_needs_is_light(line):
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'onnx', 'onnx_ir', 'onnxruntime'}"
    program = f"{line}\nimport sys\nprint(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_public_names_are_there():
    import bakeout
    from bakeout.editor.errors import InputError

    assert bakeout.InputError is InputError
    assert all(getattr(bakeout, name) for name in bakeout.__all__)
    assert set(bakeout.__all__) <= set(dir(bakeout))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bakeout.no_such_name
