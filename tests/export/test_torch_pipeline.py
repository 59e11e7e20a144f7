"""An artifact in PyTorch with its edit in the modules: against hooks on the base, and against ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch.nn import Module

from bakeout.editor.edit import Edit, Operation, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.editor.pipeline import image_to_image, load_pipeline
from bakeout.editor.sites import Site
from bakeout.export import onnx as exporter
from bakeout.export.artifact import Artifact
from bakeout.export.manifest import Resolution
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.export.torch_pipeline import DensePatch, FusedGeglu, kernel_for
from bakeout.kernels.ops import KERNELS
from bakeout.validate.reference import applied

Baked = Callable[..., Artifact]
# Height and width of the tiny model's latents; 4x4 are its own, and 8x4 are as many tokens.
LATENTS = (4, 8)
LAYER = "text_encoder.layer.0"
M = 48


def values(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def token_wise(model: Model, latents: tuple[int, int] = LATENTS) -> list[Operation]:
    """A patch in every GEGLU."""
    pipeline = model.pipeline(dtype=torch.float32)
    made: list[Operation] = []

    def make(site: Site, seed: int, _module: Module, args: tuple[Tensor]) -> None:
        shape = args[0].shape[1:]
        made.append(PatchActivation(site.name, "input", chosen(*shape, seed=seed), values(*shape, seed=seed), latents))

    for seed, site in enumerate(model.sites_of("ffn2")):
        model.module(pipeline, site).register_forward_pre_hook(partial(make, site, seed))
    height, width = (pipeline.vae_scale_factor * side for side in latents)
    pipeline("a", height=height, width=width, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    return made


def portable(model: Model) -> list[Operation]:
    return [
        PatchActivation(site.name, "input", chosen(site.d_in, seed=seed), values(site.d_in, seed=seed))
        for seed, site in enumerate(model.sites_of("ffn2"))
    ]


def latents_of_text(model: Model, site: str = LAYER, seed: int = 0, **changes: Any) -> SteerLatents:
    width = model.site(site).d_out
    given = {
        "encoder": values(M, width, seed=seed), "encoder_bias": values(M, seed=seed + 1),
        "center": values(width, seed=seed + 2) / 9, "k": 20, "neurons": torch.tensor([0, 3, 17, 30, 47]),
        "directions": values(width, 5, seed=seed + 3), "strengths": values(5, seed=seed + 4),
    }  # fmt: skip
    return SteerLatents(site, **{**given, **changes})


def tied(model: Model) -> list[Operation]:
    """Half of the latents are equal at every token, and only the first of them are among the largest."""
    width = model.site(LAYER).d_out
    encoder, bias, odd = values(M, width, seed=70), values(M, seed=71) - 1, torch.arange(1, M, 2)
    encoder[odd], bias[odd] = 0, 0.75
    neurons = torch.tensor([2, 3, 19, 21, 45])
    return [latents_of_text(model, encoder=encoder, encoder_bias=bias, k=14, neurons=neurons)]


def others(model: Model) -> list[Operation]:
    """Patches that are in no GEGLU, weights that fold, and a shift of some rows."""
    key, out = (model.sites_of(kind)[0] for kind in ("attn_key", "ffn1"))
    text = model.site(f"{LAYER}.ffn2")
    tokens = LATENTS[0] * LATENTS[1]
    return [
        PatchActivation(key.name, "input", chosen(77, key.d_in, seed=1), values(77, key.d_in, seed=1)),
        PatchActivation(out.name, "output", chosen(tokens, out.d_out, seed=2), values(tokens, out.d_out), LATENTS),
        PatchActivation(text.name, "input", chosen(77, text.d_in, seed=3), values(77, text.d_in, seed=3)),
        PatchWeightInput(out.name, chosen(out.d_out, out.d_in, seed=4)),
        ShiftActivation(LAYER, values(text.d_out, seed=5), "prompted"),
    ]  # fmt: skip


CASES: dict[str, Callable[[Model], list[Operation]]] = {
    "token-wise": token_wise,
    "portable": portable,
    "SNCE": lambda model: [latents_of_text(model, rows="prompted", input_norm="layer_norm")],
    "ties": tied,
    "all": lambda model: [*token_wise(model), *others(model), latents_of_text(model, rows="prompted")],
}


@pytest.fixture(scope="module")
def bakes(baked: Baked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Artifact]]:
    """Writes an artifact of a model and an Edit, with graphs that cannot run unless they are asked for."""
    root = tmp_path_factory.mktemp("artifacts")

    def write(_model: Model, folder: Path, *_args: object, **_changes: object) -> None:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "model.onnx").write_bytes(b"")

    def bake(source: Path, operations: list[Operation], *, runs: bool = False) -> Artifact:
        with pytest.MonkeyPatch.context() as patched:
            if not runs:
                patched.setattr(exporter, "write_onnx", write)
            edit = Edit(tuple(operations))
            return baked(source, root / str(len(list(root.iterdir()))), edit, targets=("onnx",))

    return bake


@pytest.fixture(scope="module")
def artifact_of(tiny_model: Path, bakes: Callable[..., Artifact]) -> Callable[[str], Artifact]:
    return cache(lambda case: bakes(tiny_model, CASES[case](open_model(tiny_model))))


@torch.no_grad()
def drawn(pipeline: Any, latents: tuple[int, int] = LATENTS) -> Tensor:
    """Latents of two prompts, one of them empty, with a negative prompt."""
    size = {side: pipeline.vae_scale_factor * count for side, count in zip(("height", "width"), latents, strict=True)}
    images: Tensor = pipeline(
        ["a bc", ""], negative_prompt=["d", ""], num_inference_steps=2, output_type="latent", **size,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images.double()


def distance(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """The one comparison of this file: as a share of what the edit does."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / (base - expected).norm())


def references(model: Model, edit: Edit, latents: tuple[int, int] = LATENTS, dtype: Any = torch.float32) -> Any:
    """What the base draws, with hooks and without."""
    pipeline = model.pipeline(dtype=dtype)
    base = drawn(pipeline, latents)
    with applied(edit, model, pipeline):
        return drawn(pipeline, latents), base


@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_hooks_on_the_base_draw(
    artifact_of: Callable[[str], Artifact], bakes: Callable[..., Artifact], tiny_model: Path, case: str
) -> None:
    artifact = artifact_of(case)
    model = open_model(tiny_model)
    reference, base = references(model, artifact.edit)
    own = drawn(artifact.load("torch", dtype=torch.float32, base=tiny_model))
    assert distance(own, reference, base) < 1e-4
    for control in controls(artifact.edit):
        broken = drawn(bakes(tiny_model, control).load("torch", dtype=torch.float32, base=model))
        assert distance(broken, reference, base) > 1e-3


def controls(edit: Edit) -> Iterator[list[Operation]]:
    """One of the edit's operations left out, or its mask moved, or one latent more let through."""
    first, *rest = edit.operations
    if rest:
        yield rest
    if isinstance(first, PatchActivation):
        yield [replace(first, mask=first.mask.roll(1, -1), value=first.value.roll(1, -1)), *rest]
    if isinstance(first, SteerLatents):
        yield [replace(first, k=first.k + 2), *rest]


def test_it_draws_what_onnx_runtime_draws(tiny_model: Path, bakes: Callable[..., Artifact]) -> None:
    model = open_model(tiny_model)
    artifact = bakes(tiny_model, CASES["all"](model), runs=True)
    own = drawn(artifact.load("torch", dtype=torch.float32, base=model, kernels="reference"))
    _, base = references(model, artifact.edit)
    graphs = artifact.load("onnxruntime", sessions=SessionSettings(threads=1))
    assert distance(own, drawn(graphs), base) < 1e-4


def test_two_text_encoders(folders: Callable[[str], Path], bakes: Callable[..., Artifact]) -> None:
    model = open_model(folders("sdxl"))
    latents = (8, 16)
    steered = [latents_of_text(model, site.name, 9) for site in model.sites_of("text_layer") if ".layer.1" in site.name]
    assert len(steered) == 2
    artifact = bakes(model.path, [*token_wise(model, latents), *steered])
    reference, base = references(model, artifact.edit, latents)
    assert distance(drawn(artifact.load("torch", dtype=torch.float32, base=model), latents), reference, base) < 1e-5
    without = bakes(model.path, [*artifact.edit.operations[:-1]])
    assert distance(drawn(without.load("torch", dtype=torch.float32, base=model), latents), reference, base) > 1e-3
    # Each network keeps the dtype in which it is stored.
    stored = artifact.load("torch", base=model)
    assert stored.unet.dtype == torch.float16
    assert {it.value.dtype for it in stored.unet.modules() if isinstance(it, DensePatch)} == {torch.float16}


def test_a_single_file_is_a_base(
    single_files: Callable[[str], Path], tiny_configs: None, bakes: Callable[..., Artifact]
) -> None:
    model = open_model(single_files("sd2"))
    text, key = model.sites_of("text_ffn2")[0], model.sites_of("attn_key")[0]
    folds = [PatchWeightInput(it.name, chosen(it.d_out, it.d_in, seed=6), values(it.d_in)) for it in (text, key)]
    latents = (8, 16)
    artifact = bakes(model.path, [folds[0], replace(folds[1], value=None), *token_wise(model, latents)])
    reference, base = references(model, artifact.edit, latents)
    assert distance(drawn(artifact.load("torch", dtype=torch.float32, base=model), latents), reference, base) < 1e-4


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_tensor_that_is_replaced_is_read_as_the_stored_one_would_be(
    single_files: Callable[[str], Path], tiny_configs: None, family: str
) -> None:
    """Also where a parameter is a third of it, or lies transposed."""
    model = open_model(single_files(family))
    component = model.components["text_encoder_2" if family == "sdxl" else "text_encoder"]
    changes = {location.tensor: location.change for location in component.locations.values()}
    assert {"same", "third"} <= set(changes.values())
    changed = {}
    for name in changes:
        stored = component.tensors[name]
        with safe_open(stored.file, "pt") as file:
            changed[name] = 2 * file.get_tensor(name)
    usual = getattr(model.pipeline(), component.name).state_dict()
    found = getattr(load_pipeline(model, "cpu", None, {component.name: changed}), component.name).state_dict()
    assert found.keys() == usual.keys()
    assert all(torch.equal(found[name], 2 * usual[name]) for name in usual)


def test_the_built_in_model_is_found_by_its_name(bakes: Callable[..., Artifact]) -> None:
    model = open_model("shapes")
    side = model.components["unet"].config["sample_size"]
    operations = [*token_wise(model, (side, side)), latents_of_text(model, rows="prompted")]
    artifact = bakes(model.path, operations)
    recorded = artifact.manifest.base.model_copy(update={"name": "shapes", "format": "builtin"})
    artifact = replace(artifact, manifest=artifact.manifest.model_copy(update={"base": recorded}))
    reference, base = references(model, artifact.edit, (side, side))
    assert distance(drawn(artifact.load("torch", dtype=torch.float32), (side, side)), reference, base) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "cuda"])
def test_a_kernel_without_the_linear_leaves_it_alone(
    artifact_of: Callable[[str], Artifact], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(
        "bakeout.kernels.ops.KERNELS", {**KERNELS, "masked_geglu": dict.fromkeys(KERNELS["masked_geglu"], REFERENCE)}
    )
    monkeypatch.setattr("bakeout.export.torch_pipeline.kernel_for", lambda *_: kernels)
    pipeline = artifact_of("token-wise").load("torch", dtype=torch.float32, base=tiny_model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        drawn(pipeline)
    ran = {it.key for it in profile.key_averages() if it.key.startswith("bakeout::")}
    assert ran == {"bakeout::masked_geglu_linear" if kernels == "reference" else "bakeout::masked_geglu"}


REFERENCE = "bakeout.kernels.reference"


def test_a_hook_or_adapter_of_the_linear_still_acts(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    pipeline = artifact_of("token-wise").load("torch", dtype=torch.float32, base=tiny_model)
    before = drawn(pipeline)
    fused = next(it for it in pipeline.unet.modules() if isinstance(it, FusedGeglu))
    handle = fused.proj.register_forward_hook(lambda _module, _args, output: 3 * output)
    hooked = drawn(pipeline)
    handle.remove()
    assert torch.equal(drawn(pipeline), before)

    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    fused.proj.__class__ = Adapter
    assert torch.equal(drawn(pipeline), hooked)
    assert not torch.equal(hooked, before)


def test_calls_in_threads_do_not_edit_one_another(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    pipeline = artifact_of("SNCE").load("torch", dtype=torch.float32, base=tiny_model)
    encoder = pipeline.text_encoder
    given = [
        pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        for text in ("a bc", "")
    ]

    @torch.no_grad()
    def encoded(ids: Tensor) -> Tensor:
        found: Tensor = encoder(ids).last_hidden_state
        return found

    alone = [encoded(ids) for ids in given]
    with ThreadPoolExecutor(1) as pool:
        other: list[Future[Tensor]] = []

        def begin(_module: Module, _args: object) -> None:
            if not other:
                other.append(pool.submit(encoded, given[1]))
                # It ends in this time unless it has to wait for this call.
                wait(other, 0.3)

        handle = encoder.register_forward_pre_hook(begin)
        together = encoded(given[0]), other[0].result()
        handle.remove()
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))


def test_fused_projections_do_not_lose_a_patch(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"the edit of unet\.\S+\.attn_key would be lost in fused projections"):
        artifact_of("all").load("torch", dtype=torch.float32, base=tiny_model).fuse_qkv_projections()
    pipeline = artifact_of("token-wise").load("torch", dtype=torch.float32, base=tiny_model)
    before = drawn(pipeline)
    pipeline.fuse_qkv_projections()
    assert distance(drawn(pipeline), before, torch.zeros(())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(
    artifact_of: Callable[[str], Artifact], bakes: Callable[..., Artifact], tiny_model: Path, dtype: torch.dtype
) -> None:
    artifact = artifact_of("token-wise")
    model = open_model(tiny_model)
    pipeline = artifact.load("torch", dtype=dtype, base=tiny_model)
    for module in (it for it in pipeline.unet.modules() if isinstance(it, DensePatch)):
        patch = next(it for it in artifact.edit.operations if it.site == module.site.name)
        assert torch.equal(module.value, patch.value.to(dtype) * patch.mask)
        assert module.mask.dtype == torch.uint8
        assert module.mask.shape == (len(patch.mask), -(-patch.mask.shape[1] // 8))
    reference, base = references(model, artifact.edit, dtype=dtype)
    assert distance(drawn(pipeline), reference, base) < 1e-6
    moved = artifact.load("torch", dtype=torch.float32, base=tiny_model).to(dtype)
    assert torch.equal(drawn(moved), drawn(pipeline))
    snce = artifact_of("SNCE")
    edits = snce.load("torch", dtype=dtype, base=model).text_encoder.site_edits
    assert {it.dtype for it in edits.parameters() if it.is_floating_point()} == {torch.float32}
    exact, base = references(model, snce.edit)
    moved = snce.load("torch", dtype=torch.float32, base=model).to(dtype)
    assert torch.equal(drawn(moved), drawn(snce.load("torch", dtype=dtype, base=model)))
    # Rounding is what there is between the hooks in both dtypes, too.
    own, hooked = drawn(snce.load("torch", dtype=dtype, base=model)), references(model, snce.edit, dtype=dtype)[0]
    assert distance(own, exact, base) < 1.5 * distance(hooked, exact, base) < 0.5
    width = model.site(LAYER).d_out
    for large in (ShiftActivation(f"{LAYER}.ffn2", torch.full((width,), 1e6)),
                  replace(token_wise(model)[0], value=torch.full(artifact.edit.operations[0].value.shape, 1e6)),
                  ShiftActivation(LAYER, torch.full((width,), 1e6), "prompted")):  # fmt: skip
        beyond = bakes(tiny_model, [large])
        if dtype == torch.float16:
            with pytest.raises(InputError, match=r"is beyond what torch\.float16 holds"):
                beyond.load("torch", dtype=dtype, base=model)
        else:
            beyond.load("torch", dtype=dtype, base=model)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled runs as it was traced, so that nothing is built."""
    compiled = Module.compile
    monkeypatch.setattr("bakeout.export.torch_pipeline._try_compiler", lambda _device: None)
    monkeypatch.setattr(Module, "compile", lambda self, **settings: compiled(self, backend="eager", **settings))
    torch._dynamo.reset()
    counters.clear()


def test_the_unet_is_compiled_once_in_one_graph(
    artifact_of: Callable[[str], Artifact], tiny_model: Path, traced: None
) -> None:
    artifact = artifact_of("all")
    eager = drawn(artifact.load("torch", dtype=torch.float32, base=tiny_model))
    pipeline = artifact.load("torch", dtype=torch.float32, base=tiny_model, compile=True)
    assert torch.equal(drawn(pipeline), eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    drawn(pipeline)
    assert counters["stats"]["unique_graphs"] == 1
    for count in (3, 5):
        pipeline(["a"] * count, num_inference_steps=1, output_type="latent")
    # The second batch size makes it any.
    assert counters["stats"]["unique_graphs"] == 2
    # Not caught in what was compiled.
    with pytest.raises(InputError, match="takes latents of 8x4"):
        pipeline.unet(torch.zeros(2, 4, 8, 4), 1, torch.zeros(2, 77, 16))


@pytest.mark.slow
def test_what_is_compiled_draws_the_same(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    torch._dynamo.reset()
    artifact = artifact_of("all")
    reference, base = references(open_model(tiny_model), artifact.edit)
    own = drawn(artifact.load("torch", dtype=torch.float32, base=tiny_model, compile=True))
    assert distance(own, reference, base) < 1e-4


@pytest.fixture(scope="module")
def folded(baked: Baked, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with weights."""
    return baked(tiny_model, tmp_path_factory.mktemp("folded") / "artifact")


def test_weights_are_compiled_too(folded: Artifact, traced: None) -> None:
    assert torch.equal(drawn(folded.load("torch", compile=True)), drawn(folded.load("torch")))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_unet_can_be_exported(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    unet = artifact_of("all").load("torch", dtype=torch.float32, base=tiny_model).unet
    given = (values(2, 4, *LATENTS, seed=1), torch.tensor(3.0), values(2, 77, 16, seed=2))
    program = torch.export.export(unet, given)
    ours = [str(it.target) for it in program.graph.nodes if "bakeout" in str(it.target)]
    # What the first Linear gives is patched itself.
    others = len(open_model(tiny_model).sites_of("ffn2")) - 1
    assert ours == ["bakeout.masked_geglu.default", *["bakeout.masked_geglu_linear.default"] * others]
    with torch.no_grad():
        assert torch.equal(program.module()(*given).sample, unet(*given).sample)


def test_other_sizes_and_lengths_are_refused(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    pipeline = artifact_of("all").load("torch", dtype=torch.float32, base=tiny_model)
    images = pipeline("a", num_inference_steps=1, output_type="latent").images
    assert images.shape[-2:] == LATENTS
    with pytest.raises(InputError, match="this model draws 32x16 only"):
        pipeline("a", height=32, width=16)
    with pytest.raises(InputError, match="takes prompts of 77 tokens only, not 5"):
        pipeline.text_encoder(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="takes prompts of 77 tokens only, not 154"):
        pipeline.unet(torch.zeros(1, 4, *LATENTS), 1, torch.zeros(1, 154, 16))
    with pytest.raises(InputError, match="give it input_ids"):
        pipeline.text_encoder(inputs_embeds=torch.zeros(1, 77, 16))
    picture = torch.zeros(1, 3, 32, 16)
    with pytest.raises(InputError, match=r"takes latents of 8x4 \(width x height\) only, not 4x8"):
        image_to_image(pipeline)("a", image=picture, strength=1.0, num_inference_steps=1)
    with pytest.raises(InputError, match="that the edit does not reach"):
        pipeline("a", num_inference_steps=1, clip_skip=2)


def test_what_no_file_holds_is_not_saved(
    artifact_of: Callable[[str], Artifact], tiny_model: Path, tmp_path: Path
) -> None:
    pipeline = artifact_of("all").load("torch", dtype=torch.float32, base=tiny_model)
    for part in (pipeline, pipeline.unet, pipeline.text_encoder):
        with pytest.raises(InputError, match="would be lost: ship the artifact"):
            part.save_pretrained(tmp_path / "saved")
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert torch.equal(drawn(deepcopy(pipeline)), drawn(pipeline))


def test_parameters_keep_their_names(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    own = artifact_of("token-wise").load("torch", base=tiny_model).unet.state_dict()
    assert own.keys() == open_model(tiny_model).pipeline().unet.state_dict().keys()


def test_which_kernel(artifact_of: Callable[[str], Artifact], tiny_model: Path) -> None:
    model = open_model(tiny_model)
    edit = artifact_of("token-wise").edit
    assert [kernel_for(edit, model, None, device) for device in ("cpu", "cuda", "cuda:1", "mps")] == [
        "reference", "triton", "triton", "reference",
    ]  # fmt: skip
    assert kernel_for(edit, model, "cuda", "cuda") == "cuda"
    for case in ("SNCE", "portable"):
        assert kernel_for(artifact_of(case).edit, model, None, "cuda") is None


@pytest.mark.parametrize(
    ("case", "settings", "words"),
    [
        ("token-wise", {"base": None}, r"a folder of which it knows no place; give that model as the base \(--base\)$"),
        ("token-wise", {"base": "shapes"}, r"^this Edit was made for another model"),
        ("token-wise", {"kernels": "cudnn"}, r"^there is no kernel 'cudnn'; choose from reference, triton, cuda$"),
        (
            "token-wise",
            {"kernels": "triton"},
            "^the kernels 'triton' need an NVIDIA GPU, and torch draws on cpu",
        ),
        ("token-wise", {"kernels": "cuda"}, "^the kernels 'cuda' need an NVIDIA GPU"),
        ("token-wise", {"sessions": SessionSettings()}, "torch has no sessions"),
        ("SNCE", {"kernels": "reference"}, "needs a fused kernel in torch; leave kernels out$"),
        ("portable", {"kernels": "reference"}, "needs a fused kernel in torch; leave kernels out$"),
        ("token-wise", {"runtime": "onnxruntime"}, "base, kernels and compile are torch's"),
        (
            "token-wise",
            {"runtime": "onnxruntime", "base": None, "kernels": "triton"},
            "kernels and compile are torch's",
        ),
        ("token-wise", {"runtime": "onnxruntime", "base": None, "compile": True}, "kernels and compile are torch's"),
    ],
)
def test_mistakes(
    artifact_of: Callable[[str], Artifact], tiny_model: Path, case: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        artifact_of(case).load(**{"base": tiny_model, **settings})
    assert "\n" not in str(caught.value)


def test_without_a_compiler_compile_is_refused(
    artifact_of: Callable[[str], Artifact], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    cpp_builder.cpp_compiler_search.cache_clear()
    words = r"^PyTorch cannot compile here \(.+\); install a C\+\+ compiler.*leave compile out$"
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(InputError, match=words) as caught:
        artifact_of("token-wise").load("torch", base=tiny_model, compile=True)
    cpp_builder.cpp_compiler_search.cache_clear()
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(artifact_of: Callable[[str], Artifact], tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for base in (other, open_model(other)):
        with pytest.raises(InputError, match=r"other is not the model .* from which .* was made; give that model"):
            artifact_of("token-wise").load("torch", base=base)


def test_what_diffusers_holds_needs_neither_base_nor_kernel(folded: Artifact, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="has diffusers/, which is all that torch needs; leave base out"):
        folded.load(base=tiny_model)
    with pytest.raises(InputError, match="leave kernels out"):
        folded.load(kernels="reference")


def test_a_manifest_that_says_another_size_is_not_loaded(
    artifact_of: Callable[[str], Artifact], tiny_model: Path
) -> None:
    artifact = artifact_of("token-wise")
    for said in ("any", Resolution(latent_height=8, latent_width=4)):
        validity = artifact.manifest.validity.model_copy(update={"resolutions": said})
        other = replace(artifact, manifest=artifact.manifest.model_copy(update={"validity": validity}))
        with pytest.raises(InputError, match="says that it is for another size"):
            other.load("torch", base=tiny_model)
