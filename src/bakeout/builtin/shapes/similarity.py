"""CLIP similarity on `shapes`: its text encoder and the image tower that was trained with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from bakeout.builtin.shapes.detector import tensor_from_pictures

IMAGE_ENCODER = Path(__file__).parent / "image_encoder"


def load_image_encoder(folder: Path = IMAGE_ENCODER) -> Any:
    """The shipped image tower in float32, a CLIPVisionModelWithProjection as wide as the text encoder."""
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.inference_mode()
def clip_similarity(
    texts: Sequence[str], pictures: Sequence[Image.Image] | NDArray[np.uint8], pipeline: Any, image_encoder: Any
) -> Tensor:
    """Cosine of every text's embedding with every picture's, float32 [texts, pictures] (Radford et al., 2021).

    A text's embedding is the pooled output of the pipeline's text encoder; the tower projects pictures to its width.
    """
    tokens = pipeline.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    words = pipeline.text_encoder(input_ids=tokens.input_ids).pooler_output.float()
    seen = image_encoder(pixel_values=tensor_from_pictures(pictures)).image_embeds
    return functional.normalize(words, dim=-1) @ functional.normalize(seen, dim=-1).T
