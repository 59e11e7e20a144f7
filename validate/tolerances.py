"""The one table of limits, each with its reason. Distances are relative RMS.

What rounding may do depends on the precision in which a target computes; what an edit must do does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
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


@dataclass(frozen=True)
class Limits:
    """What rounding may do in a precision, and how far the base must be from the reference to prove anything in it.

    Attributes:
        precision: `fp32`, `fp16` or `bf16`.
        component: of what text encoders and UNets give.
        vae: of what a VAE's encoder and decoder give.
        step: of the latents after one step.
        drift: of the latents at the end.
        far_step: the least after some step.
        far: the least at the end.
        psnr: of pictures, at least.
        disagreement: of a detector.
    """

    precision: str
    component: Tolerance
    vae: Tolerance
    step: Tolerance
    drift: Tolerance
    far_step: Tolerance
    far: Tolerance
    psnr: Tolerance
    disagreement: Tolerance

    def of(self, network: str) -> Tolerance:
        """That of what a network gives, by its name in the contract."""
        return self.vae if network.startswith("vae_") else self.component

    @property
    def table(self) -> tuple[Tolerance, ...]:
        """All of them."""
        return tuple(getattr(self, it.name) for it in fields(self)[1:])


FP32: Final = Limits("fp32", COMPONENT, VAE, STEP, DRIFT, FAR_STEP, FAR, PSNR, DISAGREEMENT)
_VAE_ON_GPU: Final = Tolerance(
    name="vae-rounding-16",
    limit=5e-3,
    reason="Of what a VAE's encoder or decoder gives beside networks in fp16 or bf16. It is in fp32, of which a GPU "
    "may multiply ten bits (TF32), 2.8e-4 a rounding. On a CPU it was 1e-6 on shapes.",
)
FP16: Final = Limits(
    "fp16",
    component=Tolerance(
        name="component-rounding-fp16",
        limit=1e-2,
        reason="Of what a text encoder or UNet gives, in fp16, one rounding of which is 2.8e-4. Of shapes "
        "ONNX Runtime's were at most 4.6e-4 away, and eager PyTorch's, which rounds after each layer, 1.2e-3; the rest "
        "is for deeper networks, and for products that a GPU sums up in fp16.",
    ),
    vae=_VAE_ON_GPU,
    step=Tolerance(
        name="step-rounding-fp16",
        limit=5e-3,
        reason="Of the latents after one whole step from the same latents, in fp16. On shapes it was 5.5e-4 in ONNX "
        "Runtime, 1.2e-3 in eager PyTorch.",
    ),
    drift=Tolerance(
        name="drift-fp16",
        limit=0.02,
        reason="Of the latents at the end, each model on its own path, in fp16. On shapes it was 6.1e-4 in "
        "ONNX Runtime and 3.2e-3 in eager PyTorch, 8e-3 on the worst prompt.",
    ),
    far_step=Tolerance(
        name="far-step-fp16",
        limit=0.1,
        reason="How far the base must be from the reference after some step to prove anything of a target in fp16: a "
        "twentieth of it is rounding there. On shapes it is 0.2 and more.",
    ),
    far=Tolerance(
        name="far-fp16",
        limit=0.4,
        reason="How far the base must end from the reference on at least half of a concept's prompts to prove anything "
        "of a target in fp16: a twentieth of it is rounding there. On shapes it is 0.9 and more.",
    ),
    psnr=Tolerance(
        name="psnr-db-fp16",
        limit=30,
        reason="Of a picture against the reference's, in dB, of a target in fp16: an RMS of 8 grey values of 255. On "
        "shapes the worst was 64 in ONNX Runtime, 50 in eager PyTorch.",
    ),
    disagreement=DISAGREEMENT,
)
BF16: Final = Limits(
    "bf16",
    component=Tolerance(
        name="component-rounding-bf16",
        limit=5e-2,
        reason="Of what a text encoder or UNet gives, in bf16, one rounding of which is 2.3e-3. Rounded after each "
        "layer, the UNet of shapes was 1e-2 away and its text encoder 7.4e-3; the rest is for deeper networks.",
    ),
    vae=_VAE_ON_GPU,
    step=Tolerance(
        name="step-rounding-bf16",
        limit=0.02,
        reason="Of the latents after one whole step from the same latents, in bf16. 9.2e-3 was the most on shapes, "
        "1e-2 on the worst prompt, in eager PyTorch.",
    ),
    drift=Tolerance(
        name="drift-bf16",
        limit=0.2,
        reason="Of the latents at the end, each model on its own path, in bf16. 0.036 was the most on shapes in 20 "
        "steps, 0.09 on the worst of 12 prompts, in eager PyTorch.",
    ),
    far_step=Tolerance(
        name="far-step-bf16",
        limit=0.2,
        reason="How far the base must be from the reference after some step to prove anything of a target in bf16: a "
        "tenth of it is rounding there, so up to a tenth of the edit may be missing unseen. On shapes it is 0.2 and "
        "more.",
    ),
    far=Tolerance(
        name="far-bf16",
        limit=0.8,
        reason="How far the base must end from the reference on at least half of a concept's prompts to prove anything "
        "of a target in bf16: a quarter of it is rounding there. On shapes it is 0.9 and more.",
    ),
    psnr=Tolerance(
        name="psnr-db-bf16",
        limit=20,
        reason="Of a picture against the reference's, in dB, of a target in bf16: an RMS of 25 grey values of 255. On "
        "shapes the worst was 30 in eager PyTorch.",
    ),
    disagreement=Tolerance(
        name="disagreement-bf16",
        limit=0.05,
        reason="Share of pictures on which a detector's verdict is another than on the reference's, of a target in "
        "bf16: none on shapes. Of fewer than 20 none may be.",
    ),
)
LIMITS: Final[Mapping[str, Limits]] = {it.precision: it for it in (FP32, FP16, BF16)}
TABLE: Final = (PARITY, *FP32.table, RESEMBLANCE, ALIKE, LOSS)


def table_of(precisions: Iterable[str]) -> tuple[Tolerance, ...]:
    """The table for targets of some precisions; that of fp32 is always there."""
    own = [LIMITS[it].table for it in ("fp16", "bf16") if it in set(precisions)]
    # A limit that holds for several precisions is one.
    return tuple(dict.fromkeys((*TABLE, *(tolerance for each in own for tolerance in each))))
