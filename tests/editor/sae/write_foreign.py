"""Write small sparse autoencoders with the libraries that train them, and what these libraries make of some inputs.

    python write_foreign.py saelens|sparsify FOLDER

runs in an environment with that library (see test_formats.py), of which the project itself has neither. Each variant is
a folder with the library's own files and `expected.safetensors`: inputs `x`, latents `z` and reconstructions `x_hat`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, LATENTS, K, TOKENS = 8, 24, 4, 32


def randomise(module, seed):
    """Every parameter normal, so that no bias and no norm can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def inputs():
    """Like the activations of a text encoder: far from zero, tokens of very different lengths."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(TOKENS, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)
    return x * torch.linspace(0.5, 20, TOKENS)[:, None]


def expect(folder, x, z, x_hat):
    tensors = {"x": x, "z": z, "x_hat": x_hat}
    save_file(
        {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()},
        folder / "expected.safetensors",
    )


def write_saelens(home):
    from sae_lens import (
        SAE,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    sizes = {"d_in": WIDTH, "d_sae": LATENTS, "metadata": SAEMetadata(hook_name="blocks.9.hook_resid_post")}
    variants = {
        "topk": TopKSAE(TopKSAEConfig(k=K, **sizes)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True, **sizes)),
        "topk-uncentred": TopKSAE(TopKSAEConfig(k=K, apply_b_dec_to_input=False, **sizes)),
        "topk-rescaled-uncentred": TopKSAE(
            TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False, **sizes)
        ),
        "topk-layer-norm": TopKSAE(TopKSAEConfig(k=K, normalize_activations="layer_norm", **sizes)),
        "topk-constant-norm": TopKSAE(TopKSAEConfig(k=K, normalize_activations="constant_norm_rescale", **sizes)),
        "standard": StandardSAE(StandardSAEConfig(**sizes)),
    }
    for seed, (name, sae) in enumerate(variants.items()):
        randomise(sae, seed)
        save_saelens(home / f"saelens-{name}", sae)
    training = TopKTrainingSAE(TopKTrainingSAEConfig(k=K, **sizes))
    randomise(training, 20)
    # A checkpoint of a training, and what the same training gives at its end.
    save_saelens(home / "saelens-topk-checkpoint", training)
    finished = home / "saelens-topk-finished"
    training.save_inference_model(finished)
    expect_of(finished, SAE.load_from_disk(finished))
    # As versions before 6 wrote it, which the library still reads.
    old = home / "saelens-topk-old"
    variants["topk"].save_model(old)
    (old / "cfg.json").write_text(
        json.dumps(
            {
                "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "device": "cpu", "architecture": "standard",
                "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True,
                "normalize_activations": "none", "hook_name": "blocks.9.hook_resid_post", "hook_layer": 9,
                "hook_head_index": None, "model_name": "clip", "sae_lens_training_version": "5.0.0",
            }
        )
    )  # fmt: skip
    expect_of(old, SAE.load_from_disk(old))


def save_saelens(folder, sae):
    sae.save_model(folder)
    expect_of(folder, sae)


def expect_of(folder, sae):
    with torch.no_grad():
        x = inputs()
        z = sae.encode(x)
        expect(folder, x, z.to_dense() if z.is_sparse else z, sae.decode(z))


def write_sparsify(home):
    from sparsify import SparseCoder, SparseCoderConfig

    variants = {
        "factor": SparseCoder(WIDTH, SparseCoderConfig(expansion_factor=LATENTS // WIDTH, k=K)),
        "latents": SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=K, multi_topk=True)),
        "half": SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=K), dtype=torch.float16),
    }
    for seed, (name, coder) in enumerate(variants.items(), 40):
        randomise(coder, seed)
        # The library saves to a folder that is called as the hook point.
        folder = home / f"sparsify-{name}" / "text_model.encoder.layers.9"
        coder.save_to_disk(folder)
        # In fp32, as it is run here; rounding in fp16 would change which latents are the largest.
        coder.float()
        with torch.no_grad():
            x = inputs()
            values, places, _ = coder.encode(x)
            z = torch.zeros(TOKENS, LATENTS).scatter(-1, places, values)
            expect(folder, x, z, coder.decode(values, places))


if __name__ == "__main__":
    {"saelens": write_saelens, "sparsify": write_sparsify}[sys.argv[1]](Path(sys.argv[2]))
