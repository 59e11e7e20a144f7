"""Keep a pipeline to the only size of latents for which its UNet was edited.

An edit whose mask differs from token to token is for latents of one height and width. Their product alone does not tell
them: 64x64 and 128x32 have the same number of tokens, and the mask of one is nonsense at the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from bakeout.editor.errors import InputError


def check_static(path: Path, shape: Sequence[object], latents: tuple[int, int] | None) -> None:
    """Raise InputError unless the UNet in `path` takes latents of the size that it should, and no others.

    Args:
        path: of the graph.
        shape: of its `sample`, [batch, channels, height, width]; a dimension that is no whole number is dynamic.
        latents: height and width; None is any, in which case both must be dynamic.
    """
    static = tuple(side for side in shape[2:] if isinstance(side, int))
    if static != (latents or ()):
        takes = _size(static) if len(static) == 2 else "several sizes"
        wanted = "any size" if latents is None else _size(latents)
        raise InputError(
            f"{path} takes latents of {takes}, and the artifact is for latents of {wanted}; export the model again"
        )


def hold_to(pipeline: Any, latents: tuple[int, int]) -> None:
    """Let a pipeline draw at one size only, which from now on is also its default.

    A call for another one is refused before anything is computed. Batch, guidance and the rest stay free. The
    image-to-image pipeline of the same components is not held; its UNet is.

    Args:
        pipeline: the text-to-image pipeline of diffusers, of any family.
        latents: height and width.
    """
    height, width = (side * pipeline.vae_scale_factor for side in latents)
    kind = type(pipeline)
    parameters = signature(kind.__call__)

    @wraps(kind.__call__)
    def draw(self: Any, *args: Any, **settings: Any) -> Any:
        call = parameters.bind(self, *args, **settings)
        given = call.arguments
        asked = given.get("height") or height, given.get("width") or width
        if asked != (height, width):
            raise InputError(f"{_draws(latents, height, width)}, not {_size(asked)}; leave height and width out")
        if (own := given.get("latents")) is not None and tuple(own.shape[-2:]) != latents:
            size = _size(own.shape[-2:])
            raise InputError(f"{_draws(latents, height, width)}, and not from latents of {size}; leave latents out")
        given |= {"height": height, "width": width}
        return kind.__call__(*call.args, **call.kwargs)

    # Python looks a call up in the class, and diffusers knows a pipeline by the name of its class.
    pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": draw, "__module__": kind.__module__})


def _draws(latents: tuple[int, int], height: int, width: int) -> str:
    return f"this model draws {_size((height, width))} only (latents of {_size(latents)})"


def _size(sides: Sequence[int]) -> str:
    """Height and width as width x height."""
    return "x".join(map(str, reversed(sides)))
