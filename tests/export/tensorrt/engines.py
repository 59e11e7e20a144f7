"""A folder of the stand-in's engines, and the record of how they were made."""

from __future__ import annotations

import shutil
from pathlib import Path

import stand_in as trt

from bakeout.export.manifest import Engine, Shapes, Tensorrt
from bakeout.export.tensorrt.engine import ENGINE
from bakeout.export.tensorrt.shapes import profile_of

GRAPHS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")


def built(source: Path, folder: Path, shapes: Shapes) -> Path:
    """The stand-in's engines of a folder of graphs, with what lies beside them."""
    for path in source.iterdir():
        if path.name not in GRAPHS:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    for name in GRAPHS:
        if not (source / name).exists():
            continue
        (folder / name).mkdir(parents=True)
        shutil.copyfile(source / name / "config.json", folder / name / "config.json")
        builder = trt.Builder(trt.Logger())
        network, config = builder.create_network(), builder.create_builder_config()
        assert trt.OnnxParser(network, trt.Logger()).parse_from_file(str(source / name / "model.onnx"))
        profile = builder.create_optimization_profile()
        for given, (least, usual, most) in profile_of(source, name, shapes).items():
            profile.set_shape(given, least, usual, most)
        config.add_optimization_profile(profile)
        (folder / name / ENGINE).write_bytes(builder.build_serialized_network(network, config))
    return folder


def record(shapes: Shapes) -> Tensorrt:
    engine = Engine(key="0" * 64, layers=1, plugins=0, error=0.0)
    return Tensorrt(
        precision="fp32", shapes=shapes, shrink=0, widths={}, version=trt.__version__, gpu="NVIDIA Stand-in",
        capability=(8, 9), driver="580.65.06", engines={"unet": engine}, tools={},
    )  # fmt: skip
