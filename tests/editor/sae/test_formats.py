"""Foreign autoencoders: what the libraries wrote and computed (foreign/), and what must be refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import venv
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor.errors import InputError
from bakeout.editor.sae.formats import read_foreign
from bakeout.editor.sae.model import SparseAutoencoder

HERE = Path(__file__).parent
FOREIGN = HERE / "foreign"
WIDTH, LATENTS, K = 8, 24, 4
SITE = "text_encoder.layer.9"
LIBRARIES = {"saelens": "sae-lens==6.54.12", "sparsify": "eai-sparsify==1.3.3"}
VARIANTS = sorted(path.parent.relative_to(FOREIGN) for path in FOREIGN.rglob("cfg.json"))


def rms(x, y):
    """The error of x relative to y."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def normed(x, by, epsilon):
    return (x - by.mean(-1, keepdim=True)) / (by.std(-1, keepdim=True) + epsilon)


def assert_computes(autoencoder, x, z, x_hat, layer_norm):
    found = autoencoder.to(torch.float32)
    latents, reconstruction = found.encode(x), found.reconstruct(x)
    assert ((latents > 0) == (z > 0)).all()
    assert rms(latents, z) <= 1e-6
    if layer_norm:
        # These libraries divide by std + 1e-5 and multiply by std alone.
        assert rms(normed(reconstruction, x, 1e-5), normed(x_hat, x, 0)) <= 1e-6
        assert rms(reconstruction, x_hat) <= 1e-4
    else:
        assert rms(reconstruction, x_hat) <= 1e-6


def assert_reads(home, variant):
    expected = load_file(home / variant / "expected.safetensors")
    autoencoder = read_foreign(home / variant)
    assert (autoencoder.site, autoencoder.source_format) == (SITE, str(variant).partition("-")[0])
    assert (autoencoder.width, autoencoder.latents) == (WIDTH, LATENTS)
    assert_computes(autoencoder, *(expected[name] for name in ("x", "z", "x_hat")), "layer-norm" in str(variant))


@pytest.fixture
def copied(tmp_path):
    """A copy of a variant, with what is changed in its configuration."""

    def copy(variant, **changes):
        folder = tmp_path / variant
        shutil.copytree(FOREIGN / variant, folder)
        said = json.loads((folder / "cfg.json").read_text())
        said |= changes
        (folder / "cfg.json").write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
        return folder

    return copy


def state(seed=0, **more):
    """A state dict by OpenAI's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "pre_bias": (WIDTH,), "latent_bias": (LATENTS,), "encoder.weight": (LATENTS, WIDTH),
        "decoder.weight": (WIDTH, LATENTS),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return OrderedDict({**tensors, "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long), **more})


def openai(path, **more):
    topk = {"activation": "TopK", "activation_state_dict": OrderedDict(k=K, postact_fn="ReLU")}
    torch.save(OrderedDict((key, value) for key, value in state(**{**topk, **more}).items() if value is not ...), path)
    return path


def steerers(folder, config=None, **more):
    folder.mkdir(parents=True)
    torch.save({"state_dict": state(**more)}, folder / "state_dict.pth")
    said = {"n_dirs_local": LATENTS, "d_model": WIDTH, "k": K, "auxk": 32, "auxk_coef": 1 / 32} | (config or {})
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    return folder


def naive(x, weights, k):
    """z and x̂ of OpenAI's `Autoencoder` without its norm, token by token."""
    z = torch.zeros(len(x), LATENTS, dtype=torch.float64)
    for row, token in zip(z, x.double(), strict=True):
        before = weights["encoder.weight"].double() @ (token - weights["pre_bias"]) + weights["latent_bias"]
        for place in sorted(range(LATENTS), key=lambda i: -before[i])[:k]:
            row[place] = max(0.0, float(before[place]))
    return z, z @ weights["decoder.weight"].double().T + weights["pre_bias"]


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(5)) * 3 + 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_computes_what_the_library_does(variant):
    assert_reads(FOREIGN, variant)


def test_every_format_and_option_has_its_variant():
    assert len(VARIANTS) == 13


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("saelens-topk", {"k": K + 1}),
        ("saelens-topk", {"normalize_activations": "layer_norm"}),
        ("saelens-topk-constant-norm", {"normalize_activations": "none"}),
        ("saelens-topk", {"apply_b_dec_to_input": False}),
        ("saelens-topk-rescaled", {"rescale_acts_by_decoder_norm": False}),
        ("saelens-topk", {"architecture": "standard", "k": ...}),
    ],
)
def test_the_comparison_sees_an_option_that_is_not_minded(copied, variant, changes):
    home = copied(variant, **changes).parent
    with pytest.raises(AssertionError):
        assert_reads(home, variant)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environments' programs lie elsewhere there")
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_the_library_writes_today_is_read(root, tmp_path, library):
    home, written = tmp_path / "environment", tmp_path / "written"
    venv.create(home, with_pip=True)
    torch_first = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    commands = [
        *([home / "bin" / "pip", "install", "--quiet", *packages] for packages in (torch_first, [LIBRARIES[library]])),
        [home / "bin" / "python", HERE / "write_foreign.py", library, written],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    variants = sorted(path.parent.relative_to(written) for path in written.rglob("cfg.json"))
    assert variants == [variant for variant in VARIANTS if str(variant).startswith(library)]
    for variant in variants:
        assert_reads(written, variant)


def test_openai_topk_has_a_layer_norm_and_relu_has_none(tmp_path, tokens):
    given = state()
    autoencoder = read_foreign(openai(tmp_path / "9.pt"), SITE)
    assert (autoencoder.k, autoencoder.activation, autoencoder.input_norm) == (K, "topk", "layer_norm")
    mean, std = tokens.mean(-1, keepdim=True), tokens.std(-1, keepdim=True)
    z, x_hat = naive((tokens - mean) / (std + 1e-5), given, K)
    assert_computes(autoencoder, tokens, z, x_hat * std + mean, layer_norm=True)
    relu = openai(tmp_path / "relu.pt", activation="ReLU", activation_state_dict=OrderedDict())
    assert_computes(read_foreign(relu, SITE), tokens, *naive(tokens, given, LATENTS), layer_norm=False)


def test_a_config_beside_openai_s_file_changes_nothing(tmp_path):
    path = openai(tmp_path / "9.pt")
    before = read_foreign(path, SITE).digest
    (tmp_path / "config.json").write_text('{"k": 2, "activation": "ReLU"}')
    assert read_foreign(path, SITE).digest == before


def test_steerers_has_openai_s_names_and_no_norm(tmp_path, tokens):
    folder = tmp_path / "text_encoder.text_model.encoder.layers.9_k4_hidden24_auxk32_bs4096_lr0.0004" / "final"
    autoencoder = read_foreign(steerers(folder))
    assert (autoencoder.site, autoencoder.input_norm, autoencoder.source_format) == (SITE, "none", "steerers")
    assert_computes(autoencoder, tokens, *naive(tokens, state(), K), layer_norm=False)
    # A config.json that speaks of an activation is none of OpenAI's files.
    other = steerers(tmp_path / "other", {"activation": "TopK"})
    assert read_foreign(other, SITE).input_norm == "none"


def test_matrices_are_turned_by_their_sizes(tmp_path):
    turned = state()
    turned = {name: turned[name].T.contiguous() for name in ("encoder.weight", "decoder.weight")}
    straight, other = openai(tmp_path / "a.pt"), openai(tmp_path / "b.pt", **turned)
    assert read_foreign(straight, SITE).digest == read_foreign(other, SITE).digest


def test_it_comes_back_from_its_own_file(tmp_path):
    autoencoder = read_foreign(FOREIGN / "saelens-topk-rescaled")
    autoencoder.save(tmp_path / "sae.safetensors")
    assert SparseAutoencoder.load(tmp_path / "sae.safetensors").digest == autoencoder.digest
    with pytest.raises(InputError, match="is an autoencoder of bakeout already"):
        read_foreign(tmp_path / "sae.safetensors")


def test_what_is_not_folded_keeps_its_dtype():
    half = FOREIGN / "sparsify-half" / "text_model.encoder.layers.9"
    stored = load_file(half / "sae.safetensors")
    autoencoder = read_foreign(half)
    assert autoencoder.encoder.dtype == torch.float16
    assert torch.equal(autoencoder.encoder, stored["encoder.weight"])
    assert torch.equal(autoencoder.decoder, stored["W_dec"].T)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.9.hook_resid_post", "text_encoder.layer.9"),
        ("text_model.encoder.layers.11", "text_encoder.layer.11"),
        ("text_encoder_2.text_model.encoder.layers.26", "text_encoder_2.layer.26"),
        ("encoder.layers.0", "text_encoder.layer.0"),
        ("text_encoder_2.layer.3", "text_encoder_2.layer.3"),
    ],
)
def test_hook_points_are_understood(copied, hook, site):
    assert read_foreign(copied("saelens-topk", metadata={"hook_name": hook})).site == site


@pytest.mark.parametrize(
    "hook",
    ["blocks.9.hook_mlp_out", "blocks.9.hook_resid_pre", "unet.up_blocks.1.attentions.1", "vision_model.layers.9", ""],
)
def test_another_hook_point_asks_for_the_site(copied, hook):
    folder = copied("saelens-topk", metadata={"hook_name": hook})
    with pytest.raises(InputError, match=r"--site text_encoder\.layer\.9"):
        read_foreign(folder)
    assert read_foreign(folder, "text_encoder.layer.3").site == "text_encoder.layer.3"


def test_the_site_does_not_contradict_the_file(copied):
    folder = copied("saelens-topk", metadata={"hook_name": "layers.9"})
    assert read_foreign(folder, "text_encoder_2.layer.9").site == "text_encoder_2.layer.9"
    with pytest.raises(InputError, match="leave --site out"):
        read_foreign(folder, "text_encoder.layer.8")
    with pytest.raises(InputError, match="is no site of a text encoder's layer"):
        read_foreign(folder, "../../etc")
    with pytest.raises(InputError, match="is no site of a text encoder's layer"):
        read_foreign(folder, "text_encoder.layer.09")


@pytest.mark.parametrize(
    ("variant", "changes", "match"),
    [
        ("saelens-topk", {"k": ...}, "is a TopK and its k is None"),
        ("saelens-topk", {"k": 4.0}, "is a TopK and its k is 4.0"),
        ("saelens-topk", {"k": True}, "is a TopK and its k is True"),
        ("saelens-topk", {"k": LATENTS + 1}, "k is 25"),
        ("saelens-topk", {"architecture": "standard"}, "which do not go together"),
        ("saelens-topk", {"architecture": ..., "k": ...}, "architecture None"),
        ("saelens-topk", {"architecture": "jumprelu"}, "thresholds of their own"),
        ("saelens-topk", {"architecture": "gated"}, "a gate"),
        ("saelens-topk", {"architecture": "batchtopk"}, "other tokens of the batch"),
        ("saelens-topk", {"architecture": "matryoshka_batchtopk"}, "other tokens of the batch"),
        ("saelens-topk", {"architecture": "transcoder"}, "only standard and topk"),
        ("saelens-topk", {"architecture": ["topk"]}, "only standard and topk"),
        ("saelens-topk", {"normalize_activations": "expected_average_only_in"}, "fold them in"),
        ("saelens-topk", {"normalize_activations": True}, "fold them in"),
        ("saelens-topk", {"normalize_activations": "covariance_whitening"}, "fold them in"),
        ("saelens-topk", {"normalize_activations": {}}, "fold them in"),
        ("saelens-topk", {"reshape_activations": "hook_z"}, "the heads of an attention"),
        ("saelens-topk", {"apply_b_dec_to_input": 1}, "true or false"),
        ("saelens-topk", {"d_in": 9}, "has 8 features and its configuration says 9"),
        ("saelens-topk", {"d_sae": "24"}, "has 24 latents"),
        ("saelens-topk-old", {"activation_fn_kwargs": {}}, "its k is None"),
        ("saelens-topk-old", {"activation_fn_str": "tanh-relu", "activation_fn_kwargs": {}}, "do not go together"),
        ("sparsify-factor/text_model.encoder.layers.9", {"k": ...}, "its k is None"),
        ("sparsify-factor/text_model.encoder.layers.9", {"activation": "groupmax"}, "groupmax"),
        ("sparsify-factor/text_model.encoder.layers.9", {"transcode": True}, "'transcode', which changes"),
        ("sparsify-factor/text_model.encoder.layers.9", {"skip_connection": True}, "'skip_connection', which changes"),
        ("sparsify-factor/text_model.encoder.layers.9", {"signed": True}, "'signed', which changes"),
        ("sparsify-factor/text_model.encoder.layers.9", {"batch_topk": True}, "'batch_topk', which changes"),
        ("sparsify-factor/text_model.encoder.layers.9", {"input_unit_norm": True}, "'input_unit_norm', which changes"),
        ("sparsify-factor/text_model.encoder.layers.9", {"expansion_factor": 4}, "configuration says 32"),
        ("sparsify-factor/text_model.encoder.layers.9", {"num_latents": 32}, "configuration says 32"),
    ],
)
def test_a_configuration_that_would_be_guessed_at_is_refused(copied, variant, changes, match):
    with pytest.raises(InputError, match=match):
        read_foreign(copied(variant, **changes))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"activation": "Identity"}, "'Identity'; TopK and ReLU are read"),
        ({"activation": "topk"}, "TopK and ReLU are read"),
        ({"activation": ...}, "neither an activation nor"),
        ({"activation_state_dict": ...}, "its k is None"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "only ReLU is read"),
        ({"decoder.weight": ...}, "lacks decoder.weight"),
        ({"encoder.bias": torch.zeros(LATENTS)}, "also has 'encoder.bias'"),
        ({"encoder.weight": torch.randn(LATENTS, WIDTH + 1)}, r"encoder of \[24, 9\]"),
        ({"encoder.weight": torch.randn(LATENTS * WIDTH)}, r"encoder of \[192\]"),
        ({"latent_bias": torch.tensor(1.0)}, "a bias that is no vector"),
        ({"latent_bias": torch.full((LATENTS,), torch.nan)}, "b_enc is not finite"),
        ({"decoder.weight": torch.full((WIDTH, LATENTS), torch.inf)}, "W_dec is not finite"),
        ({"latent_bias": torch.zeros(LATENTS, dtype=torch.int8)}, "weights in int8"),
        ({"encoder.weight": torch.zeros(1).expand(10**6, 10**6)}, "larger than what is stored"),
    ],
)
def test_a_state_dict_that_is_not_whole_is_refused(tmp_path, more, match):
    with pytest.raises(InputError, match=match):
        read_foreign(openai(tmp_path / "9.pt", **more), SITE)


def test_what_is_no_state_dict_is_refused(tmp_path):
    for content in ([torch.zeros(3)], torch.zeros(3), {**state(), 5: torch.zeros(3)}, {"state_dict": {5: 6}}, "text"):
        torch.save(content, tmp_path / "9.pt")
        with pytest.raises(InputError, match="is not a state dict"):
            read_foreign(tmp_path / "9.pt", SITE)


def test_a_square_one_is_refused(tmp_path):
    square = {name: torch.randn(8, 8) for name in ("encoder.weight", "decoder.weight")}
    with pytest.raises(InputError, match="nothing tells which way round"):
        read_foreign(openai(tmp_path / "9.pt", latent_bias=torch.zeros(8), **square), SITE)


def test_steerers_needs_its_config(tmp_path):
    folder = steerers(tmp_path / "a", {"k": ...})
    with pytest.raises(InputError, match=r"nor, in a config\.json beside it, k"):
        read_foreign(folder, SITE)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"nor, in a config\.json beside it, k"):
        read_foreign(folder, SITE)
    with pytest.raises(InputError, match="has 8 features and its configuration says 9"):
        read_foreign(steerers(tmp_path / "b", {"d_model": 9}), SITE)


def test_the_file_itself_may_be_given(copied, tmp_path):
    folder = copied("saelens-topk")
    assert read_foreign(folder / "sae_weights.safetensors").digest == read_foreign(folder).digest
    renamed = (folder / "sae_weights.safetensors").rename(folder / "other.safetensors")
    assert read_foreign(renamed).source_format == "saelens"
    with pytest.raises(InputError, match="holds several files of weights"):
        read_foreign(folder)


def test_a_folder_of_hook_points_names_one(tmp_path):
    shutil.copytree(FOREIGN / "sparsify-factor", tmp_path / "run")
    with pytest.raises(InputError, match=r"one autoencoder for each hook point.*text_model\.encoder\.layers\.9"):
        read_foreign(tmp_path / "run")
    with pytest.raises(InputError, match="holds no autoencoder"):
        read_foreign(HERE.parent)
    with pytest.raises(InputError, match="does not exist"):
        read_foreign(tmp_path / "nothing")


def test_a_missing_or_broken_configuration_is_one_sentence(copied):
    folder = copied("saelens-topk")
    for text in ("", "[]", "{", "[" * 100_000, '{"k": ' + "9" * 5000 + "}"):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(InputError, match="is not a JSON object"):
            read_foreign(folder)
    (folder / "cfg.json").write_text(json.dumps({"k": "x" * 2_000_000}))
    with pytest.raises(InputError, match="has more than"):
        read_foreign(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"no cfg\.json beside it"):
        read_foreign(folder)


def test_tensors_of_nothing_known_are_named(copied):
    folder = copied("saelens-topk")
    save_file({"something": torch.zeros(3)}, folder / "sae_weights.safetensors")
    with pytest.raises(InputError, match=r"is of no format that is read .*something"):
        read_foreign(folder)
    tensors = load_file(FOREIGN / "saelens-topk" / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(LATENTS)}, folder / "sae_weights.safetensors")
    with pytest.raises(InputError, match="also has 'scaling_factor'"):
        read_foreign(folder)
    save_file(tensors | {"W_dec": torch.zeros(LATENTS, WIDTH)}, folder / "sae_weights.safetensors")
    assert read_foreign(folder).decoder.count_nonzero() == 0
    folder = copied("saelens-topk-rescaled")
    save_file(tensors | {"W_dec": torch.zeros(LATENTS, WIDTH)}, folder / "sae_weights.safetensors")
    with pytest.raises(InputError, match="column of zeros"):
        read_foreign(folder)


class Runs:
    """Leaves a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Allocates:
    def __reduce__(self):
        return bytearray, (10**12,)


def test_code_in_a_pickle_is_named_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(InputError, match=r"holds code \('posix.mkdir'\)"):
        read_foreign(openai(tmp_path / "code.pt", more=Runs(trap)), SITE)
    assert not trap.exists()
    # weights_only lets this one through, and it would take all memory.
    with pytest.raises(InputError, match=r"holds code .*bytearray"):
        read_foreign(openai(tmp_path / "large.pt", more=Allocates()), SITE)


def test_a_newer_pickle_protocol_hides_no_code(tmp_path):
    trap = tmp_path / "trap"
    torch.save(state(more=Runs(trap)), tmp_path / "code.pt", pickle_protocol=4)
    with pytest.raises(InputError, match="holds code"):
        read_foreign(tmp_path / "code.pt", SITE)
    assert not trap.exists()


def test_an_old_pickle_is_refused(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "old.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"no file of PyTorch 1\.6 or later"):
        read_foreign(path, SITE)
    path.write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(InputError, match=r"no file of PyTorch 1\.6 or later"):
        read_foreign(path, SITE)
    assert not trap.exists()


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with other entries: `change` takes and gives a list of (name, content)."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(entries):
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    bomb = rewritten(openai(tmp_path / "bomb.pt"), lambda it: [*it, ("x/data/99", bytes(10**7))], zipfile.ZIP_DEFLATED)
    twice = rewritten(openai(tmp_path / "twice.pt"), lambda it: [*it, it[0]])
    for path in (bomb, twice):
        with pytest.raises(InputError, match=r"not as torch\.save writes it"):
            read_foreign(path, SITE)
    much = rewritten(openai(tmp_path / "much.pt"), lambda it: [(it[0][0], it[0][1] + bytes(200_000)), *it[1:]])
    none = rewritten(openai(tmp_path / "none.pt"), lambda it: it[1:])
    for path in (much, none):
        with pytest.raises(InputError, match="holds more than the tensors"):
            read_foreign(path, SITE)


def test_a_pickle_that_claims_more_than_is_stored_is_refused(tmp_path):
    def claim(entries):
        # 24 x 8 numbers of the encoder become 24 x 2**31.
        pickled = entries[0][1]
        assert pickled.count(b"K\x18K\x08\x86") == 1
        return [(entries[0][0], pickled.replace(b"K\x18K\x08\x86", b"K\x18J\xff\xff\xff\x7f\x86")), *entries[1:]]

    with pytest.raises(InputError, match=r"cannot be read|larger than what is stored"):
        read_foreign(rewritten(openai(tmp_path / "9.pt"), claim), SITE)


def test_what_is_cut_off_is_refused(tmp_path):
    whole = openai(tmp_path / "9.pt").read_bytes()
    for length in range(0, len(whole), 199):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_foreign(tmp_path / "cut.pt", SITE)
    weights = (FOREIGN / "saelens-topk" / "sae_weights.safetensors").read_bytes()
    (tmp_path / "cfg.json").write_text((FOREIGN / "saelens-topk" / "cfg.json").read_text())
    for length in range(0, len(weights), 97):
        (tmp_path / "cut.safetensors").write_bytes(weights[:length])
        with pytest.raises(InputError):
            read_foreign(tmp_path / "cut.safetensors", SITE)


def test_a_changed_byte_never_breaks_the_reader(tmp_path):
    whole = openai(tmp_path / "9.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        head = archive.getinfo("9/data.pkl")
        begin = head.header_offset
        end = begin + head.file_size + 200
    for place in range(begin, end, 7):
        (tmp_path / "changed.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        with suppress(InputError):
            read_foreign(tmp_path / "changed.pt", SITE)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no FIFOs")
@pytest.mark.parametrize("name", ["sae.pt", "sae.safetensors"])
def test_a_fifo_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is not a file"):
        read_foreign(tmp_path / name, SITE)
