"""The command line as a user meets it: pages, exit codes, one sentence for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import bakeout
from bakeout import cli
from bakeout.cli import main
from bakeout.editor.errors import InputError

COMMANDS = sorted(main.commands)


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="bakeout")


def draw(model: Path, folder: Path, *arguments: object):
    return invoke("generate", model, "--prompt", "a", "--steps", 2, "--device", "cpu", "-o", folder, *arguments)


def test_the_version():
    assert invoke("--version").output == f"bakeout {bakeout.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_stands_alone(command):
    page = invoke(command, "--help")
    assert page.exit_code == 0
    assert page.output.startswith(f"Usage: bakeout {command}")
    assert f"\n    bakeout {command} " in page.output, "there is no example"
    assert "Exit codes:" in page.output
    assert "--debug" in page.output
    for parameter in main.commands[command].params:
        assert isinstance(parameter, click.Argument) or parameter.help, f"{parameter.name} is not explained"


def test_the_groups_page_names_every_command():
    page = invoke("--help")
    assert page.exit_code == 0
    assert all(f"\n  {command}  " in page.output for command in COMMANDS)
    assert "Exit codes:" in page.output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_no_page_imports_torch_or_numpy(arguments):
    program = (
        "import sys\nfrom bakeout.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_bakeout_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "bakeout", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: bakeout ")


def test_generate_draws_and_says_where(tiny_model, tmp_path):
    done = draw(
        tiny_model, tmp_path / "out", "--prompt", "b", "-n", 2, "--seed", 4, "--size", "16x24", "--scheduler", "euler",
        "--clip-skip", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout == f"4 pictures in {tmp_path / 'out'}, drawn by torch (cpu)\n"
    assert done.stderr == ""
    index = json.loads((tmp_path / "out" / "pictures.json").read_text(encoding="utf-8"))
    assert [entry["file"] for entry in index["pictures"]] == ["1-4.png", "1-5.png", "2-4.png", "2-5.png"]
    # The name of the model, not where it lies on somebody's disk.
    assert (index["model"], index["device"], index["dtype"]) == ("tiny", "cpu", "torch.float32")
    assert (index["size"], index["scheduler"], index["clip_skip"]) == ([16, 24], "euler", 1)


def test_generate_takes_an_artifact_with_onnx_runtime_and_compares(exported, tiny_model, tmp_path):
    folder = tmp_path / "out"
    arguments = ["generate", exported, "--prompt", "a", "--steps", 2, "--threads", 1, "-o", folder]
    done = invoke(*arguments, "--compare", "--base", tiny_model)
    assert done.exit_code == 0, done.output
    by = "drawn by onnxruntime (CPUExecutionProvider), each beside its base and reference in *-compared.png"
    assert done.stdout == f"1 picture in {folder}, {by}\n"
    assert done.stderr == ""
    assert {path.name for path in folder.iterdir()} == {"1-0.png", "1-0-compared.png", "pictures.json"}
    index = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    assert (index["runtime"], index["providers"]) == ("onnxruntime", "CPUExecutionProvider")
    (folder / "1-0.png").unlink()
    (folder / "pictures.json").unlink()
    again = invoke(*arguments, "--compare", "--base", tiny_model)
    assert again.exit_code == 2
    assert "1-0-compared.png exists already" in again.stderr
    done = invoke(*arguments[:-4], "--runtime", "torch", "--device", "cpu", "-o", folder, "--force")
    assert done.stdout == f"1 picture in {folder}, drawn by torch (cpu)\n"


def test_generate_begins_with_a_picture(tiny_model, tmp_path):
    from PIL import Image

    Image.effect_noise((16, 24), 90).save(tmp_path / "start.png")
    done = draw(tiny_model, tmp_path / "out", "--image", tmp_path / "start.png", "--strength", "0.6")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out" / "1-0.png") as picture:
        assert picture.size == (16, 16)
        assert picture.text["image"] == "start.png"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu"], "--device belongs to torch"),
        (["--provider", "NoExecutionProvider"], "choose from"),
        (["--threads", "0"], "threads is 0"),
        (["--compare"], "give that model as the base (--base)"),
        (["--compare", "--base", "shapes"], "is not the model 'tiny'"),
        (["--base", "shapes"], "--base is of --compare"),
        (["--image", "no.png"], "no.png is no file"),
        (["--size", "20"], "multiples of 8"),
        (["--clip-skip", "1"], "gives no hidden states, so no layer can be skipped; leave clip_skip out"),
        (["--runtime", "torch", "--clip-skip", "2"], "clip_skip 2 reads a hidden state of text_encoder that the edit"),
    ],
)
def test_a_mistake_with_an_artifact_is_one_sentence_too(exported, tmp_path, arguments, words):
    done = invoke("generate", exported, "--prompt", "a", "--steps", 2, "-o", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_generate_overwrites_only_by_force(tiny_model, tmp_path):
    assert draw(tiny_model, tmp_path).exit_code == 0
    again = draw(tiny_model, tmp_path)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert draw(tiny_model, tmp_path, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--guidance", "-1"], "guidance is -1"),
        (["--size", "20"], "multiples of 8"),
        (["--size", "wide"], "width x height"),
        (["-n", "0"], "count is 0"),
        (["--scheduler", "eular"], "use one of"),
        (["--clip-skip", "0"], "clip_skip is 0"),
        (["--clip-skip", "3"], "use at most 2"),
        (["--device", "gpu"], "use auto, cpu, cuda"),
        (["--device", "cuda:99"], "is not here"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tiny_model, tmp_path, arguments, words):
    done = draw(tiny_model, tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("command", [["inspect", "no/such/model"], ["generate", "./none", "--prompt", "a", "-o", "x"]])
def test_a_model_that_is_not_there_is_one_sentence(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*command)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["generate"], ["generate", "shapes", "-o", "x"], ["inspect", "shapes", "--no"]]
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Usage: bakeout" in done.stderr


def test_debug_shows_the_traceback_wherever_it_stands(tiny_model, tmp_path):
    mistake = ["generate", tiny_model, "--prompt", "a", "-n", "0", "-o", tmp_path]
    assert isinstance(invoke("--debug", *mistake).exception, InputError)
    assert isinstance(invoke(*mistake, "--debug").exception, InputError)
    assert isinstance(invoke(*mistake).exception, SystemExit)


def test_an_interrupt_is_one_line_and_exit_code_130(tiny_model, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bakeout.generate.draw_to_folder", interrupted)
    done = draw(tiny_model, tmp_path)
    assert done.exit_code == 130
    assert done.stderr == "Interrupted.\n"


def test_a_fault_of_our_own_is_not_hidden(tiny_model, tmp_path, monkeypatch):
    def faulty(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("bakeout.generate.draw_to_folder", faulty)
    done = draw(tiny_model, tmp_path)
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_pictures_of_nothing_are_warned_of(tiny_model, tmp_path, monkeypatch):
    entries = [{"file": f"1-{seed}.png", "problem": "one colour all over" if seed else None} for seed in range(3)]
    monkeypatch.setattr("bakeout.generate.draw_to_folder", lambda *arguments: entries)
    done = draw(tiny_model, tmp_path)
    assert done.exit_code == 0
    assert done.stderr == "Warning: 2 of 3 pictures show nothing (one colour all over): 1-1.png, 1-2.png\n"


def test_the_progress_bar_is_for_terminals_only(capsys, monkeypatch):
    def shown() -> str:
        with cli._progress_bar(2) as bar:
            bar.set_postfix_str("the unet")
            bar.update(0.5)
        return capsys.readouterr().err

    assert shown() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    text = shown()
    assert "drawing" in text
    assert "the unet" in text


def test_inspect_shows_components_and_sites(tiny_model):
    done = invoke("inspect", tiny_model)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert unet.dtype is torch.float32
    assert ["unet", "UNet2DConditionModel", "F32", f"{parameters:,}"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    transformers = sum(name.endswith("ff.net.2") for name, _ in unet.named_modules())
    assert ["ffn2", str(transformers)] in [line.split()[:2] for line in done.stdout.splitlines()]
    assert "DDIMScheduler" in done.stdout


def test_accuracies_are_a_table():
    from bakeout.describe import describe_accuracy

    found = {"correct": 287, "of": 300, "share": 0.9567, "interval_95": [0.9271, 0.9767]}
    text = describe_accuracy({"settings": {"steps": 20, "guidance": 4.0}, "accuracy_without_ffn2": {"object": found}})
    assert text.splitlines() == [
        "measured               of      right       share  95 % interval",
        "accuracy without ffn2  object  287 of 300  95.7%  92.7% to 97.7%",
        "(steps 20, guidance 4.0)",
    ]
