"""The command line. Commands import what they need when they run, so that every `--help` is instant."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bakeout import __version__
from bakeout.editor.errors import InputError
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
_folder_option = click.option(
    "-o",
    "--output",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the pictures.",
)


class _Group(click.Group):
    """Turns what a user can mend, and an interrupt, into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            if ctx.meta.get(_DEBUG):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                raise
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EXIT_CODES
)
@click.version_option(__version__, prog_name="bakeout", message="%(prog)s %(version)s")
@_debug_option
def main() -> None:
    """Bake concept erasure into text-to-image models, export them, and prove that what ships erases.

    MODEL is everywhere the same: the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, or
    the id of a model on the Hugging Face hub.

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
@_folder_option
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

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, or the id of a model
    on the Hugging Face hub.

    The pictures are DIR/<number of the prompt>-<seed>.png and carry as text what they were drawn from;
    DIR/pictures.json lists them. The same command draws the same pictures on the same machine; another
    batch size changes them by rounding at most.

    \b
    Examples:
      bakeout generate shapes --prompt "a red circle on grass" -o pictures
      bakeout generate shapes --prompt "a star" --prompt "a ring" --seed 7 -n 3 --scheduler euler --steps 30 -o pictures
    """
    from bakeout import generate as generation
    from bakeout.editor.model import open_model

    request = Request(prompts, size=None if size is None else generation.size_from_text(size), **settings)
    device = generation.device_from_text(device)
    torch_dtype = generation.dtype_from_text(dtype, device)
    _quieten_libraries()
    opened = open_model(model)
    generation.reserve(folder, request, force=force)
    pipeline = opened.pipeline(device, torch_dtype)
    request = generation.complete(request, pipeline, generation.recommended_settings(opened))
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
@click.argument("model")
@_debug_option
def inspect(model: str) -> None:
    """Show what MODEL is made of: its family, components, dtypes, parameters, and the sites that can be edited.

    MODEL is the built-in model `shapes`, a diffusers folder, a single .safetensors checkpoint, or the id of a model
    on the Hugging Face hub. No weights are loaded. Of a built-in model it also shows how well it draws.

    \b
    Example:
      bakeout inspect shapes
    """
    from bakeout.describe import describe
    from bakeout.editor.model import open_model

    _quieten_libraries()
    click.echo(describe(open_model(model)))


@main.command(epilog=_EXIT_CODES)
@_folder_option
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
def _progress_bar(total: int) -> Iterator[Callable[[float], object]]:
    """A bar on a terminal, nothing elsewhere; its `update` takes fractions of a picture."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        disable=not sys.stderr.isatty(),
        leave=False,
        bar_format="drawing {percentage:3.0f}% |{bar}| {elapsed} < {remaining}",
    ) as bar:
        yield bar.update
