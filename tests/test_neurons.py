"""What is told of an autoencoder and its neurons, derived again from all activations at once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import click
import pytest
import torch
from click.testing import CliRunner

from bakeout.cli import main
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.sae.activations import CHUNK
from bakeout.editor.sae.model import SparseAutoencoder, fidelity
from bakeout.neurons import (
    BINS,
    EXAMPLES,
    Example,
    attached,
    describe_neurons,
    doubt,
    examine,
    inspect_autoencoder,
    marker,
    measure,
    most_active,
)

WIDTH, LATENTS, K, POSITIONS = 8, 24, 4, 5
SITE = "text_encoder.layer.9"
WORDS = ("star", "ring", "cross", "heart", "moon", "square")
COLOURS = ("red", "blue", "green", "pink", "cyan", "orange", "purple", "yellow")
PLACES = ("on grass", "at night", "in the snow", "on sand", "in the sky", "on bricks")
PROMPTS = [f"a {colour} {word} {place}" for colour in COLOURS for word in WORDS for place in PLACES]


@pytest.fixture(scope="module")
def autoencoder():
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(LATENTS, WIDTH, generator=generator)
    # The last latent never answers.
    bias = torch.randn(LATENTS, generator=generator).index_fill(0, torch.tensor([LATENTS - 1]), -1e4)
    return SparseAutoencoder(
        encoder, bias, encoder.T / encoder.norm(dim=1) ** 2, torch.randn(WIDTH, generator=generator), K, "topk",
        "none", SITE,
    )  # fmt: skip


@dataclass
class Made:
    """Activations made of a prompt's letters; says how much of them is alive at a time."""

    width: ClassVar[int] = WIDTH
    positions: ClassVar[int] = POSITIONS
    sizes: list[int] = field(default_factory=list)
    earlier: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    held: int = 0

    def __call__(self, prompts):
        self.held = max(self.held, sum(it() is not None for it in self.earlier))
        self.sizes.append(len(prompts))
        seeds = [sum(place * ord(letter) for place, letter in enumerate(prompt, 1)) for prompt in prompts]
        rows = [torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        made = torch.stack(rows) * 3 + 1
        self.earlier.append(weakref.ref(made))
        return made


def rms(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


def test_the_measures_are_those_of_all_activations_at_once(autoencoder):
    prompts = PROMPTS[:200]
    found = measure(autoencoder, Made(), prompts)
    x = Made()(prompts).reshape(-1, WIDTH)
    z = autoencoder.encode(x)
    wanted = fidelity(autoencoder, x)
    assert found.prompts == 200
    assert found.fidelity.tokens == wanted.tokens == 1000
    assert found.fidelity.l0 == wanted.l0
    assert found.fidelity.dead_share == wanted.dead_share >= 1 / LATENTS
    assert abs(found.fidelity.variance_explained - wanted.variance_explained) <= 1e-9
    off = (autoencoder.reconstruct(x) - x).double()
    centred = 1 - off.var(0, unbiased=False).sum() / x.double().var(0, unbiased=False).sum()
    assert abs(found.but_for_a_constant - float(centred)) <= 1e-9
    assert found.but_for_a_constant > found.fidelity.variance_explained + 1e-3
    assert torch.equal(found.active, (z > 0).sum(0))
    assert torch.equal(found.largest, z.amax(0))
    later = z.reshape(-1, POSITIONS, LATENTS)[:, 1:].double().sum((0, 1))
    assert rms(found.total, later) <= 1e-6 < 1e-2 < rms(found.total, z.double().sum(0))


def test_the_most_active_are_those_of_the_largest_sums(autoencoder):
    found = measure(autoencoder, Made(), PROMPTS[:50])
    order = sorted(range(LATENTS), key=lambda index: -float(found.total[index]))
    assert most_active(found, 3) == tuple(order[:3])
    # One that is never active is not among them, however many are asked for.
    assert LATENTS - 1 not in most_active(found, LATENTS)


def test_a_neuron_s_numbers_and_examples_are_those_of_all_activations(autoencoder):
    # Each prompt twice: the second one is no example of its own.
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    activity = measure(autoencoder, Made(), prompts)
    neurons = (7, 0, LATENTS - 1)
    found = examine(autoencoder, Made(), prompts, neurons, activity)
    every = autoencoder.encode(Made()(PROMPTS))
    for neuron, index in zip(found, neurons, strict=True):
        z = every[..., index]
        assert (neuron.index, neuron.tokens) == (index, len(prompts) * POSITIONS)
        assert neuron.active == sum(neuron.counts) == 2 * int((z > 0).sum())
        assert neuron.prompts == 2 * int((z > 0).any(1).sum())
        best = sorted(range(len(PROMPTS)), key=lambda row: -float(z[row].max()))[:EXAMPLES]
        best = [row for row in best if z[row].max() > 0]
        assert [it.prompt for it in neuron.examples] == [PROMPTS[row] for row in best]
        assert [it.position for it in neuron.examples] == [int(z[row].argmax()) for row in best]
        assert [it.activation for it in neuron.examples] == [float(z[row].max()) for row in best]
        if neuron.active:
            assert neuron.largest == float(z.max())
            wanted = torch.histc(z[z > 0], BINS, 0, neuron.largest).long() * 2
            assert (torch.tensor(neuron.counts) - wanted).abs().sum() <= 4  # at the edges of intervals
    assert found[0].active > 100 > found[2].active == 0


def test_memory_does_not_grow_with_the_prompts(autoencoder):
    class Endless:
        """Texts that nobody holds, as many as a file has."""

        def __iter__(self):
            return (f"a {number}" for number in range(1_000))

    made = Made()
    activity = measure(autoencoder, made, Endless())
    (neuron,) = examine(autoencoder, made, Endless(), [7], activity)
    assert sum(made.sizes) == 2_000
    assert max(made.sizes) == CHUNK
    assert made.held == 1
    assert len(neuron.examples) == EXAMPLES


def test_it_is_told_how_many_prompts_are_done(autoencoder):
    told = []
    activity = measure(autoencoder, Made(), PROMPTS, told.append)
    examine(autoencoder, Made(), PROMPTS, [1], activity, told.append)
    assert sum(told) == 2 * len(PROMPTS)


def test_what_explains_nothing_is_doubted(autoencoder):
    assert doubt(measure(autoencoder, Made(), PROMPTS)) is None
    other = SparseAutoencoder(
        autoencoder.encoder, autoencoder.encoder_bias, -autoencoder.decoder, autoencoder.center, K, "topk", "none", SITE
    )
    assert "not the activations that the autoencoder was trained on" in doubt(measure(other, Made(), PROMPTS))
    # E (x - c) + e as it was, so that only the reconstruction moves.
    center = autoencoder.center + 50
    bias = autoencoder.encoder_bias + autoencoder.encoder.sum(1) * 50
    moved = SparseAutoencoder(autoencoder.encoder, bias, autoencoder.decoder, center, K, "topk", "none", SITE)
    activity = measure(moved, Made(), PROMPTS)
    assert activity.fidelity.variance_explained < 0 < activity.but_for_a_constant
    assert "but for a constant" in doubt(activity)


def test_no_prompts_and_no_such_neuron_are_one_sentence(autoencoder):
    with pytest.raises(InputError, match="there are no prompts"):
        measure(autoencoder, Made(), [])
    activity = measure(autoencoder, Made(), PROMPTS)
    with pytest.raises(InputError, match="there is no neuron 24: they are 0 to 23"):
        examine(autoencoder, Made(), PROMPTS, [LATENTS], activity)

    class Same(Made):
        def __call__(self, prompts):
            return torch.ones(len(prompts), POSITIONS, WIDTH)

    with pytest.raises(InputError, match="are the same"):
        measure(autoencoder, Same(), PROMPTS)


@pytest.fixture(scope="module")
def mark():
    return marker(open_model("shapes"), SITE, 12)


@pytest.mark.parametrize(
    ("text", "position", "shown"),
    [
        ("a red star", 0, "«start» a red star"),
        ("a red star", 3, "a red «star»"),
        ("a Red  star", 2, "a «Red»  star"),
        ("a red star", 4, "a red star «end»"),
        ("a red star", 9, "a red star «padding, position 9»"),
        ("a red star on grass and a blue ring", 3, "a red «star» on grass an…"),
        ("a blue ring on grass a red star", 7, "… on grass a «red» star"),
        ("a \x1b[31mstar\u202e", 1, "«a»  [31mstar "),
    ],
)
def test_the_token_is_marked_in_its_prompt(mark, text, position, shown):
    assert mark(Example(text, position, 1.0)) == shown


def exact(width, factor=1.0):
    """ReLU of ±x: reconstructs everything, times `factor`."""
    identity = torch.eye(width)
    both = torch.cat((identity, -identity))
    return SparseAutoencoder(
        both, torch.zeros(2 * width), factor * both.T, torch.zeros(width), 2 * width, "relu", "none", SITE
    )


def test_of_the_built_in_model(tmp_path):
    model = open_model("shapes")
    width = model.site(SITE).d_out
    path = tmp_path / "sae.safetensors"
    exact(width).save(path)
    moved, encoder = attached(SparseAutoencoder.load(path), model, "cpu")
    activity = measure(moved, encoder, PROMPTS[:8])
    assert activity.fidelity.variance_explained > 1 - 1e-9
    assert activity.fidelity.tokens == 8 * 77
    (neuron,) = examine(moved, encoder, PROMPTS[:8], [3], activity)
    x = encoder(PROMPTS[:8])[..., 3]
    assert neuron.active == int((x > 0).sum())
    assert "neuron 3 (" in describe_neurons([neuron], moved, lambda it: it.prompt)


def test_an_autoencoder_of_another_model_is_one_sentence():
    model = open_model("shapes")
    with pytest.raises(InputError, match=r"reads activations of width 8, and text_encoder\.layer\.9 of shapes has 96;"):
        attached(exact(8), model)
    other = SparseAutoencoder(**{**vars(exact(96)), "site": "text_encoder_2.layer.9"})
    with pytest.raises(InputError, match=r"text_encoder_2\.layer\.9.* are text_encoder\.layer\.0 to"):
        attached(other, model)


@pytest.fixture
def files(tmp_path):
    exact(96).save(tmp_path / "sae.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:6]))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["sae", "inspect", *(str(it) for it in arguments)], prog_name="bakeout")


def test_the_command_shows_the_file(files):
    done = run(files / "sae.safetensors")
    assert done.exit_code == 0
    assert "text_encoder.layer.9" in done.output
    assert "192, ReLU" in done.output
    assert exact(96).digest in done.output


def test_the_command_shows_neurons(files):
    given = [files / "sae.safetensors", "--model", "shapes", "--prompts", files / "prompts.txt"]
    done = run(*given, "--neuron", 3, "--top", 2, "-o", files / "n.png")
    assert done.exit_code == 0, done.output
    assert "On 6 prompts (462 tokens): variance explained 1.0000" in done.output
    assert done.output.count("\nneuron ") == 3
    assert "\nneuron 3 (" in done.output
    assert "«" in done.output
    assert (files / "n.png").read_bytes().startswith(b"\x89PNG")
    before = (files / "n.png").read_bytes()
    again = run(*given, "-o", files / "n.png")
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert run(*given, "--neuron", 3, "--top", 2, "-o", files / "n.png", "--force").exit_code == 0
    assert (files / "n.png").read_bytes() == before
    assert "On 2 prompts" in run(*given, "--count", 2).output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "shapes"], "give both --model and --prompts, or neither"),
        (["--prompts", "prompts.txt"], "give both --model and --prompts, or neither"),
        (["--neuron", "3"], "give --model and --prompts too"),
        (["-o", "n.png"], "give --model and --prompts too"),
        (["--model", "shapes", "--prompts", "prompts.txt", "--neuron", "192"], "there is no neuron 192"),
        (["--model", "shapes", "--prompts", "prompts.txt", "--neuron", "-1"], "there is no neuron -1"),
        (["--model", "shapes", "--prompts", "prompts.txt", "--top", "0"], "--top is 0"),
        (["--model", "shapes", "--prompts", "prompts.txt", "--count", "0"], "--count is 0"),
        (["--model", "shapes", "--prompts", "nothing.txt"], "does not exist"),
        (["--model", "shapes", "--prompts", "prompts.txt", "-o", "n.jpg"], "let it end in .png"),
    ],
)
def test_a_mistake_is_one_sentence(files, monkeypatch, arguments, sentence):
    monkeypatch.chdir(files)
    done = run("sae.safetensors", *arguments)
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert done.output.count("\n") == 1
    assert sentence in done.output
    assert not (files / "n.png").exists()


def test_a_wrong_autoencoder_is_shown_with_a_warning(files):
    exact(96, factor=3).save(files / "sae.safetensors")
    shown = inspect_autoencoder(files / "sae.safetensors", "shapes", [files / "prompts.txt"], device="cpu")
    assert "Warning: the variance explained is -" in shown


def test_of_the_built_in_model_s_own_a_name_is_enough(files, monkeypatch):
    monkeypatch.setattr("bakeout.neurons.BUILTIN", {"shapes": files / "model"})
    done = run("shapes", "--count", 3)
    assert done.exit_code == 0, done.output
    assert "On 3 prompts (231 tokens)" in done.output
    none = run("shapes", "--count", 0)
    assert (none.exit_code, none.output) == (2, "Error: --count is 0: it must be 1 or more\n")
    (files / "sae.safetensors").unlink()
    missing = run("shapes")
    assert (missing.exit_code, missing.output.count("\n")) == (2, 1)
    assert "lacks the autoencoder of shapes" in missing.output


def test_a_chart_of_nothing_is_refused(files):
    silent = SparseAutoencoder(**{**vars(exact(96)), "encoder_bias": torch.full((192,), -1e4)})
    silent.save(files / "sae.safetensors")
    with pytest.raises(InputError, match="no neuron is active"):
        inspect_autoencoder(
            files / "sae.safetensors", "shapes", [files / "prompts.txt"], chart=files / "n.png", device="cpu"
        )


@pytest.mark.parametrize("command", ["import", "inspect"])
def test_a_help_page_stands_alone(command):
    page = CliRunner().invoke(main, ["sae", command, "--help"], prog_name="bakeout").output
    assert f"\n    bakeout sae {command} " in page
    assert "Exit codes:" in page
    for parameter in main.commands["sae"].commands[command].params:
        assert isinstance(parameter, click.Argument) or parameter.help
