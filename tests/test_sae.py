"""`bakeout sae train` as a user meets it: files, going on after any interruption to the same bytes, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from bakeout import cli, sae
from bakeout.cli import main
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.sae import activations
from bakeout.editor.sae.activations import TextActivations, default_layer, text_site
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.sae import prompts_from, tokens_from_text, train
from bakeout.training_chart import draw_training

WORDS = ("red", "green", "blue", "star", "ring", "moon", "on", "grass", "sand", "night")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """600 prompts, a line each."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 3)) for _ in range(600)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "BLOCK", 4_000)  # 16 batches of 256


OPTIONS = {"tokens": 256 * 40, "batch": 256, "k": 4, "device": "cpu", "checkpoint_every": 3}


def arguments(model: Path, prompts: Path, output: Path, *more: object) -> list[str]:
    given = ["sae", "train", model, "--prompts", prompts, "-o", output, "--tokens", 256 * 40, "--batch", 256]
    return [str(it) for it in [*given, "--k", 4, "--device", "cpu", "--checkpoint-every", 3, *more]]


def invoke(*given: object):
    return CliRunner().invoke(main, [str(it) for it in given], prog_name="bakeout")


@pytest.fixture(scope="module")
def trained(tiny_model, prompts, tmp_path_factory) -> Path:
    """The folder of a whole training; nobody changes it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "BLOCK", 4_000)
        done = invoke(*arguments(tiny_model, prompts, folder / "sae.safetensors"))
    assert done.exit_code == 0, done.output
    (folder / "said.txt").write_text(done.output, encoding="utf-8")
    return folder


def test_train_writes_an_autoencoder_its_curves_and_its_log(trained, tiny_model, prompts):
    assert {path.name for path in trained.iterdir()} == {
        "sae.safetensors", "sae-training.png", "sae-training.json", "said.txt",
    }  # fmt: skip
    autoencoder = SparseAutoencoder.load(trained / "sae.safetensors")
    assert (autoencoder.site, autoencoder.width, autoencoder.latents) == ("text_encoder.layer.1", 16, 64)
    assert (autoencoder.k, autoencoder.activation, autoencoder.input_norm) == (4, "topk", "none")
    log = json.loads((trained / "sae-training.json").read_text(encoding="utf-8"))
    assert (log["steps"], log["tokens"], log["site"]) == (40, 256 * 40, "text_encoder.layer.1")
    # Names, not where they lie on somebody's disk.
    assert (log["model"], log["prompts"]["from"]) == ("tiny", ["prompts.txt"])
    assert log["settings"]["learning_rate"] == 4e-4
    assert log["curve"]["tokens"] == [256 * step for step in range(1, 41)]
    assert all(len(values) == 40 for values in log["curve"].values())
    assert log["curve"]["loss"][-1] < 0.95 * log["curve"]["loss"][0]
    assert all(0 < l0 <= 4 for l0 in log["curve"]["l0"])
    with Image.open(trained / "sae-training.png") as picture:
        assert picture.size == (1080, 960)
    held_out = log["held_out"]
    said = (trained / "said.txt").read_text(encoding="utf-8").splitlines()
    assert said[0] == repr(autoencoder)
    assert said[1].startswith(f"On held-out prompts: variance explained {held_out['variance_explained']:.4f}, L0 ")
    assert said[2].startswith(f"It is {trained / 'sae.safetensors'}; ")


def test_what_is_said_of_held_out_prompts_is_so(trained, tiny_model, prompts):
    log = json.loads((trained / "sae-training.json").read_text(encoding="utf-8"))
    parted = activations.split(prompts_from([prompts]))
    assert (log["prompts"]["training"], log["prompts"]["held_out"]) == (parted.count, len(parted.held_out))
    assert log["held_out"]["tokens"] == 77 * len(parted.held_out)
    model = open_model(tiny_model)
    x = TextActivations(model, text_site(model))(parted.held_out).flatten(0, 1).double()
    read = SparseAutoencoder.load(trained / "sae.safetensors").to(torch.float64)
    z = torch.relu((x - read.center) @ read.encoder.T + read.encoder_bias)
    kept = z * (z >= z.topk(4, dim=1).values[:, -1:])
    error = (kept @ read.decoder.T + read.center - x).square().sum() / (x - x.mean(0)).square().sum()
    assert log["held_out"]["variance_explained"] == pytest.approx(1 - float(error), abs=1e-5)
    assert log["held_out"]["dead_share"] == pytest.approx(float((kept <= 0).all(0).double().mean()))


def test_the_same_training_gives_the_same_bytes_and_another_seed_others(trained, tiny_model, prompts, tmp_path):
    whole = (trained / "sae.safetensors").read_bytes()
    train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert (tmp_path / "a-training.png").read_bytes() == (trained / "sae-training.png").read_bytes()
    train(tiny_model, prompts_from([prompts]), tmp_path / "b.safetensors", **OPTIONS | {"seed": 1})
    assert (tmp_path / "b.safetensors").read_bytes() != whole


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


def stop_after(steps: int):
    """A progress that breaks off when so many steps are done."""
    done = 0.0

    def progress(part: float) -> None:
        nonlocal done
        done += part
        if done > (steps - 0.5) / 40:
            raise _Stopped

    return progress


@pytest.mark.parametrize("places", [[1], [3], [16], [17, 31, 38], [40]])
def test_an_interrupted_training_goes_on_to_the_same_bytes(trained, tiny_model, prompts, tmp_path, places):
    output = tmp_path / "sae.safetensors"
    for place in places:
        with pytest.raises(_Stopped) as stopped:
            train(tiny_model, prompts_from([prompts]), output, **OPTIONS, progress=stop_after(place))
        assert not output.exists()
        assert (output.with_name("sae.safetensors.partial")).exists() == (place >= 3)
        assert bool(getattr(stopped.value, "__notes__", ())) == (place >= 3)
    parts: list[float] = []
    train(tiny_model, prompts_from([prompts]), output, **OPTIONS, progress=parts.append)
    assert parts[0] == places[-1] // 3 * 3 / 40
    assert sum(parts) == pytest.approx(1)
    assert {path.name for path in tmp_path.iterdir()} == {"sae.safetensors", "sae-training.png", "sae-training.json"}
    for name in ("sae.safetensors", "sae-training.png"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    logs = [json.loads((folder / "sae-training.json").read_text(encoding="utf-8")) for folder in (tmp_path, trained)]
    assert logs[0]["curve"] == logs[1]["curve"]


def test_interrupted_while_the_result_is_written_it_goes_on_too(tiny_model, prompts, tmp_path, monkeypatch):
    output = tmp_path / "sae.safetensors"
    # All blocks are whole, and the checkpoint is of the last step.
    options = OPTIONS | {"tokens": 256 * 32, "checkpoint_every": 8}

    def breaks_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoder, "save", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, prompts_from([prompts]), output, **options)
    assert (tmp_path / "sae-training.json").exists()
    train(tiny_model, prompts_from([prompts]), output, **options)
    train(tiny_model, prompts_from([prompts]), tmp_path / "whole.safetensors", **options)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_killed_training_goes_on_to_the_same_bytes(tiny_model, prompts, tmp_path):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    # Blocks are those of the package here: 128 batches of 1024.
    options = ["--tokens", 300 * 1024, "--batch", 1024, "--checkpoint-every", 10]
    program = [sys.executable, "-m", "bakeout"]
    process = subprocess.Popen([*program, *arguments(tiny_model, prompts, killed, *options)])
    partial = killed.with_name("killed.safetensors.partial")
    deadline = time.monotonic() + 60
    steps = 0
    while steps < 150:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
        if partial.exists():
            with safe_open(partial, "pt") as stream:
                steps = json.loads(stream.metadata()["bakeout.sae.training"])["numbers"]["steps"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "BLOCK", 131_072)
        for output in (killed, whole):
            done = invoke(*arguments(tiny_model, prompts, output, *options))
            assert done.exit_code == 0, done.output
    assert killed.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_a_disk_that_is_full_is_one_sentence(tiny_model, prompts, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*\.partial \(File too large\)"):
            train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_title_may_have_any_letters(tmp_path):
    curve = {name: [1.0, 0.5] for name in ("tokens", "loss", "variance_explained", "dead_share")}
    draw_training(curve, {"variance_explained": 0.9, "dead_share": 0.1}, "模型_$5", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"


def test_what_another_training_left_is_not_gone_on_with(trained, tiny_model, prompts, tmp_path):
    output = tmp_path / "sae.safetensors"
    with pytest.raises(_Stopped):
        train(tiny_model, prompts_from([prompts]), output, **OPTIONS, progress=stop_after(10))
    partial = tmp_path / "sae.safetensors.partial"
    left = partial.read_bytes()
    for changed, words in (
        ({"k": 5}, "with another k:"),
        ({"seed": 1, "learning_rate": 1e-3}, "with another learning_rate and seed:"),
        ({"tokens": 256 * 41}, "with another steps:"),
        ({"dtype": "bf16"}, "with another dtype and model, device or version of a library:"),
        ({"cache": tmp_path / "cache", "cache_dtype": "fp16"}, "with another cache-dtype:"),
    ):
        with pytest.raises(InputError) as caught:
            train(tiny_model, prompts_from([prompts]), output, **OPTIONS | changed)
        assert words in str(caught.value)
        assert "--force" in str(caught.value)
        assert partial.read_bytes() == left
    other = tmp_path / "other.txt"
    other.write_text(prompts.read_text() + "\nmore", encoding="utf-8")
    with pytest.raises(InputError, match="with another prompts:"):
        train(tiny_model, prompts_from([other]), output, **OPTIONS)
    parts: list[float] = []
    train(tiny_model, prompts_from([prompts]), output, **OPTIONS | {"seed": 1}, force=True, progress=parts.append)
    assert parts[0] == 0
    assert not partial.exists()
    assert output.read_bytes() != (trained / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "json", "steps", "tensors", "pickle"])
def test_a_damaged_checkpoint_is_one_sentence_and_forced_it_begins_anew(trained, tiny_model, prompts, tmp_path, damage):
    output = tmp_path / "sae.safetensors"
    with pytest.raises(_Stopped):
        train(tiny_model, prompts_from([prompts]), output, **OPTIONS, progress=stop_after(10))
    partial = tmp_path / "sae.safetensors.partial"
    with safe_open(partial, "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dict
        said = json.loads(stream.metadata()["bakeout.sae.training"])
    if damage == "cut":
        partial.write_bytes(partial.read_bytes()[:-10])
    elif damage == "pickle":
        torch.save({"a": 1}, partial)
    else:
        text = "[]" if damage == "json" else json.dumps(said)
        if damage == "steps":
            said["numbers"]["steps"] = 41
            text = json.dumps(said)
        if damage == "tensors":
            tensors["encoder"] = tensors["encoder"][:5].clone()
        save_file(tensors, partial, {"bakeout.sae.training": text})
    with pytest.raises(InputError) as caught:
        train(tiny_model, prompts_from([prompts]), output, **OPTIONS)
    assert "\n" not in str(caught.value)
    if damage != "tensors":  # of which the trainer tells
        train(tiny_model, prompts_from([prompts]), output, **OPTIONS, force=True)
        assert output.read_bytes() == (trained / "sae.safetensors").read_bytes()


def test_what_is_there_is_overwritten_only_by_force(trained, tiny_model, prompts, tmp_path):
    for name in ("sae.safetensors", "sae-training.json", "sae-training.png"):
        path = tmp_path / name
        path.write_bytes(b"mine")
        done = invoke(*arguments(tiny_model, prompts, tmp_path / "sae.safetensors"))
        assert done.exit_code == 2
        assert f"{path} exists already" in done.stderr
        assert path.read_bytes() == b"mine"
        path.unlink()
    (tmp_path / "sae.safetensors").write_bytes(b"mine")
    done = invoke(*arguments(tiny_model, prompts, tmp_path / "sae.safetensors", "--force"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "sae.safetensors").read_bytes() == (trained / "sae.safetensors").read_bytes()


def test_a_cache_in_fp32_changes_nothing_and_spares_the_encoder(trained, tiny_model, prompts, tmp_path, monkeypatch):
    whole, ran = (trained / "sae.safetensors").read_bytes(), []
    call = TextActivations.__call__
    monkeypatch.setattr(TextActivations, "__call__", lambda self, texts: ran.append(len(texts)) or call(self, texts))

    def run(name: str, **changed: object) -> bytes:
        ran.clear()
        train(tiny_model, prompts_from([prompts]), tmp_path / name, **OPTIONS | {"cache": tmp_path / "c"} | changed)
        return (tmp_path / name).read_bytes()

    assert run("first.safetensors") == whole
    # The held-out ones are encoded by themselves, at most 64 at a time.
    assert sum(ran) < 256
    first = len(ran)
    assert run("second.safetensors") == whole
    assert len(ran) == 1 < first
    assert run("rounded.safetensors", cache_dtype="fp16") != whole
    assert len(ran) == first
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_epochs_say_how_long_to_train_too(tiny_model, prompts, tmp_path):
    options = OPTIONS | {"tokens": None, "epochs": 2, "batch": 4096}
    train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **options)
    log = json.loads((tmp_path / "a-training.json").read_text(encoding="utf-8"))
    assert log["steps"] == 2 * 77 * log["prompts"]["training"] // 4096


def test_the_line_tells_what_the_trainer_found(tiny_model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(sae, "_SECONDS_BETWEEN_LINES", 0)
    lines: list[str] = []
    train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS, told=lines.append)
    log = json.loads((tmp_path / "a-training.json").read_text(encoding="utf-8"))
    last = (
        f"variance explained {log['curve']['variance_explained'][-1]:.4f}, L0 {log['curve']['l0'][-1]:.1f}, dead 0.0%"
    )
    assert lines[-1].startswith(last)
    assert lines[-1].endswith(" tokens/s")
    assert any(line.startswith("encoding prompts: ") for line in lines)


def test_on_a_terminal_there_is_a_live_line(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with cli._progress_bar(1, "training") as bar:
        train(
            tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS,
            progress=bar.update, told=bar.set_postfix_str,
        )  # fmt: skip
    shown = capsys.readouterr().err
    assert "training " in shown
    assert "encoding prompts" in shown or "variance explained" in shown


def test_an_interrupt_says_how_to_go_on(tiny_model, prompts, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SparseAutoencoder, "save", interrupted)
    done = invoke(*arguments(tiny_model, prompts, tmp_path / "sae.safetensors"))
    assert done.exit_code == 130
    partial = tmp_path / "sae.safetensors.partial"
    note = f"{partial} keeps what was trained: the same command, run again, goes on from there."
    assert done.stderr.splitlines() == ["Interrupted.", note]
    other = invoke(*arguments(tiny_model, prompts, tmp_path / "sae.safetensors", "--seed", 1))
    assert other.exit_code == 2
    assert other.stderr.count("\n") == 1


def test_too_many_latents_for_memory_are_one_sentence(tiny_model, prompts, tmp_path):
    with pytest.raises(InputError, match="does not fit into memory"):
        train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS | {"latents": 10**15})


def test_a_learning_rate_that_diverges_is_one_sentence(tiny_model, prompts, tmp_path):
    with pytest.raises(InputError, match="diverged"):
        train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS | {"learning_rate": 1e30})
    assert not (tmp_path / "a.safetensors").exists()


def test_the_captions_of_shapes_are_those_it_was_trained_on(monkeypatch):
    from bakeout.builtin.shapes import training

    monkeypatch.setattr(training.Settings, "drawings", 20)
    prompts = prompts_from(["shapes"])
    workshop = training.Workshop.__new__(training.Workshop)
    workshop.settings = training.Settings(drawings=20)
    monkeypatch.setattr(training, "Settings", lambda: workshop.settings)
    assert list(prompts) == [caption for told in workshop.captions for caption in told]
    assert list(prompts) == list(prompts)


def test_sources_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.setitem(sae.BUILTIN_PROMPTS, "shapes", lambda: iter(["x"]))
    (tmp_path / "a.txt").write_text("a\nb")
    (tmp_path / "b.csv").write_text("n,words\n1,c\n")
    assert list(prompts_from([tmp_path / "a.txt", "shapes", tmp_path / "b.csv"], "words")) == ["a", "b", "x", "c"]
    with pytest.raises(InputError, match="none of the files has columns"):
        prompts_from([tmp_path / "a.txt", "shapes"], "words")
    with pytest.raises(InputError, match="at least one file"):
        prompts_from([])


def test_prompts_that_can_be_read_only_once_are_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match="can be read only once"):
        train(tiny_model, (text for text in ["a", "b"]), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "tokens"), [("400M", 400_000_000), ("2.5B", 2_500_000_000), ("10k", 10_000), ("1_000", 1000), ("77", 77)]
)
def test_tokens_are_numbers_with_a_letter(text, tokens):
    assert tokens_from_text(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "many", "-1", "1e6", "4MM", "1.2.3M", "²", "9" * 30])
def test_other_texts_are_no_tokens(text):
    with pytest.raises(InputError, match="write a number such as 400M"):
        tokens_from_text(text)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--prompts", "a.docx"], "a.docx is no file of prompts; give one that ends in .txt"),
        (["--column", "words"], "none of the files has columns"),
        (["--layer", 7], "has no layer 7; its layers are 0 to 1"),
        (["--encoder", "text_encoder_2"], "has no 'text_encoder_2'"),
        (["--k", 0], "k is 0"),
        (["--k", 65], "k is 65 and there are 64 latents"),
        (["--batch", 0], "batch is 0"),
        (["--batch", 10_000_000], "give more prompts or a smaller --batch"),
        (["--tokens", "255"], "less than a batch"),
        (["--tokens", "lots"], "write a number such as 400M"),
        (["--epochs", 1], "give one of them"),
        (["--cache-dtype", "fp16"], "give both, or neither"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--seed", -1], "seed is -1"),
        (["--checkpoint-every", 0], "checkpoint_every is 0"),
        (["--device", "gpu"], "is no device"),
        (["-o", "sae.pt"], "let it end in .safetensors"),
        (["-o", "."], ". is a folder"),
        (["-o", f"{'s' * 300}.safetensors"], "File name too long"),
        # Longer by what the files beside it are called.
        (["-o", f"{'s' * 240}.safetensors"], "File name too long"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tiny_model, prompts, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments(tiny_model, prompts, Path("sae.safetensors"), *more))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "more", "words"),
    [
        ("a.csv", "id,words\n1,a\n", ["--column", "text"], "has no column 'text'; it has 'id', 'words'"),
        ("a.csv", "id,words\n1,a\n", [], "say with --column which"),
        ("a.txt", "", [], "there is no prompt to train on"),
        ("a.txt", "a\n", [], "there is one prompt"),
        ("a.txt", "a\nb\n", [], "have 77 tokens in all and a batch has 256"),
    ],
)
def test_prompts_that_will_not_do_are_one_sentence(tiny_model, tmp_path, name, content, more, words):
    (tmp_path / name).write_text(content)
    done = invoke(*arguments(tiny_model, tmp_path / name, tmp_path / "sae.safetensors", *more))
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_the_help_page_stands_alone():
    page = invoke("sae", "train", "--help")
    assert page.exit_code == 0
    assert "\n    bakeout sae train " in page.output
    assert "Exit codes:" in page.output
    assert all(parameter.help for parameter in main.commands["sae"].commands["train"].params[1:])
    assert "\n  train  " in invoke("sae", "--help").output


def test_the_help_page_imports_nothing_heavy():
    program = (
        "import sys\nfrom bakeout.cli import main\n"
        "try:\n    main(['sae', 'train', '--help'])\nexcept SystemExit:\n    pass\n"
        "import bakeout.sae\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'matplotlib', 'pyarrow', 'accelerate'}\n"
        "sys.exit(f'imported {heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_model, prompts, tmp_path):
    options = ["--tokens", 60 * 1024, "--batch", 1024]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "bakeout"]
    found = []
    for name, program in (("one", [sys.executable, "-m", "bakeout"]), ("two", launch)):
        output = tmp_path / f"{name}.safetensors"
        done = subprocess.run(
            [*program, *arguments(tiny_model, prompts, output, *options)], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("On held-out prompts") == 1
        assert json.loads((tmp_path / f"{name}-training.json").read_text())["processes"] == len(found) + 1
        found.append(SparseAutoencoder.load(output))
    one, two = found
    initial = train(tiny_model, prompts_from([prompts]), tmp_path / "a.safetensors", **OPTIONS | {"tokens": 256})
    for name in ("encoder", "encoder_bias", "decoder", "center"):
        a, b, c = (getattr(it, name) for it in (one, two, initial))
        assert float((a - b).norm() / a.norm()) < 1e-4
        assert float((a - c).norm() / a.norm()) > 1e-2


def test_the_paper_reads_the_layer_9_of_12():
    model = open_model("shapes")
    assert text_site(model).name == f"text_encoder.layer.{default_layer(12)}" == "text_encoder.layer.9"
