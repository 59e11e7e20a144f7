"""Bake concept erasure into text-to-image models, export them, and prove that what ships erases."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bakeout.artifact import Artifact
    from bakeout.editor.edit import Edit
    from bakeout.editor.errors import InputError
    from bakeout.editor.model import Model, open_model
    from bakeout.recipe import Recipe

__version__ = "0.1.0.dev0"
__all__ = ["Artifact", "Edit", "InputError", "Model", "Recipe", "__version__", "open_model"]

# Git writes a symbolic link as a small text file where it may not make links.
_links = [path for path in map(Path(__file__).with_name, ("editor", "export", "kernels", "validate")) if path.is_file()]
if _links:
    raise ImportError(
        "this checkout of bakeout has plain files where it needs symbolic links: in its folder run `git config "
        f"core.symlinks true` and `git checkout -- {' '.join(f'src/bakeout/{path.name}' for path in _links)}`, "
        "or install the wheel instead"
    )

# Public names load on first use: what they stand on imports torch, and `import bakeout` stays light.
_HOMES = {
    "Artifact": "bakeout.artifact",
    "Edit": "bakeout.editor.edit",
    "InputError": "bakeout.editor.errors",
    "Model": "bakeout.editor.model",
    "Recipe": "bakeout.recipe",
    "open_model": "bakeout.editor.model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bakeout' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
