"""The target `tensorrt`: engines built from ONNX graphs, checked as they ship, and run."""
