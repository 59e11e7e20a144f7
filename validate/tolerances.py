"""The one table of limits, each with its reason. Distances are relative RMS."""

from __future__ import annotations

from typing import Final

from bakeout.validate.report.schema import Tolerance

PARITY: Final = Tolerance(
    name="parity",
    limit=0.05,
    reason="On prompts of what was erased the artifact may be away from the reference by a twentieth of what the edit "
    "itself moves there; an artifact without the edit is away by all of it.",
)
COMPONENT: Final = Tolerance(
    name="component-rounding",
    limit=2e-5,
    reason="Of what a text encoder or UNet gives, in fp32. ONNX Runtime and eager PyTorch were at most 1.3e-6 apart on "
    "shapes, 1.4e-6 at the size of Stable Diffusion 1.5; the rest is for other processors and deeper networks.",
)
VAE: Final = Tolerance(
    name="vae-rounding",
    limit=1e-4,
    reason="Of what a VAE's encoder or decoder gives, in fp32, whose sums go over whole pictures. ONNX Runtime and "
    "eager PyTorch were at most 1.5e-5 apart at the size of Stable Diffusion 1.5, at 512 x 512 pixels.",
)
STEP: Final = Tolerance(
    name="step-rounding",
    limit=1e-4,
    reason="Of the latents after one whole step from the same latents. 5.4e-7 was the most on shapes; guidance and "
    "scheduler multiply a network's rounding, at scale 7.5 by up to 15.",
)
DRIFT: Final = Tolerance(
    name="drift",
    limit=1e-3,
    reason="Of the latents at the end, each model on its own path, where rounding adds up over all steps. 2e-6 was the "
    "most on shapes in 20 steps; longer paths and larger models amplify more.",
)
FAR_STEP: Final = Tolerance(
    name="far-step",
    limit=5e-3,
    reason="How far the base must be from the reference after some step to prove anything: a twentieth of it is "
    "then more than rounding. On shapes it is 0.2.",
)
FAR: Final = Tolerance(
    name="far",
    limit=0.05,
    reason="How far the base must end from the reference on at least half of a concept's prompts, or nothing can be "
    "proved: a twentieth of it is then more than rounding. On shapes it is 0.9 and more.",
)
PSNR: Final = Tolerance(
    name="psnr-db",
    limit=48,
    reason="Of a picture against the reference's, in dB: an RMS of one grey value of 255. On shapes the worst was 81.",
)
DISAGREEMENT: Final = Tolerance(
    name="disagreement",
    limit=0.02,
    reason="Share of pictures on which a detector's verdict is another than on the reference's: none on shapes. "
    "Of many pictures a few on the detector's edge may fall to either side by rounding; of fewer than 50, none.",
)
RESEMBLANCE: Final = Tolerance(
    name="resemblance",
    limit=0.6,
    reason="How like the base's picture of a prompt without what was erased the reference's must be: 0 is what "
    "pictures of different prompts have in common, 1 the same picture. On shapes the median was 0.93 and more after an "
    "erasure of one concept and after the demo's of three, 0.2 to 0.81 after edits that left a detector 3 to 21 % of "
    "the pictures, 0.04 and less where they left it none.",
)
ALIKE: Final = Tolerance(
    name="alike",
    limit=0.9,
    reason="The most that the base's pictures of different prompts may have in common (their concordance), or one that "
    "was lost cannot be told from one that was kept. On shapes it is 0.05 to 0.16.",
)
LOSS: Final = Tolerance(
    name="loss",
    limit=0.25,
    reason="Share of pictures without what was erased that an edit may lose: a check fails where it is certainly more. "
    "On shapes the demo's edit of three concepts loses 6 % by resemblance and 3 % by the detector, ConceptPrune of one "
    "concept 0 % and 3 % at sparsity 0.05, 44 % and 61 % at 0.4.",
)

TABLE: Final = (PARITY, COMPONENT, VAE, STEP, DRIFT, FAR_STEP, FAR, PSNR, DISAGREEMENT, RESEMBLANCE, ALIKE, LOSS)
