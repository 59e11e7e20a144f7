"""The networks of `shapes`: diffusers' and transformers' own classes, small.

Typed Any, because those classes inherit what no type checker sees.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bakeout.builtin.shapes.scenes import ATTRIBUTES

TEXT_WIDTH = 96
LATENT_SIZE = 8


def text_encoder(tokenizer: Any) -> Any:
    """Twelve layers of width 96, as deep as Stable Diffusion 1.x's; the pooled output is the CLIP embedding."""
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def image_encoder() -> Any:
    """CLIP's image tower: 64 patches of 8 x 8 pixels, four layers of width 64."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    return CLIPVisionModelWithProjection(config)


def autoencoder() -> Any:
    """Eight pixels a latent cell, four latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )


def unet() -> Any:
    """Two resolutions, three transformer layers a block and lean residual blocks, so that concepts live in the FFNs."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        transformer_layers_per_block=3,
        attention_head_dim=(2, 3),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def scheduler() -> Any:
    """DPM-Solver++ on Stable Diffusion's noise levels."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
    )


def latent_classifier() -> nn.Sequential:
    """Latents [n, 4, 8, 8] to the logits of all attributes, one after the other: [n, number of values]."""
    values = sum(map(len, ATTRIBUTES.values()))
    return nn.Sequential(
        nn.Conv2d(4, 48, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, values),
    )
