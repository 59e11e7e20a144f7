"""What stands for TensorRT where it is not installed."""

import sys
from pathlib import Path

# Last, so that none of them stands for a library of its name.
sys.path.append(str(Path(__file__).parent))

from bindings import bindings, loaded_bindings
from stand_in import stand_in

__all__ = ["bindings", "loaded_bindings", "stand_in"]
