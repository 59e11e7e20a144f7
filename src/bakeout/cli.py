"""The command line. Commands import what they need when they run, so that every `--help` is instant."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from bakeout import __version__
from bakeout.editor.errors import InputError
from bakeout.editor.methods import METHODS
from bakeout.generate import DTYPES, SCHEDULERS, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EXIT_CODES = """
\b
Exit codes:
  0    done
  1    a fault of bakeout itself
  2    something given cannot be used; one sentence says what and how to mend it
  130  interrupted
"""


_VALIDATE_EXIT_CODES = """
\b
Exit codes:
  0    the artifact passed
  1    it failed, or a fault of bakeout itself, which shows a traceback
  2    something given cannot be used; one sentence says what and how to mend it
  3    it could not be judged: memory, a package or an effect of the erasure is missing
  130  interrupted
"""
_EXITS = {"pass": 0, "fail": 1, "unjudged": 3}
_DEBUG = "bakeout.debug"


def _remember_debug(context: click.Context, _parameter: click.Parameter, debug: bool) -> None:
    if debug:
        context.meta[_DEBUG] = True


_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show tracebacks and the libraries' messages.",
)


def _output_option(name: str, metavar: str, help_text: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(
        "-o", "--output", name, metavar=metavar, type=click.Path(path_type=Path), help=help_text, **more
    )


_pictures_option = _output_option("folder", "DIR", "Folder of the pictures.", required=True)
_providers_option = click.option(
    "--provider",
    "providers",
    metavar="NAME",
    multiple=True,
    help="Execution provider of ONNX Runtime; several in order of preference.  [default: CPUExecutionProvider]",
)
_threads_option = click.option("--threads", type=int, help="Of ONNX Runtime, for one operation.  [default: one a core]")


class _Group(click.Group):
    """Turns what a user can mend, and an interrupt, into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            if ctx.meta.get(_DEBUG):
                raise
            _tell("Error: " + str(error), error)
            ctx.exit(2)
        except KeyboardInterrupt as error:
            if ctx.meta.get(_DEBUG):
                raise
            _tell("Interrupted.", error)
            ctx.exit(130)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EXIT_CODES
)
@click.version_option(__version__, prog_name="bakeout", message="%(prog)s %(version)s")
@_debug_option
def main() -> None:
    """Bake concept erasure into text-to-image models, export them, and prove that what ships erases.

    MODEL is everywhere the same: the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, or
    the id of a model on the Hugging Face hub. `generate` and `inspect` also take an artifact that `bake` wrote.

    \b
    Example:
      bakeout generate shapes --prompt "a red circle on grass" -o pictures
    """


@main.command(epilog=_EXIT_CODES)
@click.argument("model")
@click.option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    required=True,
    help="What to draw; may be given several times.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What to lead away from, for every prompt.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of each prompt's first picture; the next ones count up.",
)
@click.option("-n", "--count", type=int, default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=float, help="Scale of classifier-free guidance.  [default: the model's]")
@click.option("--size", metavar="SIDE|WxH", help="In pixels, 512 or 512x768.  [default: the model's]")
@click.option(
    "--scheduler",
    metavar="NAME",
    help=f"{', '.join(SCHEDULERS)}, or one of their classes in diffusers.  [default: the model's]",
)
@click.option(
    "--clip-skip", type=int, metavar="N", help="Leave out the text encoder's last N layers, as diffusers counts them."
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or mps; auto is the GPU where there is one."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="auto is fp16 on a GPU, fp32 on the CPU.",
)
@click.option("--batch", type=int, default=4, show_default=True, help="Pictures that are drawn at a time.")
@click.option(
    "--image",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A PNG, JPEG or WebP to begin with, instead of noise.",
)
@click.option(
    "--strength", type=float, help="How far from FILE to begin, more than 0 to 1.  [default: 0.8, for SDXL 0.3]"
)
@click.option(
    "--runtime",
    type=click.Choice(["torch", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"]),
    help="What draws; onnxruntime-cuda, onnxruntime-tensorrt and tensorrt on an NVIDIA GPU alone.  [default: "
    "onnxruntime with an artifact that has onnx/, else torch]",
)
@_providers_option
@_threads_option
@click.option("--no-arena", is_flag=True, help="ONNX Runtime gives memory back after every call: slower, smaller.")
@click.option(
    "--kernels",
    type=click.Choice(["auto", "library", "function", "reference", "triton", "cuda"]),
    default="auto",
    show_default=True,
    help="What computes an edit's own operators: in ONNX Runtime bakeout's library, or the function bodies of plain "
    "ONNX in the file; in PyTorch the reference, Triton or CUDA. In ONNX Runtime auto is the library, where it can be "
    "built, else the bodies; in PyTorch it is Triton on an NVIDIA GPU, else the reference.",
)
@click.option("--compare", is_flag=True, help="Also draw an artifact's base and reference, and put all side by side.")
@click.option("--compile", "compiled", is_flag=True, help="PyTorch compiles the UNet first, which takes minutes.")
@click.option(
    "--base",
    metavar="MODEL",
    help="The artifact's base, where it is a folder or file; for --compare, or --runtime torch without diffusers/.",
)
@_pictures_option
@click.option("--force", is_flag=True, help="Overwrite pictures that are there already.")
@_debug_option
def generate(
    model: str,
    prompts: tuple[str, ...],
    size: str | None,
    device: str,
    dtype: str,
    runtime: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    no_arena: bool,
    kernels: str,
    compiled: bool,
    compare: bool,
    base: str | None,
    folder: Path,
    force: bool,
    **settings: Any,
) -> None:
    """Draw pictures with MODEL, in PyTorch, ONNX Runtime or TensorRT.

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, the id of a model on
    the Hugging Face hub, or an artifact that `bakeout bake` wrote. ONNX Runtime draws with an artifact that has ONNX
    graphs (`bakeout export`), PyTorch with everything else; --dtype and --compile are for PyTorch, --threads and
    --no-arena for ONNX Runtime, --provider for --runtime onnxruntime, and --device for PyTorch and the runtimes that
    need a GPU: onnxruntime-cuda and onnxruntime-tensorrt, which draw with onnx/, and tensorrt, which draws with
    tensorrt/. What they need must be there: none of them falls back to the CPU. TensorRT draws at most as many pictures
    at a time, and only of sizes, as its engines were made for. From the same seed all begin with the same noise. An
    artifact whose edit differs from token to token is for pictures of one size, which is then the default, and every
    other --size is refused.

    An artifact whose edit does not fold into weights has no diffusers/. With --runtime torch its base draws, which is
    known where it is built in or of the hub, else --base; the edit is in its modules, and what patches the UNet's FFNs
    is what --kernels names.

    The pictures are DIR/<number of the prompt>-<seed>.png and carry as text what they were drawn from;
    DIR/pictures.json lists them. The same command draws the same pictures on the same machine; another
    batch size changes them by rounding at most.

    --compare writes DIR/<number>-<seed>-compared.png too: the picture of the artifact's base, that of the base with
    the erasure as hooks (the reference), and the artifact's.

    \b
    Examples:
      bakeout generate shapes --prompt "a red circle on grass" -o pictures
      bakeout generate shapes --prompt "a star" --prompt "a ring" --seed 7 -n 3 --scheduler euler --steps 30 -o pictures
      bakeout generate shapes-erased --prompt "a star" --compare -o compared
    """
    from bakeout import generate as generation
    from bakeout.artifact import Artifact
    from bakeout.compare import comparison_for
    from bakeout.picture import read_picture
    from bakeout.recipe import open_any, recommended_for
    from bakeout.runtime import runtime_for

    request = Request(prompts, size=None if size is None else generation.size_from_text(size), **settings)
    if request.image is not None:
        read_picture(request.image)
    opened = open_any(model)
    unfolded = runtime == "torch" and isinstance(opened, Artifact) and "diffusers" not in opened.manifest.targets
    if base is not None and not compare and not unfolded:
        raise InputError(
            "--base is of --compare, and of --runtime torch for an artifact without diffusers/: leave it out"
        )
    with _own_warnings():
        chosen = runtime_for(
            opened, runtime, device=device, dtype=dtype, providers=providers, threads=threads, arena=not no_arena,
            kernels=kernels, base=base, compiled=compiled,
        )  # fmt: skip
    _quieten_libraries()
    comparison = comparison_for(opened, base) if compare else None
    with generation.reserved(folder, request, also=comparison.files(request) if comparison else (), force=force):
        pipeline = chosen.load(opened)
        only = opened.size if isinstance(opened, Artifact) else None
        request = generation.complete(request, pipeline, recommended_for(opened), only, chosen.shapes)
        facts = {"model": Path(model).name if Path(model).exists() else model, **chosen.facts}
        with _progress_bar(len(request.pictures) * (3 if comparison else 1)) as bar:
            entries = generation.draw_to_folder(pipeline, request, folder, facts, bar.update)
            if comparison:
                del pipeline  # two large models at a time may not fit into memory
                comparison.write(request, folder, chosen, bar.update)
    for problem in sorted({entry["problem"] for entry in entries if entry["problem"]}):
        files = [entry["file"] for entry in entries if entry["problem"] == problem]
        click.echo(
            f"Warning: {len(files)} of {len(entries)} pictures show nothing ({problem}): {', '.join(files)}", err=True
        )
    compared = ", each beside its base and reference in *-compared.png" if comparison else ""
    click.echo(f"{len(entries)} picture{'s' * (len(entries) > 1)} in {folder}, drawn by {chosen}{compared}")


@main.command(epilog=_EXIT_CODES)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default=next(iter(METHODS)),
    show_default=True,
    help="The erasure method.",
)
@_output_option("path", "FILE", "The recipe to write.", default="recipe.toml", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite a file that is there already.")
@_debug_option
def init(method: str, path: Path, force: bool) -> None:
    """Write a commented recipe to start from.

    As it stands, it erases an object from the built-in model `shapes`. It explains every key, and how to turn it into
    one for your own Stable Diffusion.

    \b
    Example:
      bakeout init --method conceptprune -o star.toml
    """
    from bakeout.init import write_recipe

    write_recipe(path, method, force=force)
    click.echo(f"{path} is written: bake it with bakeout bake {path} -o DIR")


@main.command(epilog=_EXIT_CODES)
@click.argument("recipe", type=click.Path(path_type=Path))
@_output_option("folder", "DIR", "Folder of the artifact.", required=True)
@click.option("--force", is_flag=True, help="Replace an artifact that is there already; no other folder ever is.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or mps; auto is the GPU where there is one."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="fp32",
    show_default=True,
    help="In which the method runs the model; the artifact keeps the model's own.",
)
@_debug_option
def bake(recipe: Path, folder: Path, force: bool, device: str, dtype: str) -> None:
    """Bake what RECIPE erases into its model: find the edits, make each a part of the model, write an artifact.

    RECIPE is a TOML file that names the model, the concepts to erase, the method and its prompts.

    The artifact DIR has bakeout.json (what was erased from what, how, and what that costs at run time),
    edit.safetensors (the edit itself) and a folder for each of the recipe's targets:

    \b
    diffusers/  an ordinary diffusers folder, which DiffusionPipeline.from_pretrained("DIR/diffusers", dtype=...) loads
                without bakeout. Only the tensors that the edit names differ from the model's own, so there is one only
                where the whole edit folds into weights.
    onnx/       ONNX graphs, as `bakeout export` writes them; what does not fold is an operation in them.

    DIR appears when it is whole; if the command is interrupted, run it again and it goes on. The same recipe gives the
    same bytes on the same machine.

    \b
    Example:
      bakeout bake recipe.toml -o shapes-erased
    """
    from bakeout.describe import describe_artifact
    from bakeout.recipe import Recipe

    _quieten_libraries()
    loaded = Recipe.load(recipe)
    steps = len(loaded.edits) + len(set(loaded.written) - {"diffusers"})
    with _own_warnings(), _progress_bar(steps, "baking") as bar:
        artifact = loaded.bake(folder, force=force, device=device, dtype=dtype, progress=bar.update)
    click.echo(describe_artifact(artifact))
    click.echo("".join(f"\n{note}" for note in artifact.notes))
    loads = f"; diffusers' from_pretrained loads {folder / 'diffusers'}"
    click.echo(f"The artifact is {folder}{loads if 'diffusers' in artifact.manifest.targets else ''}")


@main.command(epilog=_EXIT_CODES)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["onnx", "tensorrt"]), required=True, help="The format to add.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of the networks.  [default: fp32 for onnx; the recipe's, else fp16, for tensorrt]",
)
@click.option(
    "--base", metavar="MODEL", help="The model that was edited, where it is a folder or file and DIR has no diffusers/."
)
@click.option(
    "--shrink",
    metavar="0|1|8|64",
    type=int,
    help="Leave out hidden units that the edit makes constant, so that an FFN's width is a multiple of this; 0 leaves "
    "out none.  [default: the recipe's]",
)
@click.option(
    "--size",
    "sizes",
    metavar="SIDE|WxH",
    help="Of tensorrt: the pictures' size in pixels, or MIN:USUAL:MAX as 256x256:512x512:768x768.  "
    "[default: the recipe's, else the model's]",
)
@click.option(
    "--batch",
    "batches",
    metavar="N",
    help="Of tensorrt: pictures at a time, or MIN:USUAL:MAX as 1:1:4.  [default: the recipe's, else 1]",
)
@click.option("--device", help="Of tensorrt: the GPU that builds, cuda or cuda:1.  [default: cuda]")
@click.option(
    "--check",
    is_flag=True,
    help="Of tensorrt: only check, without TensorRT or a GPU, that it can take the graphs. DIR is only read; what "
    "is made of it for the check goes where TMPDIR says, and is removed.",
)
@click.option("--force", is_flag=True, help="Replace the target where DIR has it already, whole or not.")
@_debug_option
def export(
    folder: Path,
    target: str,
    precision: str | None,
    base: str | None,
    shrink: int | None,
    sizes: str | None,
    batches: str | None,
    device: str | None,
    check: bool,
    force: bool,
) -> None:
    """Add a format to the artifact DIR that `bakeout bake` wrote.

    \b
    onnx      DIR/onnx/: text encoders, UNet, VAE encoder and decoder as ONNX graphs, with scheduler and tokenizers. For
              any batch, and any size unless the edit is for one. `bakeout generate DIR` and optimum's pipelines for
              ONNX Runtime load it. A graph's weights have the names that they have in DIR/diffusers.
              Needs: pip install "bakeout[cpu]"
    tensorrt  DIR/tensorrt/: the same graphs as engines for the kind of GPU that is here, and for pictures of the sizes
              and batches asked for. Each is checked as it ships: its layers compute in the precision asked for, the
              edit's operators are our kernels, and it gives what the fp32 graph gives on a CPU.
              `bakeout generate DIR --runtime tensorrt` draws with it.
              Needs an NVIDIA GPU and: pip install "bakeout[gpu,tensorrt]"

    In fp16 and bf16 what would harm the picture stays fp32: normalisations, the timestep's embedding, edits of text
    encoders, and the VAE.

    It is made of DIR/diffusers, or where there is none of the base and the edit, after every byte that stays was
    checked, and DIR changes when all is written: interrupted, it is as it was. The same artifact gives the same graphs,
    byte for byte; engines differ with what TensorRT timed. Reports of earlier validations are marked stale.

    Hidden units of the UNet's FFNs that a patch makes constant at every token are left out: a smaller and faster model
    that computes the same. The diffusers folder keeps them, as columns of zeros, so that it loads everywhere.

    \b
    Examples:
      bakeout export shapes-erased --target onnx
      bakeout export shapes-erased --target tensorrt --check
    """
    from bakeout.describe import describe_widths, described
    from bakeout.export.artifact import Artifact
    from bakeout.export.base import source_of
    from bakeout.serving import serving_for

    options = {"--size": sizes, "--batch": batches, "--device": device, "--check": check or None}
    if target != "tensorrt" and (given := [name for name, value in options.items() if value is not None]):
        raise InputError(f"{given[0]} is of tensorrt's engines; leave it out, or export to tensorrt")
    if check and device is not None:
        raise InputError("--check needs no GPU: leave --device out, or leave --check out to build the engines")
    _quieten_libraries()
    with _own_warnings(), _progress_bar(1, "checking" if check else "exporting") as bar:
        opened = Artifact.open(folder, but=target if force or check else None)
        model = source_of(opened, base) if opened.needs_base(target, shrink) else None
        more: dict[str, Any] = {"base": model, "shrink": shrink, "precision": precision}
        more |= {"progress": bar.update, "started": bar.set_postfix_str}
        if target == "tensorrt":
            more["serving"] = serving_for(opened, sizes, batches)
        if check:
            shapes = opened.preflight(**more)
        else:
            artifact = opened.export(target, device=device or "cuda", force=force, **more)
    if check:
        click.echo(f"TensorRT can take the graphs of {folder}, as far as its documentation tells: {described(shapes)}.")
        return
    size = sum(file.bytes for name, file in artifact.manifest.files.items() if name.startswith(f"{target}/"))
    if widths := describe_widths(artifact.manifest):
        click.echo(widths)
    elif shrink:
        click.echo(
            f"No hidden unit is left out: in no FFN does the edit make enough of them constant, at every token, for a "
            f"smaller width that is a multiple of {shrink}."
        )
    runtime = "" if target == "onnx" else f" --runtime {target}"
    if target == "onnx" and precision == "bf16":
        # ONNX Runtime's provider for the CPU has no kernels for it.
        runtime = " --runtime onnxruntime-cuda"
    click.echo(
        f"{folder / target} is written ({size / 1e6:,.0f} MB): draw with bakeout generate {quote(str(folder))}{runtime}"
    )


@main.command(epilog=_EXIT_CODES)
@click.argument("model")
@_output_option("chart", "FILE", "Also draw an artifact's shares as bars, in this PNG file.")
@click.option("--force", is_flag=True, help="Overwrite FILE if it is there already.")
@_debug_option
def inspect(model: str, chart: Path | None, force: bool) -> None:
    """Show what MODEL is made of, or what was erased from an artifact, layer by layer.

    MODEL is an artifact that `bakeout bake` wrote, the built-in model `shapes`, a diffusers folder, a single
    .safetensors checkpoint, or the id of a model on the Hugging Face hub. No weights are loaded.

    Of a model: its family, components, dtypes, parameters, and the sites that can be edited; of a built-in one also how
    well it draws. Of an artifact, whose files are checked: how many weights or features of each layer the edit touches,
    in numbers and with -o as a bar chart, how it was realised and why, at which sizes it holds, and what undoes it.

    \b
    Examples:
      bakeout inspect shapes
      bakeout inspect shapes-erased -o shares.png
    """
    from bakeout.describe import describe, describe_artifact, describe_validation
    from bakeout.editor.model import open_model
    from bakeout.recipe import is_artifact

    _quieten_libraries()
    if not is_artifact(model):
        if chart is not None:
            raise InputError(f"{model} is no artifact, so there is nothing to draw: leave -o out")
        click.echo(describe(open_model(model)))
        return
    from bakeout.artifact import Artifact
    from bakeout.plot import write_chart

    artifact = Artifact.open(model)
    click.echo(describe_artifact(artifact))
    click.echo(f"\n{describe_validation(artifact)}")
    if chart is not None:
        write_chart(artifact.manifest, chart, force=force)
        click.echo(f"\nThe chart is {chart}")


@main.command(epilog=_VALIDATE_EXIT_CODES)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_output_option("output", "OUT", "Folder of the report.  [default: DIR-validation]")
@click.option("--base", metavar="MODEL", help="The model that was edited, where it is a folder or file.")
@click.option(
    "--edit", metavar="FILE", type=click.Path(path_type=Path), help="The edit, where the artifact came without it."
)
@click.option("--profile", type=click.Choice(["quick", "release"]), help="24 or 600 prompts.  [default: the recipe's]")
@click.option(
    "--target",
    "targets",
    metavar="NAME",
    multiple=True,
    help="diffusers, onnx or tensorrt; may be given several times.  [default: all]",
)
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Pairs, with what was erased and without: .csv, .tsv or .jsonl.  [default: the artifact's own]",
)
@click.option("--count", type=int, help="Prompts to draw, half of them with what was erased.  [default: the profile's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first prompt; the next ones count up.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=float, help="Scale of classifier-free guidance.  [default: the model's]")
@click.option(
    "--size",
    metavar="SIDE|WxH",
    help="In pixels, 512 or 512x768.  [default: the artifact's, if it is for one only, or the model's]",
)
@click.option("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)}.  [default: the models' own]")
@click.option("--device", default="auto", show_default=True, help="Of PyTorch: auto, cpu, cuda, cuda:1 or mps.")
@_providers_option
@_threads_option
@click.option(
    "--kernels",
    type=click.Choice(["function", "library"]),
    default="function",
    show_default=True,
    help="What computes an edit's own operators in ONNX Runtime: the function bodies of plain ONNX in the file, as in "
    "any runtime, or bakeout's library.",
)
@_debug_option
def validate(
    folder: Path,
    output: Path | None,
    targets: tuple[str, ...],
    size: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    kernels: str,
    **options: Any,
) -> None:
    """Judge whether the artifact DIR is what it claims: the model with the erasure, in every format, to rounding.

    Three models draw from the same noise: the base (the model as it was), the reference (the base in eager PyTorch with
    the erasure as hooks), both in fp32, and the artifact, in each of its formats. It passes if every weight is what
    base and erasure give, every network answers as the reference's to rounding, and every step and picture is as near
    the reference as it must be, where the reference is far from the base. What cannot be told is no pass.

    What rounding may do depends on a format's precision. A format that this machine cannot run is not judged: graphs in
    bf16 need an NVIDIA GPU and --provider CUDAExecutionProvider, engines the kind of GPU and the TensorRT that they
    were built with. Engines cannot be read, and are judged by what they answer alone.

    The report is OUT/report.html, for people; OUT/report.json and OUT/junit.xml, for programs; and the pictures. An
    earlier report there is replaced; a folder with anything else in it never is.

    Prompts are held-out scenes for the built-in model, else those of the artifact's recipe.

    \b
    Examples:
      bakeout validate shapes-erased
      bakeout validate shapes-erased --profile release -o signoff
      bakeout validate my-model-erased --base models/my-model --steps 20 --count 8 --size 256
    """
    from bakeout.artifact import report_folder, validate_folder
    from bakeout.describe import describe_report
    from bakeout.generate import size_from_text

    if size is not None:
        options["size"] = size_from_text(size)
    _quieten_libraries()
    sessions = None
    if providers or threads is not None or kernels != "function":
        from bakeout.export.onnx_pipeline import SessionSettings

        sessions = SessionSettings(providers or SessionSettings().providers, threads=threads, kernels=kernels)
    with _own_warnings(), _progress_bar(1, "validating") as bar:
        report = validate_folder(
            folder, output, targets=targets or None, sessions=sessions, progress=bar.update, **options
        )
    click.echo(describe_report(report))
    click.echo(f"\nThe report is {report_folder(folder, output) / 'report.html'}")
    click.get_current_context().exit(_EXITS[report.verdict])


_prompts_option = click.option(
    "--prompts",
    "names",
    metavar="FILE",
    multiple=True,
    help="A .txt, .csv, .tsv, .jsonl or .parquet file, or shapes; may be given several times.",
)
_column_option = click.option(
    "--column",
    metavar="NAME",
    help="Of tables: where the prompts are.  [default: the only one, prompt, caption or text]",
)
_device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or mps; auto is the GPU where there is one."
)


@main.group(epilog=_EXIT_CODES)
@_debug_option
def sae() -> None:
    """Sparse autoencoders of text encoders, which the method SNCE edits by.

    \b
    Example:
      bakeout sae train shapes --prompts shapes -o sae.safetensors
    """


@sae.command("train", epilog=_EXIT_CODES)
@click.argument("model")
@_prompts_option
@_column_option
@_output_option("output", "FILE", "The autoencoder to write, a .safetensors file.", required=True)
@click.option("--tokens", metavar="N", help="How long to train, as 400M or 2.5B.  [default: 400M]")
@click.option("--epochs", type=int, help="How often to train on each prompt, instead of --tokens.")
@click.option("--k", type=int, default=32, show_default=True, help="Latents of a token that are not zero, at most.")
@click.option("--latents", type=int, help="Latents in all.  [default: four times the encoder's width]")
@click.option(
    "--encoder",
    type=click.Choice(["text_encoder", "text_encoder_2"]),
    default="text_encoder",
    show_default=True,
    help="SDXL has two.",
)
@click.option("--layer", type=int, help="Whose output it reads, from 0.  [default: 9 of 12, and as deep in others]")
@click.option("--batch", type=int, default=4096, show_default=True, help="Tokens of a step.")
@click.option("--learning-rate", type=float, default=4e-4, show_default=True, help="Of Adam, constant.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first weights and the order of tokens.")
@_device_option
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the large products."
)
@click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep an epoch's activations there, so that further epochs need no text encoder.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of what is kept: fp16 takes half the room; fp32 changes no bit.",
)
@click.option("--checkpoint-every", type=int, default=500, show_default=True, help="Steps between two.")
@click.option("--force", is_flag=True, help="Overwrite what is there, and begin anew where other settings were.")
@_debug_option
def sae_train(
    model: str, names: tuple[str, ...], column: str | None, output: Path, tokens: str | None, **settings: Any
) -> None:
    """Train a TopK sparse autoencoder of what a layer of MODEL's text encoder makes of prompts.

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, or the id of a model on
    the Hugging Face hub. Its text encoder runs up to the layer, all 77 positions are trained on, and nothing is kept on
    disk but a checkpoint. Prompts are repeated until there were enough tokens. They are shuffled within some 1,700 at a
    time, so a file that is sorted should be shuffled first. One text in a hundred is never trained on: at the end the
    autoencoder is measured on those.

    Beside FILE are written FILE's name with -training.png, the curves, and with -training.json, the log. While it runs
    there is FILE.partial: if the command is interrupted, run it again and it goes on, with the same bytes in the end.

    For several GPUs: accelerate launch -m bakeout sae train ...

    \b
    Examples:
      bakeout sae train shapes --prompts shapes --tokens 4M --k 8 -o sae.safetensors
      bakeout sae train models/my-model --prompts laion.parquet --column caption --dtype bf16 -o sae.safetensors
    """
    import json

    from bakeout import sae as training
    from bakeout.editor.sae.processes import is_first_process

    prompts = training.prompts_from(names, column)
    number = None if tokens is None else training.tokens_from_text(tokens)
    _quieten_libraries()
    with _own_warnings(), _progress_bar(1, "training") as bar:
        trained = training.train(
            model, prompts, output, tokens=number, progress=bar.update, told=bar.set_postfix_str, **settings
        )
    if not is_first_process():
        return
    log = training.training_log(output)
    reached = json.loads(log.read_text(encoding="utf-8"))["held_out"]
    click.echo(trained)
    click.echo(
        f"On held-out prompts: variance explained {reached['variance_explained']:.4f}, L0 {reached['l0']:.1f}, "
        f"dead {reached['dead_share']:.1%} ({reached['tokens']:,} tokens)"
    )
    click.echo(f"It is {output}; its curves are {log.with_suffix('.png')}, its log is {log}")


@sae.command("rank", epilog=_EXIT_CODES)
@click.argument("recipe", type=click.Path(path_type=Path))
@_output_option("chart", "PNG", "Also draw the ranking.")
@click.option("--top", type=int, default=20, show_default=True, help="Neurons to show of each edit.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there already.")
@_device_option
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="In which the text encoders run."
)
@_debug_option
def sae_rank(recipe: Path, chart: Path | None, top: int, force: bool, device: str, dtype: str) -> None:
    """Show which neurons RECIPE's SNCE edits would take out, and which come next.

    A neuron qualifies if it is active in a prompt with the concept and not in its like without. The table has, for each
    edit and text encoder, the neurons by their score, the number of pairs that tell them apart, and the tokens at which
    they are active; those that the edit takes out are marked with *. Look here before you change `neurons`, `pairs` or
    the prompts: a neuron of the concept is active at its words and what follows them, and in nearly all pairs.

    The picture has on the left one pair's scores, with the concept upwards and without it downwards: what is active in
    both is filtered out. On the right are the sums by which neurons are ranked.

    \b
    Example:
      bakeout sae rank recipe.toml -o ranking.png
    """
    from bakeout.plot import reserve_png, write_png
    from bakeout.ranking import describe_rankings, draw_rankings, rank_recipe
    from bakeout.recipe import Recipe

    _quieten_libraries()
    if chart is not None:
        reserve_png(chart, force=force)
    loaded = Recipe.load(recipe)
    ranked = sum(edit.method == "snce" for edit in loaded.edits)
    with _own_warnings(), _progress_bar(ranked, "ranking") as bar:
        rankings = rank_recipe(loaded, top=top, device=device, dtype=dtype, progress=bar.update)
    click.echo(describe_rankings(rankings))
    if chart is not None:
        write_png(chart, lambda part: draw_rankings(rankings, part))
        click.echo(f"\nThe picture is {chart}")


@sae.command("import", epilog=_EXIT_CODES)
@click.argument("source", type=click.Path(path_type=Path))
@_output_option("output", "FILE", "The autoencoder to write, a .safetensors file.", required=True)
@click.option("--site", metavar="SITE", help="Whose output it reads, as text_encoder.layer.9, where SOURCE is silent.")
@click.option("--model", metavar="MODEL", help="Measure the autoencoder on what this model makes of --prompts.")
@_prompts_option
@_column_option
@click.option("--force", is_flag=True, help="Overwrite FILE if it is there already.")
@_device_option
@_debug_option
def sae_import(
    source: Path, output: Path, model: str | None, names: tuple[str, ...], column: str | None, **settings: Any
) -> None:
    """Bring in a sparse autoencoder that another project trained.

    SOURCE is a folder, or the file of the weights in it. It is recognised by its tensors:

    \b
    sparsify   <hook point>/cfg.json and sae.safetensors, also of SAeUron
    SAELens    cfg.json and sae_weights.safetensors, of the architectures topk and standard
    OpenAI     one .pt file; TopK implies a layer norm of the input
    steerers   config.json and state_dict.pth, also of ItD

    It computes what it computed there. An option that bakeout cannot hold, or that the files leave open, is refused,
    and no code in a pickle is ever run. Where SOURCE does not say which layer it reads, say it with --site.

    With --model and --prompts it is measured on these prompts; an autoencoder that explains less than the mean does is
    of another site or another normalisation, and is not written.

    \b
    Examples:
      bakeout sae import checkpoints/text_model.encoder.layers.9 -o sae.safetensors
      bakeout sae import 9.pt --site text_encoder.layer.9 --model my-model --prompts prompts.txt -o sae.safetensors
    """
    from bakeout.neurons import describe_activity, describe_autoencoder
    from bakeout.sae import prompts_from
    from bakeout.sae_import import import_autoencoder

    _quieten_libraries()
    prompts = prompts_from(names, column) if names else None
    with _own_warnings(), _prompt_counter() as bar:
        autoencoder, activity = import_autoencoder(
            source, output, model=model, prompts=prompts, progress=bar.update, **settings
        )
    click.echo(describe_autoencoder(autoencoder, output))
    if activity is not None:
        click.echo(f"\n{describe_activity(activity)}")


@sae.command("inspect", epilog=_EXIT_CODES)
@click.argument("autoencoder", metavar="SAE")
@click.option("--model", metavar="MODEL", help="Whose text encoder makes the activations of --prompts.")
@_prompts_option
@_column_option
@click.option("--count", type=int, help="Prompts to read, from the first on.  [default: all; of shapes alone 2,000]")
@click.option("--neuron", "neurons", type=int, metavar="N", multiple=True, help="To show; may be given several times.")
@click.option("--top", type=int, metavar="N", help="Show the N most active neurons.  [default: 4, without --neuron]")
@_output_option("chart", "PNG", "Also draw the neurons' histograms of activations.")
@click.option("--force", is_flag=True, help="Overwrite PNG if it is there already.")
@_device_option
@_debug_option
def sae_inspect(
    autoencoder: str,
    model: str | None,
    names: tuple[str, ...],
    column: str | None,
    chart: Path | None,
    force: bool,
    **settings: Any,
) -> None:
    """Show what the sparse autoencoder SAE is, and what its neurons answer to.

    SAE is a file that `bakeout sae train` or `bakeout sae import` wrote, or `shapes` for the one that comes with the
    built-in model, which is shown on that model's captions.

    With --model and --prompts: the share of variance that it explains, L0 (the latents of a token that are not zero),
    and the share of latents that no token woke (dead). Of each neuron how often it is active, and the prompts with the
    token at which it is most; with -o also its histogram of activations. Of several neurons the most active are those
    whose activations sum up to the most, the first position aside, which is the same in every prompt. Prompts are read
    twice, and memory does not grow with their number.

    \b
    Examples:
      bakeout sae inspect sae.safetensors
      bakeout sae inspect shapes --top 6 -o neurons.png
      bakeout sae inspect sae.safetensors --model models/my-model --prompts prompts.csv --neuron 217
    """
    from bakeout import neurons as looking

    builtin = looking.builtin_autoencoder(autoencoder)
    path = builtin or Path(autoencoder)
    if builtin is not None and model is None and not names:
        model, names = autoencoder, (autoencoder,)
        if settings["count"] is None:
            settings["count"] = looking.BUILTIN_COUNT
    _quieten_libraries()
    with _own_warnings(), _prompt_counter() as bar:
        text = looking.inspect_autoencoder(
            path, model, names, column=column, chart=chart, force=force, progress=bar.update, **settings
        )
    click.echo(text)
    if chart is not None:
        click.echo(f"\nThe chart is {chart}")


@main.command(epilog=_VALIDATE_EXIT_CODES)
@_output_option("folder", "DIR", "Folder of the demo.", default=Path("demo"), show_default=True)
@_debug_option
def demo(folder: Path) -> None:
    """Erase an object, a style, a colour and a background from the built-in model `shapes`, and prove it.

    Bakes ConceptPrune, SNCE and ActErase into one artifact of ONNX graphs, draws 32 prompts with the model as it was,
    with the eager PyTorch reference and in ONNX Runtime, and compares. What was erased and what was kept is judged by
    the detector of `shapes`, with exact binomial intervals.

    DIR has recipe.toml, the artifact shapes-erased/, the report in report/, and demo.png, the models side by side. An
    earlier demo in DIR is overwritten. It takes two minutes on two cores.

    \b
    Example:
      bakeout demo -o demo
    """
    from bakeout import demo as demonstration
    from bakeout.describe import describe_report

    _quieten_libraries()
    with _own_warnings():
        with _progress_bar(demonstration.BAKES, "baking") as bar:
            artifact = demonstration.bake(folder, bar.update)
        with _progress_bar(1, "validating") as bar:
            report = demonstration.judge(artifact, folder, bar.update)
    click.echo(describe_report(report))
    click.echo(f"\nSide by side: {folder / 'demo.png'}\nThe report: {folder / 'report' / 'report.html'}")
    click.get_current_context().exit(_EXITS[report.verdict])


def _tell(line: str, error: BaseException) -> None:
    """The line, and what was noted on the way out."""
    for text in (line, *getattr(error, "__notes__", ())):
        click.echo(text, err=True)


def _quieten_libraries() -> None:
    """The libraries' progress bars and remarks on optional packages are no business of a user of the command line."""
    if click.get_current_context().meta.get(_DEBUG):
        return
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Image-to-image with SDXL casts a VAE that is float32 already, and each time is told what that may do.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Bakeout's warnings in a line each; the libraries' only with --debug."""
    if click.get_current_context().meta.get(_DEBUG):
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            own = [str(it.message) for it in caught if it.category.__module__.startswith("bakeout.")]
            for message in dict.fromkeys(own):
                click.echo(f"Warning: {message}", err=True)


@contextmanager
def _progress_bar(total: int, doing: str = "drawing") -> Iterator[Any]:
    """A tqdm bar on a terminal, nothing elsewhere; its `update` takes fractions of one of `total`."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        disable=not sys.stderr.isatty(),
        leave=False,
        bar_format=f"{doing} {{percentage:3.0f}}% |{{bar}}| {{elapsed}} < {{remaining}}{{postfix}}",
    ) as bar:
        yield bar


@contextmanager
def _prompt_counter() -> Iterator[Any]:
    """A tqdm counter on a terminal, nothing elsewhere; its `update` takes numbers of prompts."""
    from tqdm import tqdm

    with tqdm(disable=not sys.stderr.isatty(), leave=False, unit=" prompts", desc="reading") as bar:
        yield bar
