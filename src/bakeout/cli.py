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
    type=click.Choice(["torch", "onnxruntime"]),
    help="What draws.  [default: onnxruntime with an artifact that has onnx/, else torch]",
)
@_providers_option
@_threads_option
@click.option("--no-arena", is_flag=True, help="ONNX Runtime gives memory back after every call: slower, smaller.")
@click.option("--compare", is_flag=True, help="Also draw an artifact's base and reference, and put all side by side.")
@click.option("--base", metavar="MODEL", help="The artifact's base, where it is a folder or file; with --compare.")
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
    compare: bool,
    base: str | None,
    folder: Path,
    force: bool,
    **settings: Any,
) -> None:
    """Draw pictures with MODEL, in eager PyTorch or ONNX Runtime.

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, the id of a model on
    the Hugging Face hub, or an artifact that `bakeout bake` wrote. ONNX Runtime draws with an artifact that has ONNX
    graphs (`bakeout export`), PyTorch with everything else; --device and --dtype are for PyTorch, --provider, --threads
    and --no-arena for ONNX Runtime. From the same seed both begin with the same noise.

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
    from bakeout.compare import comparison_for
    from bakeout.picture import read_picture
    from bakeout.recipe import open_any, recommended_for
    from bakeout.runtime import runtime_for

    request = Request(prompts, size=None if size is None else generation.size_from_text(size), **settings)
    if request.image is not None:
        read_picture(request.image)
    if base is not None and not compare:
        raise InputError("--base is of --compare: give both, or none")
    opened = open_any(model)
    chosen = runtime_for(
        opened, runtime, device=device, dtype=dtype, providers=providers, threads=threads, arena=not no_arena
    )
    _quieten_libraries()
    comparison = comparison_for(opened, base) if compare else None
    generation.reserve(folder, request, also=comparison.files(request) if comparison else (), force=force)
    pipeline = chosen.load(opened)
    request = generation.complete(request, pipeline, recommended_for(opened))
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
    """Bake what RECIPE erases into its model: find the edits, fold them into the weights, write an artifact.

    RECIPE is a TOML file that names the model, the concepts to erase, the method and its prompts.

    The artifact DIR has bakeout.json (what was erased from what, and how), edit.safetensors (the edit itself) and
    diffusers/, an ordinary diffusers folder: DiffusionPipeline.from_pretrained("DIR/diffusers", dtype=...) loads it
    without bakeout. In it only the tensors that the edit names differ from the model's own. What else RECIPE has among
    its targets is written too, as `bakeout export` does.

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
    steps = len(loaded.edits) + len(loaded.targets) - 1
    with _own_warnings(), _progress_bar(steps, "baking") as bar:
        artifact = loaded.bake(folder, force=force, device=device, dtype=dtype, progress=bar.update)
    click.echo(describe_artifact(artifact))
    click.echo("".join(f"\n{note}" for note in artifact.notes))
    click.echo(f"The artifact is {folder}; diffusers' from_pretrained loads {folder / 'diffusers'}")


@main.command(epilog=_EXIT_CODES)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["onnx"]), required=True, help="The format to add.")
@click.option("--force", is_flag=True, help="Replace the target where DIR has it already, whole or not.")
@_debug_option
def export(folder: Path, target: str, force: bool) -> None:
    """Add a format to the artifact DIR that `bakeout bake` wrote.

    \b
    onnx   DIR/onnx/: text encoders, UNet, VAE encoder and decoder as ONNX graphs in fp32, with scheduler and
           tokenizers. For any batch and size. `bakeout generate DIR` and optimum's pipelines for ONNX Runtime load it.
           A graph's weights have the names that they have in DIR/diffusers. Needs: pip install "bakeout[cpu]"

    It is made of DIR/diffusers, after every byte that stays was checked, and DIR changes when all is written:
    interrupted, it is as it was. The same artifact gives the same bytes. Reports of earlier validations are marked
    stale.

    \b
    Example:
      bakeout export shapes-erased --target onnx
    """
    from bakeout.export.artifact import Artifact

    _quieten_libraries()
    with _own_warnings(), _progress_bar(1, "exporting") as bar:
        opened = Artifact.open(folder, but=target if force else None)
        artifact = opened.export(target, force=force, progress=bar.update, started=bar.set_postfix_str)
    size = sum(file.bytes for name, file in artifact.manifest.files.items() if name.startswith(f"{target}/"))
    click.echo(f"{folder / target} is written ({size / 1e6:,.0f} MB): draw with bakeout generate {quote(str(folder))}")


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
    in numbers and with -o as a bar chart, how it was realised and why, and what undoes it.

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
    help="diffusers or onnx; may be given several times.  [default: all]",
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
@click.option("--size", metavar="SIDE|WxH", help="In pixels, 512 or 512x768.  [default: the model's]")
@click.option("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)}.  [default: the models' own]")
@click.option("--device", default="auto", show_default=True, help="Of PyTorch: auto, cpu, cuda, cuda:1 or mps.")
@_providers_option
@_threads_option
@_debug_option
def validate(
    folder: Path,
    output: Path | None,
    targets: tuple[str, ...],
    size: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    **options: Any,
) -> None:
    """Judge whether the artifact DIR is what it claims: the model with the erasure, in every format, to rounding.

    Three models draw from the same noise, in fp32: the base (the model as it was), the reference (the base in eager
    PyTorch with the erasure as hooks) and the artifact, in each of its formats. It passes if every weight is what base
    and erasure give, every network answers as the reference's to rounding, and every step and picture is as near the
    reference as it must be, where the reference is far from the base. What cannot be told is no pass.

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
    if providers or threads is not None:
        from bakeout.export.onnx_pipeline import SessionSettings

        sessions = SessionSettings(providers or SessionSettings().providers, threads=threads)
    with _own_warnings(), _progress_bar(1, "validating") as bar:
        report = validate_folder(
            folder, output, targets=targets or None, sessions=sessions, progress=bar.update, **options
        )
    click.echo(describe_report(report))
    click.echo(f"\nThe report is {report_folder(folder, output) / 'report.html'}")
    click.get_current_context().exit(_EXITS[report.verdict])


@main.command(epilog=_VALIDATE_EXIT_CODES)
@_output_option("folder", "DIR", "Folder of the demo.", default=Path("demo"), show_default=True)
@_debug_option
def demo(folder: Path) -> None:
    """The main job on the built-in model: erase an object and a style from `shapes`, and prove it.

    Bakes ConceptPrune into an artifact, exports it to ONNX, draws 24 prompts with the model as it was, with the eager
    PyTorch reference and in ONNX Runtime, and compares. What was erased and what was kept is judged by the detector of
    `shapes`, with exact binomial intervals.

    DIR has recipe.toml, the artifact shapes-erased/, the report in report/, and demo.png, the models side by side. An
    earlier demo in DIR is overwritten. It takes about a minute on two cores.

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
