"""`bakeout sae rank`: its numbers against those of the method, its picture, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bakeout.cli import main
from bakeout.editor.edit import SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.methods.snce import Settings, calibrate
from bakeout.editor.model import open_model
from bakeout.editor.prompts import Pair
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.ranking import Neuron, Ranking, describe_rankings, draw_rankings, rank_recipe
from bakeout.recipe import Recipe

SITE = "text_encoder.layer.9"
RECIPE = """
model = "shapes"
[[edits]]
method = "snce"
concept = "star"
prompts = { pack = "shapes-object" }
settings = { sae = ["sae.safetensors"], neurons = 2 }
[[edits]]
method = "conceptprune"
concept = "heart"
prompts = { pack = "shapes-object" }
[[edits]]
method = "snce"
concept = "red"
prompts = { target = "a {how} red {what}", reference = "a {how} {what}", lists = { how = ["plain", "dotted"], what = ["star", "ring"] } }
settings = { sae = ["sae.safetensors"], pairs = "vote", activations = "prompt", neurons = 3 }
"""  # noqa: E501


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(200, 96, generator=generator)
    SparseAutoencoder(
        encoder, torch.randn(200, generator=generator), encoder.T / 10, torch.zeros(96), 12, "topk", "none", SITE
    ).save(tmp_path / "sae.safetensors")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def rank(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["sae", "rank", *map(str, arguments)], prog_name="bakeout")


def test_the_first_of_the_ranking_are_what_the_edit_takes_out(recipe: Path) -> None:
    done: list[float] = []
    star, red = rank_recipe(Recipe.load(recipe), device="cpu", progress=done.append)
    assert sum(done) == pytest.approx(2)
    assert (star.concept, star.site, star.pairs, star.taken) == ("star", SITE, 24, 2)
    assert (red.concept, red.site, red.pairs, red.taken) == ("red", SITE, 2, 3)
    assert star.autoencoder == "96 → 200, TopK 12"
    assert len(star.neurons) == min(20, star.qualified)
    assert [it.score for it in star.neurons] == sorted((it.score for it in star.neurons), reverse=True)
    keys = [(it.votes, it.score) for it in red.neurons]
    assert keys == sorted(keys, reverse=True)
    model = open_model("shapes")
    pipeline = model.pipeline("cpu", torch.float32)
    edit = Recipe.load(recipe).edits[2]
    settings = edit.method_settings()
    assert isinstance(settings, Settings)
    (steered,) = calibrate(model, pipeline, "red", edit.pairs(Path()), settings, folder=recipe.parent).operations
    assert isinstance(steered, SteerLatents)
    assert steered.neurons.tolist() == sorted(it.index for it in red.neurons[:3])


def test_the_tokens_are_those_at_which_a_neuron_is_active(recipe: Path) -> None:
    _, red = rank_recipe(Recipe.load(recipe), device="cpu", top=5)
    autoencoder = SparseAutoencoder.load(recipe.parent / "sae.safetensors")
    pipeline = open_model("shapes").pipeline("cpu", torch.float32)
    counts: dict[int, dict[str, int]] = {it.index: {} for it in red.neurons}
    for target in ("a plain red star", "a dotted red ring"):
        ids = pipeline.tokenizer(target, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[10]
        before = autoencoder.preactivations(states)[0]
        names = ["(start)", *target.split(), "(end)"] + ["(padding)"] * 71
        assert len(names) == 77
        for place, token in enumerate(before.tolist()):
            awake = [i for i in sorted(range(200), key=lambda i: -token[i])[:12] if token[i] > 0]
            for i in counts.keys() & set(awake):
                counts[i][names[place]] = counts[i].get(names[place], 0) + 1
    assert any("red" in counts[it.index] for it in red.neurons)
    for it in red.neurons:
        assert dict(it.tokens) == counts[it.index]
        assert [count for _, count in it.tokens] == sorted(counts[it.index].values(), reverse=True)


def ranking(**changes: Any) -> Ranking:
    concept, deconcept = torch.zeros(60), torch.zeros(60)
    concept[[7, 20, 31]] = torch.tensor([9.0, 4.0, 16.0])
    deconcept[[20, 44]] = torch.tensor([3.0, 1.0])
    neurons = (Neuron(7, 180.25, 20, (("star", 24), ("(padding)", 1234))), Neuron(31, 2.0, 1, ()))
    whole = Ranking(
        "a $5 星", SITE, "96 → 384, TopK 8", neurons, 30, 1, 24, Pair("a $5 star_$", "a shape"), concept, deconcept
    )
    return replace(whole, **changes)


def test_the_table_marks_what_is_taken_out() -> None:
    text = describe_rankings([ranking(), ranking(neurons=(), qualified=0, taken=0, pairs=1)])
    head = (
        "'a $5 \\u661f' at text_encoder.layer.9 (96 → 384, TopK 8): {}, neurons that tell one apart: {}, of which "
        "the edit takes out {}"
    )
    assert text.split("\n") == [
        head.format("24 pairs", 30, 1), "",
        "rank  neuron  score  pairs  active at (tokens of the prompts with the concept)",
        "1 *   7       180.2  20     star 24, (padding) 1,234",
        "2     31      2.0    1", "",
        head.format("1 pair", 0, 0),
    ]  # fmt: skip


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, colour)): int(count) for colour, count in zip(found, counts, strict=True)}


RED, BLUE, GREY = (204, 51, 17), (68, 119, 170), (187, 187, 187)


def test_the_picture_shows_what_is_taken_left_and_shared(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    draw_rankings([ranking()], whole)
    found = colours(whole)
    assert min(found.get(colour, 0) for colour in (RED, BLUE, GREY)) > 50
    none_shared = ranking(deconcept_scores=torch.zeros(60))
    draw_rankings([none_shared], tmp_path / "apart.png")
    # The legend keeps its line.
    assert colours(tmp_path / "apart.png")[GREY] < found[GREY]
    draw_rankings([ranking(taken=0)], tmp_path / "left.png")
    assert RED not in colours(tmp_path / "left.png")
    draw_rankings([ranking()], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == whole.read_bytes()
    draw_rankings([ranking(), ranking(neurons=(), qualified=0, taken=0)], tmp_path / "two.png")
    with Image.open(whole) as one, Image.open(tmp_path / "two.png") as two:
        assert (two.width, two.height) == (one.width, 2 * one.height)


def test_the_command_prints_the_table_and_draws(recipe: Path) -> None:
    chart = recipe.parent / "ranking.png"
    done = rank(recipe, "-o", chart, "--top", 3, "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.count("\nrank  neuron") == 2
    assert len(re.findall(r"^[123] \*", done.stdout, re.MULTILINE)) == 5
    assert done.stdout.endswith(f"\nThe picture is {chart}\n")
    with Image.open(chart) as picture:
        assert picture.format == "PNG"
    before = chart.read_bytes()
    again = rank(recipe, "-o", chart)
    assert again.exit_code == 2
    assert "exists already: choose another file with -o, or overwrite it with --force" in again.stderr
    assert chart.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (('method = "snce"', 'method = "none"'), (), "there is no method 'none'"),
        (('["sae.safetensors"], neurons', '["gone.safetensors"], neurons'), (), "edits[0] (concept 'star'): "),
        (('["sae.safetensors"], pairs', '["../sae.safetensors"], pairs'), (), "outside the recipe's folder"),
        (("", ""), ("--top", 0), "0 neurons cannot be shown: ask for at least one"),
        (("", ""), ("-o", "ranking.jpg"), "ranking.jpg would be a PNG under another name: let it end in .png"),
    ],
)
def test_what_cannot_be_ranked_is_one_sentence(
    recipe: Path, change: tuple[str, str], arguments: tuple[Any, ...], words: str
) -> None:
    recipe.write_text(RECIPE.replace(*change) if change[0] else RECIPE)
    done = rank(recipe, *arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_a_recipe_without_snce_ranks_nothing(recipe: Path) -> None:
    text = RECIPE.partition("[[edits]]")[0] + "[[edits]]" + RECIPE.split("[[edits]]")[2]
    recipe.write_text(text)
    with pytest.raises(InputError, match='no edit of this recipe has method = "snce"'):
        rank_recipe(Recipe.load(recipe))
