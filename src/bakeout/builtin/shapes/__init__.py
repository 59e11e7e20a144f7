"""`shapes`: a small Stable Diffusion of our own, trained on drawings, with a detector that judges its pictures."""

from bakeout.builtin.shapes.detector import Detector, load_detector

__all__ = ["Detector", "load_detector"]
