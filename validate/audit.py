"""What an artifact's files say, without drawing: every weight by its name.

Nothing of what `bakeout.export` computes is used: what a weight must be follows from the base's and from what the
operations mean (`bakeout.editor.edit`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from bakeout.editor.edit import Edit, Operation, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.editor.model_files import weights_name
from bakeout.validate.metrics import worst_element
from bakeout.validate.report.schema import Check, Verdict
from bakeout.validate.widths import Entries, entries_of

# Faults that a summary tells; their number is told as well.
_TOLD = 3
# What follows the name of a file beside the weights.
BESIDE = " lies beside the weights, and other programs may load it"

Parameter = tuple[str, str]
Read = Callable[[Parameter], Tensor]


class MissingError(Exception):
    """A target does not have a tensor, or not in a form that can be read; the message says which and why."""


def check_weights(
    target: str,
    base: Model,
    edit: Edit,
    names: Mapping[Parameter, str],
    read: Read,
    beside: Sequence[str] = (),
    elsewhere: Sequence[Operation] = (),
    units: Mapping[str, Tensor] = {},
    narrow: torch.dtype | None = None,
) -> Check:
    """Every weight of a target against what the base and the Edit give: exactly, and changed biases to one rounding.

    Args:
        target: its name.
        base: the model that was edited.
        edit: what was baked.
        names: every parameter of the base, by component and name in memory, and what it is called in the target.
        read: reads a parameter of the target, or raises MissingError.
        beside: in words, what is beside the weights that are read, and may be computed with instead.
        elsewhere: operations that another check finds in the target's graphs, and no weight may hold as well.
        units: of FFNs that must be narrower than the base's, the hidden units that must be there, as of `units_of`.
        narrow: a dtype of less bits to which what is read may be rounded.
    """
    linears, entries = _linears(edit, base, elsewhere), entries_of(units, base)
    uncovered = [repr(it) for operations in linears.values() for it in operations if not _is_static(it)]
    faults = list(beside)
    wrong = edited = 0
    with parameters(base) as read_base:
        for place, name in names.items():
            module, _, part = place[1].rpartition(".")
            operations = linears.get((place[0], module), ())
            if not all(map(_is_static, operations)):
                continue
            edited += bool(operations)
            own = entries.get(place)
            stored = expected = _some(own, read_base(place))
            if operations:
                expected = _some(own, _edited(read_base, names, place[0], module, operations)[part == "bias"])
            try:
                found = read(place)
            except MissingError as missing:
                faults.append(str(missing))
                wrong += stored.numel()
                continue
            if count := unlike(found, expected, stored, narrow):
                wrong += count
                faults.append(difference(f"{place[0]} {name}", found, expected, count))
        for (component, module), operations in linears.items():
            if (component, f"{module}.bias") in names or not all(map(_is_static, operations)):
                continue
            if _edited(read_base, names, component, module, operations)[1].any():
                faults.append(f"{component} {module} has no bias to hold what the edit adds")
    if faults:
        summary = f"Its weights are not what the base and the edit give: {told(faults)}."
        return _check("weights", target, "fail", summary, wrong)
    if uncovered:
        return _check("weights", target, "unjudged", f"Weights cannot show whether these are there: {told(uncovered)}.")
    beyond = "; the rest of the edit is in the graphs" if elsewhere else ""
    rounded = "" if narrow is None else f", rounded to {str(narrow).removeprefix('torch.')} where it is stored so"
    lost = sum(base.site(name).d_in - len(own) for name, own in units.items())
    gone = f"; {lost:,} hidden units that are constant are gone, of {len(units):,} FFNs" if units else ""
    summary = (
        f"All {len(names):,} tensors are what the base and the edit give: {edited:,} of edited layers, "
        f"{len(names) - edited:,} as in the base to the last bit{rounded}{beyond}{gone}."
    )
    return _check("weights", target, "pass", summary, wrong)


def edited_linear(weight: Tensor, bias: Tensor, operations: Sequence[Operation]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Linear that computes what the operations mean (`bakeout.editor.edit`), in fp64.

    Args:
        weight: [d_out, d_in], W.
        bias: [d_out], b, zeros where there is none.
        operations: at most one of a sort but for shifts; the same at every token and in every row.
    """
    weight, bias = weight.double(), bias.double()
    replaced = torch.zeros(weight.shape, dtype=torch.bool)
    at_input, at_output = (torch.zeros(size, dtype=torch.bool) for size in (weight.shape[1], weight.shape[0]))
    constant, inside, outside = torch.zeros_like(weight[0]), torch.zeros_like(weight[0]), torch.zeros_like(bias)
    shift = torch.zeros_like(bias)
    for it in operations:
        if isinstance(it, PatchWeightInput) and it.value is None:
            weight = weight.masked_fill(it.mask, 0)
        elif isinstance(it, PatchWeightInput):
            replaced, constant = it.mask, torch.as_tensor(it.value).double()
        elif isinstance(it, PatchActivation) and it.at == "input":
            at_input, inside = it.mask, it.value.double()
        elif isinstance(it, PatchActivation):
            at_output, outside = it.mask, it.value.double()
        elif isinstance(it, ShiftActivation):
            shift = shift + it.value.double()
    # What each weight sees in place of its input, where that is a constant.
    seen = torch.where(replaced, constant, torch.where(at_input, inside, 0.0))
    bias = torch.where(at_output, outside, bias + (weight * seen).sum(1)) + shift
    return weight.masked_fill(replaced | at_input | at_output[:, None], 0), bias


def unlike(found: Tensor, expected: Tensor, stored: Tensor, narrow: torch.dtype | None = None) -> int:
    """How many elements are not what they must be; all of them where the shapes differ.

    Args:
        found: in the target, of any float dtype.
        expected: `stored` itself, or fp64 where the layer is edited.
        stored: in the base. What the edit changes to another value than zero is rounded to its dtype once.
        narrow: what is found in this dtype is rounded to it once more, to a finite number; all of it.
    """
    if found.shape != expected.shape:
        return expected.numel()
    rounded = narrow is not None and found.dtype == narrow
    wanted = expected.float().to(narrow) if rounded else expected
    if expected is stored:
        lost = stored.isfinite() & ~wanted.isfinite()
        return int(((found.float().view(torch.int32) != wanted.float().view(torch.int32)) | lost).sum())
    kinds = map(torch.finfo, {stored.dtype, found.dtype} if rounded else {stored.dtype})
    rounding = torch.stack([expected.abs() * it.eps + it.smallest_normal * it.eps for it in kinds]).sum(0)
    allowed = torch.where((expected == stored.double()) | (expected == 0), 0.0, rounding)
    return int((~((found.double() - wanted.double()).abs() <= allowed)).sum())


def weights_beside(model: Model) -> list[str]:
    """In words, what lies in the folders of a diffusers folder's networks besides their configuration and weights."""
    found = []
    for component in model.components.values():
        home = model.path / component.name
        names = {path.name for path in home.iterdir()}
        used = {"config.json", weights_name(sorted(names), component.name, str(home))}
        found += [
            f"{component.name}/{name}{BESIDE}" for name in sorted(names - used - {it.name for it in component.files})
        ]
    return found


@contextmanager
def parameters(model: Model) -> Iterator[Read]:
    """A function that reads a parameter of a model's files, by component and name in memory, as it is in memory."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for component in model.components.values()
            for file in component.files
        }

        def read(place: Parameter) -> Tensor:
            component = model.components[place[0]]
            if place[1] not in component.locations:
                raise MissingError(f"{place[0]} {place[1]} is missing")
            location = component.locations[place[1]]
            stored: Tensor = files[component.tensors[location.tensor].file].get_tensor(location.tensor)
            if location.change == "third":
                return stored.chunk(3)[location.part]
            if location.change == "transposed":
                return stored.T
            return stored.reshape(stored.shape[:2]) if location.change == "pointwise" else stored

        yield read


def names_of(model: Model) -> dict[Parameter, str]:
    """What each parameter is called in files made of `model`: as stored where it is stored as it stands."""
    return {
        (component.name, parameter): location.tensor if location.change == "same" else parameter
        for component in model.components.values()
        for parameter, location in component.locations.items()
    }


def kept_in_graphs(edit: Edit, base: Model) -> list[PatchActivation | ShiftActivation | SteerLatents]:
    """The operations that only graphs can hold, in the order of the Edit: patches, and what text encoders have besides.

    A patch is that differs from token to token, or whose constants no bias can hold. A shift that is the same at every
    token and in every row is in a bias, unless latents read what it would change, or a patch would overwrite it. None
    is for the rows of prompts and not of negative prompts, for some calls only, or for latents of no known size: these
    no graph can tell apart.
    """
    merged = merge([edit]).operations
    patches = [it for it in merged if isinstance(it, PatchActivation) and _is_patch_of_graphs(it, base)]
    at_output = [it for it in patches if it.at == "output"]
    moving = [
        it
        for it in merged
        if isinstance(it, ShiftActivation | SteerLatents)
        if it.site.startswith("text_encoder") and it.rows != "conditional"
    ]
    read = [it.site for it in moving if isinstance(it, SteerLatents)]
    kept = [
        it
        for it in moving
        if not _is_static(it)
        or any(f"{site}.".startswith(f"{it.site}.") for site in read)
        or any(_overwrites(patch, it) for patch in at_output)
    ]
    return [it for it in merged if it in [*patches, *kept]]  # type: ignore[misc]


def _is_patch_of_graphs(patch: PatchActivation, base: Model) -> bool:
    site = base.site(patch.site)
    if patch.rows != "all" or patch.calls is not None:
        return False
    if patch.mask.ndim == 1:
        return site.bias is None and bool(patch.value.any())
    of_prompts = site.component.startswith("text_encoder") or site.kind in ("attn_key", "attn_value")
    return of_prompts or patch.latents is not None


def _overwrites(patch: PatchActivation, moving: ShiftActivation | SteerLatents) -> bool:
    """Whether a shift in the bias of a Linear, or of the layer around it, would be lost to a patch of its output."""
    if isinstance(moving, SteerLatents) or not patch.site.startswith(moving.site):
        return False
    features = patch.mask if patch.mask.ndim == 1 else patch.mask.any(0)
    return bool((features & (moving.value != 0)).any())


def rounding_of(edit: Edit, base: Model) -> Edit:
    """What is added to the outputs of edited layers by rounding their biases, once, to the dtypes of the base."""
    sites = {(site.component, site.module): site.name for site in base.sites if site.weight is not None}
    names, shifts, kept = names_of(base), [], kept_in_graphs(edit, base)
    with parameters(base) as read:
        for (component, module), operations in _linears(edit, base, kept).items():
            if (component, f"{module}.bias") in names and all(map(_is_static, operations)):
                exact = _edited(read, names, component, module, operations)[1]
                error = exact.to(read((component, f"{module}.bias")).dtype).double() - exact
                for it in kept:
                    if isinstance(it, PatchActivation) and (it.site, it.at) == (sites[component, module], "output"):
                        # What the graph patches is not what the bias made of it.
                        error = error.where(~it.mask, 0)
                if error.any():
                    shifts.append(ShiftActivation(sites[component, module], error))
    return Edit(tuple(shifts))


def _linears(edit: Edit, model: Model, elsewhere: Sequence[Operation]) -> dict[Parameter, tuple[Operation, ...]]:
    """The operations by the Linear that they act on, its component and its name in memory, but for those elsewhere."""
    grouped: dict[Parameter, list[Operation]] = {}
    for operation in merge([edit]).operations:
        if operation in elsewhere:
            continue
        site = model.site(operation.site)
        # The output of an encoder layer is the residual plus what its second FFN Linear gives.
        module = site.module if site.weight is not None else f"{site.module}.mlp.fc2"
        grouped.setdefault((site.component, module), []).append(operation)
    return {place: tuple(operations) for place, operations in grouped.items()}


def _is_static(operation: Operation) -> bool:
    """Whether an operation is the same at every token and in every row, so that weight and bias can hold it."""
    if isinstance(operation, PatchActivation):
        return operation.mask.ndim == 1 and operation.rows == "all" and operation.calls is None
    if isinstance(operation, ShiftActivation):
        return operation.value.ndim == 1 and operation.rows == "all"
    return not isinstance(operation, SteerLatents)


def _edited(
    read: Read, names: Collection[Parameter], component: str, module: str, operations: Sequence[Operation]
) -> tuple[Tensor, Tensor]:
    weight, bias = (component, f"{module}.weight"), (component, f"{module}.bias")
    matrix = read(weight)
    return edited_linear(matrix, read(bias) if bias in names else matrix.new_zeros(len(matrix)), operations)


def _some(own: Entries | None, whole: Tensor) -> Tensor:
    return whole if own is None else own.of(whole)


def difference(name: str, found: Tensor, expected: Tensor, count: int) -> str:
    """In words, what is other in a tensor of which `count` elements are others."""
    if found.shape != expected.shape:
        return f"{name} is {list(found.shape)} in place of {list(expected.shape)}"
    worst = worst_element(found, expected)
    where = f", as at {list(worst.index)}: {worst.artifact} in place of {worst.reference}" if worst else ""
    return f"{name}: {count:,} of {expected.numel():,} values are others{where}"


def _check(name: str, target: str, verdict: Verdict, summary: str, wrong: int | None = None) -> Check:
    limit = None if wrong is None else 0
    return Check(name=name, target=target, verdict=verdict, summary=summary, measured=wrong, limit=limit)


def told(faults: Sequence[str]) -> str:
    """The first of some faults, and how many more there are."""
    different = list(dict.fromkeys(faults))
    more = f"; and {len(different) - _TOLD:,} more" if len(different) > _TOLD else ""
    return "; ".join(different[:_TOLD]) + more
