"""Read sparse autoencoders that other projects trained: those of sparsify, SAELens, OpenAI and Concept Steerers.

What is read computes what it computed there: the same latents, and the same reconstruction but for one thing. With
`layer_norm`, SAELens and OpenAI divide by std + 1e-5 and multiply by std alone, here it is std + 1e-5 both times.

A file that leaves something open is refused, as are options that a `SparseAutoencoder` cannot hold: a guess gives an
edit that looks right and takes out another direction.
"""

from __future__ import annotations

import json
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.edit import InputNorm
from bakeout.editor.errors import InputError
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.editor.text_files import read_text

# A configuration has some dozen lines, the pickle of ten tensors some kilobytes: what is larger is no such thing.
MAX_CONFIG_BYTES = 1_000_000
MAX_PICKLE_BYTES = 100_000
_WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "state_dict.pth")
_PICKLES = (".pt", ".pth")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SITE = re.compile(r"(?P<encoder>text_encoder(?:_2)?)\.layer\.(?P<layer>0|[1-9]\d{0,2})")
# How the libraries name the output of a layer of a text encoder. Concept Steerers' folders go on with the settings.
_HOOK = re.compile(
    r"(?:(?P<encoder>text_encoder(?:_2)?)\.)?(?:text_model\.)?(?:encoder\.)?layers\.(?P<layer>\d{1,3})(?:_k\d+_hidden.*)?"
    r"|blocks\.(?P<block>\d{1,3})\.hook_resid_post"
)
# All that a state dict of plain tensors calls when it is read.
_CALLS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage)", re.ASCII
)
# Counters that the training code keeps beside the weights.
_COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SPARSIFY_OPTIONS = (
    "activation", "d_in", "expansion_factor", "num_latents", "k",
    "normalize_decoder", "multi_topk",  # of the training alone
)  # fmt: skip
_SAELENS_NORMS: Mapping[str, InputNorm] = {
    "none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm",
}  # fmt: skip
_SAELENS_OTHERS = {
    "abstopk": "it keeps negative activations",
    "batchtopk": "what it makes of a token depends on the other tokens of the batch",
    "gated": "it has a gate beside its encoder",
    "jumprelu": "its latents have thresholds of their own, as those of a finished BatchTopK too",
    "matryoshka_batchtopk": "what it makes of a token depends on the other tokens of the batch",
}


class _Fault(Exception):  # noqa: N818 - not an error of its own: `read_foreign` adds the file's name
    """What is wrong with a file."""


@dataclass(frozen=True)
class _Source:
    """What a file and the JSON beside it say.

    Attributes:
        weights: the file of the weights.
        tensors: by name, on the CPU.
        said: the configuration.
        beside: what a pickle has beside its tensors.
    """

    weights: Path
    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Read:
    """An autoencoder as its format describes it; matrices either way round, e and c as they are applied here."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    center: Tensor
    k: int | None
    hook: str
    said_width: Any = None
    said_latents: Any = None
    input_norm: InputNorm = "none"
    center_input: bool = True
    rescale: bool = False


def read_foreign(source: Path, site: str | None = None) -> SparseAutoencoder:
    """The autoencoder in a folder or a file of another project, recognised by the names of its tensors.

    | format     | files                                   | hook point                       |
    |------------|-----------------------------------------|----------------------------------|
    | `sparsify` | `cfg.json`, `sae.safetensors`           | the folder's name                |
    | `saelens`  | `cfg.json`, `sae_weights.safetensors`   | `hook_name` in the configuration |
    | `openai`   | one `.pt`                               | is not said                      |
    | `steerers` | `config.json`, `state_dict.pth`         | the name of a folder above       |

    The tensors are in the dtype as stored; where an option had to be folded into them, in fp32 at least.

    Args:
        source: the folder, or the file of the weights with its configuration beside it.
        site: whose output it reads, `text_encoder.layer.9`; None where the hook point says it.

    Raises:
        InputError: it is in none of the formats or is broken, it holds code, it has an option that changes what it
            computes and has no like here, or it does not say which site it reads, and `site` does not either.
    """
    if site is not None and not _SITE.fullmatch(site):
        raise InputError(f"{site!a:.100} is no site of a text encoder's layer; write it as text_encoder.layer.9")
    weights = _weights_of(source)
    try:
        stored = _stored(weights)
        name, read = _recognised(stored)
        return _assembled(read(stored), name, site)
    except _Fault as fault:
        raise InputError(f"{weights} {fault}") from None


def _weights_of(source: Path) -> Path:
    try:
        if not source.exists():
            raise InputError(f"{source} does not exist; give the folder or the file of a sparse autoencoder")
        if not source.is_dir():
            return source
        files = sorted(it for it in source.iterdir() if it.suffix in (".safetensors", *_PICKLES))
        inside = sorted(it.name for it in source.iterdir() if (it / "cfg.json").is_file())
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source!s:.300} cannot be read ({error}); check the path and its permissions") from None
    known = [it for it in files if it.name in _WEIGHTS]
    if len(known or files) == 1:
        return (known or files)[0]
    if files:
        two = f"{files[0].name}, {files[1].name}"
        raise InputError(f"{source} holds several files of weights ({two}); give the one to read")
    if inside:
        raise InputError(f"{source} holds one autoencoder for each hook point; give one of its folders, as {inside[0]}")
    raise InputError(f"{source} holds no autoencoder: there is no .safetensors, .pt or .pth file in it")


def _stored(weights: Path) -> _Source:
    if weights.suffix in _PICKLES:
        entries = _read_pickle(weights)
        # Concept Steerers' file has its state dict under a name, OpenAI's is one.
        nested = entries.get("state_dict")
        state = nested if isinstance(nested, Mapping) else entries
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        beside = {name: value for name, value in state.items() if name not in tensors}
        config = weights.with_name("config.json")
        return _Source(weights, tensors, _read_config(config) if config.is_file() else {}, beside)
    from safetensors.torch import load_file

    header = read_header(weights)
    if "bakeout.sae" in header.metadata:
        raise _Fault("is an autoencoder of bakeout already; use it as it is")
    config = weights.with_name("cfg.json")
    if not config.is_file():
        raise _Fault("has no cfg.json beside it, which says what it computes; take that from its source too")
    return _Source(weights, load_file(weights), _read_config(config))


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(read_text(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        said = None
    if not isinstance(said, dict):
        raise InputError(f"{path} is not a JSON object; take it from its source again")
    return said


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """The entries of a state dict that `torch.save` wrote; nothing of it is run."""
    _check_archive(path)
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as it:
        raise _Fault(f"cannot be read ({type(it).__name__}); take it from its source again") from None
    if not isinstance(entries, Mapping):
        raise _Fault("is not a state dict; give the file that the training code saved")
    for name, value in [*entries.items(), *_items(entries.get("state_dict"))]:
        if not isinstance(name, str):
            raise _Fault("is not a state dict (its entries have no names); give the file that the training code saved")
        # A stride of zero makes any size of one number.
        if isinstance(value, Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise _Fault(f"declares {name!a:.100} larger than what is stored of it; take it from its source again")
    return entries


def _items(nested: object) -> Collection[tuple[object, object]]:
    return nested.items() if isinstance(nested, Mapping) else ()


def _check_archive(path: Path) -> None:
    """Refuse what unpacks to more than it is, and whatever is more than tensors.

    `weights_only` keeps code from running, but still makes an array of any length that a pickle asks for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _Fault("is not a file; give the file of the weights")
        if not zipfile.is_zipfile(path):
            raise _Fault("is no file of PyTorch 1.6 or later; load it where it comes from and save it with torch.save")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            packed = any(it.compress_type != zipfile.ZIP_STORED or it.file_size != it.compress_size for it in entries)
            pickles = [it for it in entries if it.filename.rpartition("/")[2] == "data.pkl"]
            if packed or len(set(names)) < len(names) or sum(it.file_size for it in entries) > path.stat().st_size:
                raise _Fault("is not as torch.save writes it; take it from its source again")
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise _Fault("holds more than the tensors of an autoencoder; give the file of its weights alone")
            pickled = archive.read(pickles[0])
        called = [
            f"{arg}" for code, arg, _ in pickletools.genops(pickled) if code.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        ]
    except OSError as error:
        raise _Fault(f"cannot be read ({error.strerror}); check its permissions") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _Fault(f"cannot be read ({type(error).__name__}); take it from its source again") from None
    for name in called:
        if not _CALLS.fullmatch(name):
            raise _Fault(
                f"holds code ({name.replace(' ', '.')!a:.80}), which is never run here; ask for the tensors alone, as "
                "safetensors"
            )


def _recognised(stored: _Source) -> tuple[str, Callable[[_Source], _Read]]:
    names = stored.tensors.keys()
    if names >= {"W_enc", "W_dec"}:
        return "saelens", _saelens
    if names >= {"encoder.weight", "W_dec"}:
        return "sparsify", _sparsify
    if names >= {"encoder.weight", "pre_bias"}:
        return ("openai", _openai) if "activation" in stored.beside else ("steerers", _steerers)
    listed = ", ".join(sorted(names)[:6])
    raise _Fault(f"is of no format that is read (its tensors: {listed!a:.200}): sparsify, SAELens, OpenAI or steerers")


def _sparsify(stored: _Source) -> _Read:
    """EleutherAI's sparsify (`sparsify/sparse_coder.py`, 1.3), and SAeUron, which is made of an earlier one."""
    said = stored.said
    if said.get("activation", "topk") != "topk":
        raise _Fault(f"has the activation {said['activation']!a:.50}; only TopK is read of sparsify")
    for option, value in said.items():
        if option not in _SPARSIFY_OPTIONS and value:
            raise _Fault(f"was made with {option!a:.50}, which changes what it computes; train one without")
    encoder, bias, decoder, center = _tensors(stored, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    width = said.get("d_in")
    latents = said.get("num_latents") or _product(width, said.get("expansion_factor"))
    hook = stored.weights.parent.resolve().name
    return _Read(encoder, bias, decoder, center, _k(said.get("k")), hook, width, latents)


def _saelens(stored: _Source) -> _Read:
    """SAELens (`sae_lens/saes/`, 6.54; and the configurations that it still reads of versions before 6)."""
    said = stored.said
    nested = said.get("metadata")
    metadata = {**said, **(nested if isinstance(nested, Mapping) else {})}
    hook = metadata.get("hook_name", metadata.get("hook_point"))
    norm = said.get("normalize_activations")
    if said.get("reshape_activations", "none") != "none" or metadata.get("hook_head_index") is not None:
        raise _Fault("reads the heads of an attention; only the output of a text encoder's layer can be edited")
    # Before version 6 it may not be there, or be false or true.
    norm = {"None": "none", "False": "none", "True": "expected_average_only_in"}.get(str(norm), str(norm))
    if norm not in _SAELENS_NORMS:
        raise _Fault(
            f"needs its input normalised by {norm!a:.50}, of whose factors the file says nothing; fold them in with "
            "SAELens (fold_activation_norm_scaling_factor) and save it again"
        )
    k = _saelens_k(said)
    read = _tensors(stored, "W_enc", "b_enc", "W_dec", "b_dec")
    return _Read(
        *read, k, hook if isinstance(hook, str) else "", said.get("d_in"), said.get("d_sae"), _SAELENS_NORMS[norm],
        center_input=_flag(said, "apply_b_dec_to_input", True),
        rescale=k is not None and _flag(said, "rescale_acts_by_decoder_norm", False),
    )  # fmt: skip


def _saelens_k(said: Mapping[str, Any]) -> int | None:
    """The k of TopK, None for ReLU, whichever way the versions of SAELens say it."""
    kwargs = said.get("activation_fn_kwargs")
    k = said.get("k", kwargs.get("k") if isinstance(kwargs, Mapping) else None)
    activation = said.get("activation_fn", said.get("activation_fn_str"))
    architecture = said.get("architecture", "standard" if activation else None)
    if architecture == "topk" and activation in (None, "topk", "relu"):
        return _k(k)
    if architecture != "standard":
        why = _SAELENS_OTHERS.get(str(architecture), "only standard and topk are read")
        raise _Fault(f"is of the architecture {architecture!a:.50}: {why}; train a TopK")
    if activation == "topk":
        return _k(k)
    if activation not in (None, "relu") or k is not None:
        raise _Fault(
            f"is a standard autoencoder with the activation {activation!a:.50} and k {k!a:.20}, which do not go "
            "together; correct its cfg.json"
        )
    return None


def _openai(stored: _Source) -> _Read:
    """OpenAI's `sparse_autoencoder/model.py`, where TopK implies a layer norm of the input."""
    activation, settings = stored.beside["activation"], stored.beside.get("activation_state_dict")
    if activation not in ("TopK", "ReLU"):
        raise _Fault(f"has the activation {activation!a:.50}; TopK and ReLU are read")
    k = None
    if activation == "TopK":
        settings = settings if isinstance(settings, Mapping) else {}
        k = _k(settings.get("k"))
        if settings.get("postact_fn") != "ReLU":
            raise _Fault(f"has {settings.get('postact_fn')!a:.50} after its TopK; only ReLU is read")
    read = _tensors(stored, "encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    return _Read(*read, k, "", input_norm="none" if k is None else "layer_norm")


def _steerers(stored: _Source) -> _Read:
    """Concept Steerers (`training/k_sparse_autoencoder.py`), as ItD and Unpacking SDXL: OpenAI's names, no norm."""
    said = stored.said
    if "k" not in said:
        raise _Fault("says neither an activation nor, in a config.json beside it, k; take that from its source too")
    read = _tensors(stored, "encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    # <hook point>_k32_hidden3072_…/final
    folder = stored.weights.parent.resolve()
    hook = next((it.name for it in (folder, folder.parent) if _HOOK.fullmatch(it.name)), "")
    return _Read(*read, _k(said["k"]), hook, said.get("d_model"), said.get("n_dirs_local"))


def _assembled(read: _Read, source_format: str, site: str | None) -> SparseAutoencoder:
    """The autoencoder, with what its format applies apart folded into the tensors.

    `rescale` chooses and weighs latents by what they add, z_i ‖D_:i‖, and divides by ‖D_:i‖ again; without
    `center_input` E is applied to n(x), not to n(x) - c:

        E' = diag(‖D_:i‖) E,   e' = ‖D_:i‖ e,   D' = D diag(1 / ‖D_:i‖);   e' = e + E c
    """
    if read.encoder_bias.ndim != 1 or read.center.ndim != 1:
        raise _Fault("has a bias that is no vector; take it from its source again")
    latents, width = len(read.encoder_bias), len(read.center)
    if latents == width:
        raise _Fault(f"has as many latents as features ({width}), so nothing tells which way round its matrices lie")
    for what, told, found in (("features", read.said_width, width), ("latents", read.said_latents, latents)):
        if told is not None and (type(told) is not int or told != found):
            raise _Fault(f"has {found} {what} and its configuration says {told!a:.30}; they are not of one autoencoder")
    encoder = _oriented("encoder", read.encoder, latents, width)
    decoder = _oriented("decoder", read.decoder, width, latents)
    parts = [encoder, read.encoder_bias, decoder, read.center]
    for tensor in parts:
        if tensor.dtype not in _FLOATS:
            raise _Fault(f"has weights in {str(tensor.dtype).removeprefix('torch.')}; take a float version")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in parts))
    folded = read.rescale or not read.center_input
    encoder, bias, decoder, center = (tensor.to(torch.float64 if folded else dtype) for tensor in parts)
    if read.rescale:
        norms = decoder.norm(dim=0)
        if not bool((norms > 0).all()):
            raise _Fault("has a decoder's column of zeros, by whose norm it divides; take it from its source again")
        encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms
    if not read.center_input:
        bias = bias + encoder @ center
    if folded:
        dtype = torch.promote_types(dtype, torch.float32)
    activation: Literal["topk", "relu"] = "relu" if read.k is None else "topk"
    k = latents if read.k is None else read.k
    encoder, bias, decoder, center = (tensor.to(dtype) for tensor in (encoder, bias, decoder, center))
    try:
        return SparseAutoencoder(
            encoder=encoder.contiguous(), encoder_bias=bias, decoder=decoder.contiguous(), center=center,
            k=k, activation=activation, input_norm=read.input_norm,
            site=_site(read.hook, site), source_format=source_format,
        )  # fmt: skip
    except ValueError as fault:
        raise _Fault(f"is no sound autoencoder ({fault}); take it from its source again") from None


def _oriented(what: str, matrix: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(matrix.shape) == (rows, columns):
        return matrix
    if tuple(matrix.shape) == (columns, rows):
        return matrix.T
    raise _Fault(f"has a {what} of {list(matrix.shape)}, and its biases are of {rows} x {columns}: these do not fit")


def _site(hook: str, given: str | None) -> str:
    said = _SITE.fullmatch(hook) or _HOOK.fullmatch(hook)
    if said is None:
        if given is not None:
            return given
        told = f"says {hook!a:.100} of the layer that it reads, which is no text encoder's" if hook else (
            "does not say which layer it reads"
        )  # fmt: skip
        raise _Fault(f"{told}; name the site with --site, for example --site text_encoder.layer.9")
    found = said.groupdict()
    encoder, layer = found["encoder"], int(found["layer"] or found["block"])
    if given is None:
        return f"{encoder or 'text_encoder'}.layer.{layer}"
    wanted = _SITE.fullmatch(given)
    if wanted is None or int(wanted["layer"]) != layer or encoder not in (None, wanted["encoder"]):
        raise _Fault(f"says that it reads {hook!a:.100}, which is not {given}; leave --site out, or correct it")
    return given


def _tensors(stored: _Source, *names: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors of a format, if there is nothing else beside them."""
    if missing := [name for name in names if name not in stored.tensors]:
        raise _Fault(f"lacks {missing[0]}; take it from its source again")
    if more := sorted(stored.tensors.keys() - {*names, *_COUNTERS}):
        raise _Fault(f"also has {more[0]!a:.100}, which changes what it computes in a way that is not known here")
    first, second, third, fourth = (stored.tensors[name] for name in names)
    return first, second, third, fourth


def _k(value: object) -> int:
    if type(value) is not int or value < 1:
        raise _Fault(
            f"is a TopK and its k is {value!a:.30}; without a whole number it would be another autoencoder: correct "
            "its configuration"
        )
    return value


def _product(first: object, second: object) -> int | None:
    return first * second if type(first) is int and type(second) is int else None


def _flag(said: Mapping[str, Any], name: str, default: bool) -> bool:
    value = said.get(name, default)
    if not isinstance(value, bool):
        raise _Fault(f"has {value!a:.30} for {name}, which is true or false; correct its configuration")
    return value
