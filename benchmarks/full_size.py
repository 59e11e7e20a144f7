"""A Stable Diffusion of full size with random weights, in the real format: a diffusers folder in fp16.

    python benchmarks/full_size.py sd15 FOLDER
    python benchmarks/full_size.py sdxl FOLDER

Nothing can be drawn with it; it has the shapes, the files and the size of the real one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bakeout.editor import single_file
from bakeout.editor.architecture import build
from bakeout.editor.model_files import WEIGHT_STEMS

CONFIGS = single_file.TOKENIZER.parent


def write_full_size(
    name: str, folder: Path, seed: int = 0, smaller: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> None:
    """Write the model `name`, a folder of `editor/configs`, into the new folder `folder`.

    `smaller` says by component what its configuration has in place of the real values. Weights are normal with variance
    1 / fan-in, norms 1 and biases 0, so that activations keep their size.
    """
    shutil.copytree(CONFIGS / name, folder)
    index = json.loads((folder / "model_index.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    for component, stem in WEIGHT_STEMS.items():
        if component in index:
            path = folder / component / "config.json"
            config = {**json.loads(path.read_text()), **smaller.get(component, {})}
            path.write_text(json.dumps(config))
            module = build(index[component][1], config)
            state = {key: _random(key, value.shape, generator) for key, value in module.named_parameters()}
            save_file(state, folder / component / f"{stem}.safetensors", metadata={"format": "pt"})
    for tokenizer in folder.glob("tokenizer*"):
        for path in CONFIGS.glob("clip_tokenizer/*"):
            # What it says of the padding is not so of SDXL's second tokenizer, and each has a configuration that is.
            if path.name != "special_tokens_map.json" and not (tokenizer / path.name).exists():
                shutil.copy(path, tokenizer / path.name)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    return (torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5).half()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("sd15", "sdxl"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write_full_size(given.name, given.folder)
