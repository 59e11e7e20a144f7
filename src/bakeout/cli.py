"""The command line. Commands import what they need when they run, so that every `--help` is instant."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
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
@_pictures_option
@click.option("--force", is_flag=True, help="Overwrite pictures that are there already.")
@_debug_option
def generate(
    model: str,
    prompts: tuple[str, ...],
    size: str | None,
    device: str,
    dtype: str,
    folder: Path,
    force: bool,
    **settings: Any,
) -> None:
    """Draw pictures with MODEL in eager PyTorch.

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, the id of a model on
    the Hugging Face hub, or an artifact that `bakeout bake` wrote.

    The pictures are DIR/<number of the prompt>-<seed>.png and carry as text what they were drawn from;
    DIR/pictures.json lists them. The same command draws the same pictures on the same machine; another
    batch size changes them by rounding at most.

    \b
    Examples:
      bakeout generate shapes --prompt "a red circle on grass" -o pictures
      bakeout generate shapes --prompt "a star" --prompt "a ring" --seed 7 -n 3 --scheduler euler --steps 30 -o pictures
    """
    from bakeout import generate as generation
    from bakeout.recipe import open_any

    request = Request(prompts, size=None if size is None else generation.size_from_text(size), **settings)
    device = generation.device_from_text(device)
    torch_dtype = generation.dtype_from_text(dtype, device)
    _quieten_libraries()
    opened, recommended = open_any(model)
    generation.reserve(folder, request, force=force)
    pipeline = opened.pipeline(device, torch_dtype)
    request = generation.complete(request, pipeline, recommended)
    facts = {"model": Path(model).name if Path(model).exists() else model, "device": device, "dtype": str(torch_dtype)}
    with _progress_bar(len(request.pictures)) as progress:
        entries = generation.draw_to_folder(pipeline, request, folder, facts, progress)
    for problem in sorted({entry["problem"] for entry in entries if entry["problem"]}):
        files = [entry["file"] for entry in entries if entry["problem"] == problem]
        click.echo(
            f"Warning: {len(files)} of {len(entries)} pictures show nothing ({problem}): {', '.join(files)}", err=True
        )
    click.echo(f"{len(entries)} picture{'s' * (len(entries) > 1)} in {folder}")


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
    without bakeout. In it only the tensors that the edit names differ from the model's own.

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
    with _own_warnings(), _progress_bar(len(loaded.edits), "calibrating") as progress:
        artifact = loaded.bake(folder, force=force, device=device, dtype=dtype, progress=progress)
    click.echo(describe_artifact(artifact))
    click.echo("".join(f"\n{note}" for note in artifact.notes))
    click.echo(f"The artifact is {folder}; diffusers' from_pretrained loads {folder / 'diffusers'}")


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
    from bakeout.describe import describe, describe_artifact
    from bakeout.editor.model import open_model
    from bakeout.recipe import is_artifact

    _quieten_libraries()
    if not is_artifact(model):
        if chart is not None:
            raise InputError(f"{model} is no artifact, so there is nothing to draw: leave -o out")
        click.echo(describe(open_model(model)))
        return
    from bakeout.export.artifact import Artifact
    from bakeout.plot import write_chart

    artifact = Artifact.open(model)
    click.echo(describe_artifact(artifact))
    if chart is not None:
        write_chart(artifact.manifest, chart, force=force)
        click.echo(f"\nThe chart is {chart}")


@main.command(epilog=_EXIT_CODES)
@_pictures_option
@_debug_option
def demo(folder: Path) -> None:
    """Draw four pictures with the built-in model `shapes` and print what its own detector sees in them.

    An earlier demo's pictures in DIR are overwritten.

    \b
    Example:
      bakeout demo -o demo
    """
    from bakeout import demo as demonstration
    from bakeout.describe import table

    _quieten_libraries()
    with _progress_bar(len(demonstration.SCENES)) as progress:
        verdicts = demonstration.run(folder, progress)
    rows = [
        (
            verdict.prompt,
            " ".join(verdict.seen.values()),
            "as asked" if verdict.seen == verdict.wanted else "not as asked",
        )
        for verdict in verdicts
    ]
    click.echo(table(("prompt", "the detector sees", "verdict"), rows))
    click.echo(f"{len(verdicts)} pictures in {folder}")


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
def _progress_bar(total: int, doing: str = "drawing") -> Iterator[Callable[[float], object]]:
    """A bar on a terminal, nothing elsewhere; its `update` takes fractions of one of `total`."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        disable=not sys.stderr.isatty(),
        leave=False,
        bar_format=f"{doing} {{percentage:3.0f}}% |{{bar}}| {{elapsed}} < {{remaining}}",
    ) as bar:
        yield bar.update
