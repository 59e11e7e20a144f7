"""Reports of every kind, with pictures of `shapes`; nothing is validated for them."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from bakeout.builtin.shapes.scenes import draw, sample_scene
from bakeout.validate.report.schema import (
    Check,
    Curve,
    Detection,
    Drawn,
    Kind,
    Report,
    Scene,
    TensorParity,
    Tolerance,
    Worst,
)

Made = tuple[Report, dict[str, bytes]]
STEPS = 20
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
HOSTILE = (
    "a star</p></article><script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>",
    "a star \u202etxt.egnaro\u202c & \"quotes\" 'and' <b>bold</b> \x07 bell",
    "نجمة \u2067 على العشب \u200f",
    "a star " + "very " * 396 + "bright",
    "x" * 2000,
    "\U0001f31f \U0001f469\u200d\U0001f3a8 \ufeff \u6587\u5b57",
)


def png(seed: int, size: int = 64, noise: int = 0) -> bytes:
    """A picture of `shapes`; `noise` is the largest change of a value."""
    rng = np.random.default_rng(seed)
    values = draw(sample_scene(rng)).astype(int)
    values += np.random.default_rng(seed + 1).integers(-noise, noise + 1, values.shape)
    made = io.BytesIO()
    picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    picture.resize((size, size), Image.Resampling.NEAREST).save(made, "PNG")
    return made.getvalue()


def flat(size: int = 64) -> bytes:
    """A black picture."""
    made = io.BytesIO()
    Image.new("RGB", (size, size)).save(made, "PNG")
    return made.getvalue()


def curve(model: str, kind: Kind, start: float, end: float, *, forced: bool, lost_from: int | None = None) -> Curve:
    values = [
        None if lost_from is not None and step >= lost_from else start * (end / start) ** (step / (STEPS - 1))
        if start else 0.0
        for step in range(STEPS)
    ]  # fmt: skip
    return Curve(model=model, forced=forced, kind=kind, relative_rms=tuple(values))


def detection(kind: Kind, model: str, detected: int, pictures: int, concept: str = "star") -> Detection:
    interval = stats.binomtest(detected, pictures).proportion_ci(0.95)
    return Detection(
        concept=concept, kind=kind, model=model, detected=detected, pictures=pictures, low=float(interval.low),
        high=float(interval.high), confidence=0.95,
    )  # fmt: skip


def tensor(target: str, component: str, output: str, rms: float | None, **more: Any) -> TensorParity:
    values = {
        "target": target, "component": component, "output": output, "kind": "erased", "call": "prompts 1-4",
        "shape": (8, 77, 64), "relative_rms": rms, "sqnr_db": -20 * math.log10(rms) if rms else None,
        "base_relative_rms": 0.0, "limit": 1e-4,
        "worst": Worst(index=(3, 14, 15), artifact=0.92653, reference=0.92654) if rms else None,
    }  # fmt: skip
    return TensorParity.model_validate(values | more)


def scene(index: int, prompt: str, kind: Kind, targets: tuple[str, ...], files: dict[str, bytes], size: int) -> Scene:
    reference = png(index, size)
    pictures = {"base": png(index + (1000 if kind == "erased" else 0), size), "reference": reference}
    pictures |= {target: png(index, size, noise=(index + place) % 2) for place, target in enumerate(targets)}
    drawn = {}
    for model, picture in pictures.items():
        file = f"pictures/{index:03}-{model}.png"
        files[file] = picture
        near = {"psnr_db": 57.123 - index % 7, "ssim": 0.99987, "max_difference": 1} if model in targets else {}
        far = {"psnr_db": 11.4, "ssim": 0.61, "max_difference": 243} if model == "base" else {}
        same = {"psnr_db": None, "ssim": None, "max_difference": None}
        if picture == reference and model != "reference":
            near = far = {"psnr_db": None, "ssim": 1.0, "max_difference": 0}
        seen = "star, striped, red, on grass" if model == "base" and kind == "erased" else "ring, plain, red, on sand"
        drawn[model] = Drawn(file=file, problem=None, seen=seen, **(same | near | far))
    return Scene(prompt=prompt, seed=index, kind=kind, drawn=drawn)


def passing(count: int = 24, targets: tuple[str, ...] = ("onnx", "diffusers"), size: int = 64) -> Made:
    files: dict[str, bytes] = {}
    half = count // 2
    scenes = [
        scene(index, "a striped red star on grass", "erased", targets, files, size)
        if index < half
        else scene(index, "a plain red ring on sand", "kept", targets, files, size)
        for index in range(count)
    ]
    checks = [
        Check(name=name, target=target, verdict="pass", summary=summary, measured=measured, limit=limit)
        for target in targets
        for name, summary, measured, limit in (
            ("weights", "All 428 weights are those of the base with the edit, bit for bit.", None, None),
            ("components", "The worst of 31 tensors is 3.1e-7 from the reference, of 1e-4 allowed.", 3.1e-7, 1e-4),
            ("step-parity", "The steps end 0.0002 of the way from the reference to the base, of 0.05.", 2e-4, 0.05),
            ("pictures", "No value of a picture differs by more than 1 of 255.", 1.0, 3.0),
        )
    ]
    checks.append(Check(name="files", target=None, verdict="pass", summary="Every file is as it was baked."))
    curves = [
        curve(model, kind, start, end, forced=forced)
        for forced, kind, model, start, end in (
            (True, "erased", "base", 4e-3, 9e-3), (True, "kept", "base", 4e-4, 2e-3),
            (False, "erased", "base", 4e-3, 0.62), (False, "kept", "base", 4e-4, 0.08),
            *((True, kind, target, 2e-7 * (1 + place), 4e-7 * (1 + place))
              for kind in ("erased", "kept") for place, target in enumerate(targets)),
            *((False, kind, target, 2e-7 * (1 + place), 9e-6 * (1 + place))
              for kind in ("erased", "kept") for place, target in enumerate(targets)),
        )
    ]  # fmt: skip
    tensors = [
        tensor(target, "text_encoder", output, 8e-7 * (1 + place)) for target in targets
        for place, output in enumerate(("last_hidden_state", "pooler_output"))
    ] + [
        tensor(target, "unet", "out_sample", 3e-7 * step, kind=kind, call=f"step {step} of {STEPS}",
               shape=(8, 4, 8, 8), base_relative_rms=0.21 if kind == "erased" else 0.013)
        for target in targets for kind in ("erased", "kept") for step in (1, 5, 10, 15, 20)
    ] + [tensor(target, "vae_decoder", "sample", 0.0, shape=(4, 3, 64, 64)) for target in targets]  # fmt: skip
    detections = [
        detection("erased", "base", half, half), detection("erased", "reference", half // 12, half),
        *(detection("erased", target, half // 12, half) for target in targets),
        detection("kept", "base", half, half), detection("kept", "reference", half - half // 12, half),
        *(detection("kept", target, half - half // 12, half) for target in targets),
    ]  # fmt: skip
    report = Report(
        version=1, verdict="pass", artifact="starless", manifest="ab" * 32, base="shapes", edit="cd" * 32,
        erased=("star (conceptprune, 20 pairs)",), profile="release" if count > 100 else "quick",
        settings={"steps": STEPS, "guidance": 4.0, "scheduler": "ddim", "size": [64, 64], "seeds": "0 to 23",
                  "negative prompt": "", "providers": ["CPUExecutionProvider"]},
        tools={"bakeout": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "onnxruntime": "1.31.1"},
        checks=tuple(checks), tensors=tuple(tensors), curves=tuple(curves), scenes=tuple(scenes),
        detections=tuple(detections), detector="shapes, five convolutions",
        tolerances=(
            Tolerance(name="components", limit=1e-4, reason="ONNX Runtime and PyTorch add up in another order; 100 "
                      "times what was measured."),
            Tolerance(name="step-parity", limit=0.05, reason="A twentieth of what the edit changes cannot be seen."),
        ),
        seconds=83.4,
    )  # fmt: skip
    return report, files


def failing(count: int = 24) -> Made:
    """NaN from step 7 on, outputs that are missing, black pictures, and prompts that want out of the page."""
    report, files = passing(count)
    scenes = list(report.scenes)
    for index, prompt in enumerate(HOSTILE):
        drawn = dict(scenes[index].drawn)
        if index % 2:
            file = drawn["onnx"].file
            files[file] = flat()
            drawn["onnx"] = Drawn(
                file=file, psnr_db=6.1, ssim=0.01, max_difference=255, problem="the picture is black", seen=None
            )
        elif index == 4:
            del files[drawn.pop("onnx").file]
        scenes[index] = Scene(prompt=prompt, seed=index, kind=scenes[index].kind, drawn=drawn)
    changed = [
        Check(name="components", target="onnx", verdict="fail",
              summary="unet gives NaN at 3 of 5 steps, and text_encoder lacks pooler_output.", limit=1e-4),
        Check(name="step-parity", target="onnx", verdict="fail", limit=0.05,
              summary="The latents are not finite from step 7 of 20 on."),
        Check(name="erasure", target="onnx", verdict="unjudged", summary="5 of 12 pictures are no pictures."),
    ]  # fmt: skip
    replaced = {(check.target, check.name) for check in changed}
    kept = [check for check in report.checks if (check.target, check.name) not in replaced]
    curves = [
        it if it.model != "onnx" else curve("onnx", it.kind, 3e-4, 2.0, forced=it.forced, lost_from=7)
        for it in report.curves
    ]
    tensors = [
        tensor("onnx", "text_encoder", "pooler_output", None, problem="the artifact has no such output", shape=()),
        tensor("onnx", "unet", "out_sample", None, call="step 10 of 20", shape=(8, 4, 8, 8),
               problem="512 of 2,048 elements are not finite",
               worst=Worst(index=(0, 3, 7, 7), artifact=None, reference=-1.25)),
        tensor("onnx", "unet", "out_sample", 0.3, call="step 5 of 20", shape=(8, 4, 8, 8)),
        *report.tensors[3:],
    ]  # fmt: skip
    update = {"verdict": "fail", "checks": (*changed, *kept), "scenes": scenes, "curves": curves, "tensors": tensors}
    return remade(report, **update), files


def unjudged() -> Made:
    """An edit that changes nothing to speak of, on a model without a detector, drawn at 512 pixels."""
    report, files = passing(6, ("onnx",), size=512)
    check = Check(
        name="reference", target=None, verdict="unjudged", measured=3e-6, limit=0.01,
        summary="The reference is 3e-6 from the base on prompts of the concept, so nothing can be proved.",
    )  # fmt: skip
    curves = [it if it.model != "base" else curve("base", it.kind, 0.0, 0.0, forced=it.forced) for it in report.curves]
    scenes = [
        it.model_copy(update={"drawn": {name: it.model_copy(update={"seen": None}) for name, it in it.drawn.items()}})
        for it in report.scenes
    ]
    update = {
        "verdict": "unjudged", "checks": (check, *report.checks), "detections": (), "detector": None, "curves": curves,
        "scenes": scenes,
    }  # fmt: skip
    return remade(report, **update), files


def remade(report: Report, **update: Any) -> Report:
    """The report with other values, checked as every report is."""
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in update.items()}
    return Report(**{name: changed.get(name, getattr(report, name)) for name in Report.model_fields})


SAMPLES: dict[str, Callable[[], Made]] = {"pass": passing, "fail": failing, "unjudged": unjudged}


@pytest.fixture(scope="session")
def samples() -> Callable[[str], Made]:
    """A report of a verdict and its pictures, made once."""
    made: dict[str, Made] = {}

    def sample(name: str) -> Made:
        if name not in made:
            made[name] = SAMPLES[name]() if name in SAMPLES else passing(600)
        return made[name]

    return sample


@pytest.fixture(scope="session")
def remake() -> Callable[..., Report]:
    """`remade`."""
    return remade


@dataclass(frozen=True)
class View:
    """A page, and how it is looked at: pixels, and `light` or `dark`."""

    page: str
    width: int
    scheme: str
    height: int = 740

    @property
    def frame(self) -> str:
        """A window cannot be as narrow as a phone, so the page is in a frame, with its own policy in force."""
        style = f"border: 0; display: block; color-scheme: {self.scheme}"
        size = f"width={self.width} height={self.height}"
        return f'<iframe {size} style="{style}" srcdoc="{html.escape(self.page)}"></iframe>'


@dataclass(frozen=True)
class Browser:
    """Headless Chromium, driven by its command line alone."""

    program: str
    home: Path

    def measure(self, views: Sequence[View], script: str) -> list[Any]:
        """What the JavaScript expression `script` gives for the document `page` of the window `view` of each."""
        dom = self.run(
            "".join(view.frame for view in views)
            + f"<script>const look = (view, page) => {script};"
            + "onload = () => document.body.dataset.found = JSON.stringify([...document.querySelectorAll('iframe')]"
            + ".map(it => look(it.contentWindow, it.contentDocument)))</script>",
            "--dump-dom",
        )
        found = re.search('data-found="(.*?)"', dom)
        assert found, dom[-2000:]
        measured: list[Any] = json.loads(html.unescape(found[1]))
        return measured

    def pictures(self, views: Sequence[View]) -> list[Image.Image]:
        """The first screen of each."""
        file = self.home / "screen.png"
        window = max(view.width for view in views), sum(view.height for view in views)
        self.run(
            "".join(view.frame for view in views), f"--screenshot={file}", "--hide-scrollbars",
            f"--window-size={window[0]},{window[1]}",
        )  # fmt: skip
        tops = accumulate((view.height for view in views), initial=0)
        with Image.open(file) as picture:
            whole = picture.convert("RGB")
        return [whole.crop((0, top, view.width, top + view.height)) for top, view in zip(tops, views, strict=False)]

    def run(self, body: str, *arguments: str) -> str:
        """Open a document, and give what the browser prints."""
        file = self.home / "opened.html"
        file.write_text(
            f"<!doctype html><meta charset=utf-8><style>body {{ margin: 0 }}</style><body>{body}", encoding="utf-8"
        )
        command = (self.program, *_OPTIONS, f"--user-data-dir={self.home / 'profile'}", *arguments, file.as_uri())
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """Where CI is set there must be one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "there is no chromium, chromium-browser or google-chrome here; install chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return Browser(found, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="session")
def view() -> type[View]:
    """`View`."""
    return View
