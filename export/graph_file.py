"""An ONNX graph as a file, with its weights inside as far as they fit, else in `model.onnx_data` beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from bakeout.export.checkpoint import sync_files

DATA: Final = "model.onnx_data"
# What protobuf holds in one file is 2 GiB, of which the graph itself takes a few MB.
MAX_INLINE: Final = 2_000_000_000


def save_graph(model: ir.Model, path: Path) -> None:
    """Write `model` and flush it to the disk; its weights are read one after the other.

    Raises:
        OSError: it cannot be written.
        Exception: whatever reading a weight raises.
        onnx.checker.ValidationError: the graph is not valid, or its types do not agree.
    """
    size = sum(it.const_value.nbytes for it in model.graph.initializers.values() if it.const_value is not None)
    inline = size <= MAX_INLINE
    if inline:
        # What is read from elsewhere would go on pointing there.
        ir.external_data.load_to_model(model)
    try:
        ir.save(model, path, external_data=None if inline else DATA)
    except ir.serde.SerdeError as error:
        # What reading a weight raises comes wrapped, once a level.
        cause: BaseException = error
        while isinstance(cause, ir.serde.SerdeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    sync_files(path.parent)
    onnx.checker.check_model(path, full_check=True)
