"""Draw, train and judge `shapes`: `python -m bakeout.builtin.shapes --help`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import click

PACKAGE = Path(__file__).parent


@click.group()
def main() -> None:
    """Draw the world of `shapes`, train the model on it, and judge what the model draws."""


@main.command()
@click.option("-n", "--count", default=64, show_default=True, help="Number of drawings.")
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The picture to write (PNG).")
def drawings(count: int, seed: int, out: Path) -> None:
    """Write a sheet of drawings as the training sees them, and print a caption of each."""
    import numpy as np
    from PIL import Image

    from bakeout.builtin.shapes.scenes import captions, draw, sample_scene

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    for scene in scenes:
        click.echo(captions(scene, rng)[0])
    across = max(1, round(count**0.5))
    pictures = [draw(scene) for scene in scenes]
    pictures += [np.zeros_like(pictures[0])] * (-count % across)
    rows = [np.concatenate(pictures[i : i + across], axis=1) for i in range(0, len(pictures), across)]
    Image.fromarray(np.concatenate(rows)).save(out)


@main.command()
@click.option("--count", default=300, show_default=True, help="Number of prompts.")
@click.option("--save", is_flag=True, help="Keep the numbers beside the model, for `bakeout inspect shapes`.")
def evaluate(count: int, save: bool) -> None:
    """Draw with the shipped model, judge the pictures, and print the table of accuracies."""
    import torch

    from bakeout.builtin.shapes.detector import load_detector
    from bakeout.builtin.shapes.evaluation import measure, write_accuracy
    from bakeout.builtin.shapes.similarity import load_image_encoder
    from bakeout.describe import describe_accuracy
    from bakeout.editor.model import open_model

    pipeline = open_model("shapes").pipeline(dtype=torch.float32)
    measured = measure(pipeline, load_detector(), load_image_encoder(), count)
    if save:
        write_accuracy(measured, PACKAGE / "model")
    click.echo(describe_accuracy(measured))


@main.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/shapes"), show_default=True,
              help="Where checkpoints and logs go; a run that was interrupted goes on from there.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=PACKAGE,
              help="Where the finished model goes. [default: into this package]")  # fmt: skip
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Change a setting of the training.")
def train(run: Path, out: Path, changes: tuple[str, ...]) -> None:
    """Train everything: tokenizer, CLIP, VAE, detector, UNet. Took about an hour on four cores."""
    from bakeout.builtin.shapes.training import Settings, Workshop

    known = [field.name for field in fields(Settings)]
    settings = {}
    for change in changes:
        name, _, number = change.partition("=")
        if name not in known:
            raise click.BadParameter(f"no setting {name!r}; there are {', '.join(known)}")
        try:
            settings[name] = json.loads(number)
        except json.JSONDecodeError:
            raise click.BadParameter(f"{name} takes a number, not {number!r}") from None
    Workshop(run, Settings(**settings)).ship(out)


@main.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=PACKAGE / "sae.safetensors",
              help="Where it goes. [default: into this package]")  # fmt: skip
def autoencoder(out: Path) -> None:
    """Train the sparse autoencoder that ships with the model, and store it in half precision. Takes minutes."""
    import tempfile

    import torch

    from bakeout.sae import prompts_from, train

    with tempfile.TemporaryDirectory() as folder:
        made = train(
            "shapes", prompts_from(["shapes"]), Path(folder) / "sae.safetensors", tokens=10_000_000, k=4, seed=3,
            device="cpu", told=click.echo,
        )  # fmt: skip
    made.to(torch.float16).save(out)


if __name__ == "__main__":
    main()
