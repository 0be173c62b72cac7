"""Published checkpoints: every size's keys, every wrapping, names, files, AR-GRPO folders, and the way back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from argrpo_cli.cli.app import run
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen import published
from argrpo_cli.policy.llamagen.checkpoints import to_published
from argrpo_cli.policy.llamagen.config import VQConfig, published_config
from argrpo_cli.policy.llamagen.geometry import SIZES, published_geometry
from argrpo_cli.policy.llamagen.model import LlamaGenNetwork
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, VQModel
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.system.errors import UserError
from tests.formula import formula_weights
from tests.training.tiny import sample

DATA = Path(__file__).parents[1] / "data" / "policy"
PUBLISHED = json.loads((DATA / "sizes.json").read_text())
CODES = 32


def shapes_of(name: str) -> dict[str, list[int]]:
    """Published key to shape of a published size."""
    facts = PUBLISHED[name]
    layers = {f"layers.{i}.{key}": shape for i in range(facts["layers"]) for key, shape in facts["layer"].items()}
    return {**facts["rest"], **layers}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_size_has_the_published_keys_shapes_and_counts(name):
    facts, shapes = PUBLISHED[name], shapes_of(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = published.config_of(state, 576, name)
    assert config.num_attention_heads == facts["heads"]
    condition = "caption" if name.endswith("t2i") else "class"
    size = name.removeprefix("GPT-").partition("_")[0]
    assert config == published_geometry(size, image_size=384, condition=condition)
    with torch.device("meta"):
        model = LlamaGenNetwork(config)
    assert {key: list(value.shape) for key, value in to_published(model).items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == facts["n_parameters"]
    assert sum(v.numel() for v in model.state_dict().values()) == facts["n_state_dict_elements"]
    assert len(shapes) == facts["n_keys"]


def test_every_published_name_says_size_condition_and_pixels():
    for name, entry in POLICIES.items():
        if entry.family != "llamagen" or not entry.file:  # a whole repository has a name of its own
            continue
        kind, size, pixels, *aligned = name.split("-")
        file = Path(entry.file).name
        assert file.lower().startswith(f"{kind}_{size}_")
        assert file.endswith(f"_{pixels}_CCA_0005000.pt" if aligned == ["cca"] else f"_{pixels}.pt")
        assert entry.image_size == int(pixels) and entry.tokenizer in published.TOKENIZERS


@pytest.mark.parametrize("name", ["VQ-8", "VQ-16"])
def test_a_tokenizer_is_read_off_its_keys(name):
    shapes = json.loads((DATA / f"{name}.json").read_text())["shapes"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = published.tokenizer_from(state)
    assert model.config.downsample == int(name.removeprefix("VQ-"))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """A folder with published files of a size of its own: c2i_tiny_256.pt and vq_ds16_c2i.pt, 16x16 tokens."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(SIZES, "tiny", size)
    config = published_config("tiny")
    config.vocab_size, config.num_classes = CODES, 5
    with torch.device("meta"):
        meta = LlamaGenForImageGeneration(config)
        vq = VQModel(
            VQConfig(
                codebook_size=CODES,
                ch=32,
                encoder_ch_mult=[1, 1, 1, 1, 2],
                decoder_ch_mult=[1, 1, 1, 1, 2],
                num_res_blocks=1,
                z_channels=32,
            )
        )
    weights = formula_weights({key: value.shape for key, value in to_published(meta).items()})
    torch.save({"model": weights, "optimizer": {}, "steps": 7}, tmp_path / "c2i_tiny_256.pt")
    torch.save(
        {"model": formula_weights({k: v.shape for k, v in vq.state_dict().items()})}, tmp_path / "vq_ds16_c2i.pt"
    )
    return tmp_path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_a_file_draws_pictures_and_comes_back_bit_for_bit(tiny, tmp_path, capsys):
    policy = load_policy(tiny / "c2i_tiny_256.pt")
    assert (policy.image_size, policy.tokenizer_name, policy.class_names) == (256, None, list("01234"))
    tokens = sample(policy, policy.conditions([0, 3]), [0, 1])
    assert tokens.shape == (2, 256)
    assert policy.decode(tokens[:1]).shape == (1, 3, 256, 256)
    for arguments in (
        [str(tiny / "c2i_tiny_256.pt"), str(tmp_path / "folder"), "--tokenizer", str(tiny / "vq_ds16_c2i.pt")],
        [str(tmp_path / "folder"), str(tmp_path / "back.pt"), "--back"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["published", *arguments])
            published.main()
    again = load_policy(tmp_path / "folder")
    assert torch.equal(sample(again, again.conditions([0, 3]), [0, 1]), tokens)
    before, after = weights_of(tiny / "c2i_tiny_256.pt"), weights_of(tmp_path / "back.pt")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("wrapping", ["bare", "module", "state_dict", "ema", "ddp", "compiled", "rotary"])
def test_every_wrapping_opens(tiny, wrapping):
    path = tiny / "c2i_tiny_256.pt"
    weights = weights_of(path)
    content = {
        "bare": weights,
        "ddp": {"model": {f"module.{key}": value for key, value in weights.items()}},
        "compiled": {"model": {f"_orig_mod.{key}": value for key, value in weights.items()}},
        "rotary": {"model": {**weights, "freqs_cis": torch.zeros(3)}},
    }.get(wrapping, {wrapping: weights})
    torch.save(content, path)
    state = to_published(load_policy(path).model)
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def mirrored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers' Llama calls it: jadohu/LlamaGen-T2I's layout."""
    words = {
        "tok_embeddings": "embed_tokens", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    result = {}
    for key, value in state.items():
        for own, theirs in words.items():
            key = key.replace(own, theirs)
        if "wqkv" in key:
            for name, rows in zip("qkv", value.chunk(3), strict=True):
                result["model." + key.replace("attention.wqkv", f"self_attn.{name}_proj")] = rows.clone()
        else:
            result["lm_head.weight" if key == "output.weight" else f"model.{key}"] = value
    return result


def test_a_folder_in_the_layout_of_transformers_llama_opens_and_what_does_not_fit_is_named(tiny):
    folder, weights = tiny / "mirror", weights_of(tiny / "c2i_tiny_256.pt")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "block_size": 256}))
    (tiny / "vq_ds16_c2i.pt").rename(folder / "vq_ds16_c2i.pt")
    state = mirrored(weights)
    save_file(state, folder / "model.safetensors")
    policy = load_policy(folder)
    own = to_published(policy.model)
    assert policy.image_size == 256 and own.keys() == weights.keys()
    assert all(torch.equal(own[key], value) for key, value in weights.items())
    assert outline_policy(folder).policy.model.num_parameters() == policy.model.num_parameters()
    save_file(state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected layers\.0\.self_attn\.q_norm\.weight"):
        load_policy(folder)
    del state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"transformers' layout: it has no model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_policy(folder)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """Hugging Face's cache, empty, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_weights_aligned_by_cca_open_by_name_from_a_folder_of_their_repository(tiny, offline):
    for repo, file, source in (
        ("ChenDRAG/CCA_LlamaGen", "CCA_LlamaGen_Guidance_Free/c2i_L_384_CCA_0005000.pt", "c2i_tiny_256.pt"),
        ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", "vq_ds16_c2i.pt"),
    ):
        folder = offline / f"models--{repo.replace('/', '--')}"
        place = folder / "snapshots" / ("0" * 40) / file
        place.parent.mkdir(parents=True)
        place.symlink_to(tiny / source)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    policy = load_policy("c2i-l-384-cca")
    assert (policy.name, policy.image_size, policy.tokenizer_name) == ("c2i-l-384-cca", 384, "vq-ds16-c2i")
    state = to_published(policy.model)
    assert all(torch.equal(state[key], value) for key, value in weights_of(tiny / "c2i_tiny_256.pt").items())
    assert sample(policy, policy.conditions([3]), [0]).shape == (1, 576)
    assert policy.card.sampling == {"cfg_scale": 1.0}
    (tiny / "c2i_tiny_256.pt").rename(tiny / "c2i_L_384_CCA_0005000.pt")  # as it is after a download by hand
    by_hand = load_policy(tiny / "c2i_L_384_CCA_0005000.pt")
    by_hand.save(tiny / "folder")
    assert by_hand.card.sampling == load_policy(tiny / "folder").card.sampling == {"cfg_scale": 1.0}
    (tiny / "c2i_L_384_CCA_0005000.pt").rename(tiny / "c2i_L_384.pt")
    assert load_policy(tiny / "c2i_L_384.pt").card.sampling == {}


def test_a_running_mean_beside_the_weights_is_passed_over(tiny):
    for file in ("c2i_tiny_256.pt", "vq_ds16_c2i.pt"):
        weights = weights_of(tiny / file)
        torch.save({"model": weights, "ema": {key: value + 1 for key, value in weights.items()}}, tiny / file)
    policy = load_policy(tiny / "c2i_tiny_256.pt")
    assert torch.equal(policy.model.lm_head.weight, weights_of(tiny / "c2i_tiny_256.pt")["output.weight"])
    codebook = weights_of(tiny / "vq_ds16_c2i.pt")["quantize.embedding.weight"]
    assert torch.equal(policy.tokenizer.quantize.embedding.weight, codebook)


def test_weights_in_half_precision_are_opened_as_asked(tiny):
    path = tiny / "c2i_tiny_256.pt"
    torch.save({"model": {key: value.bfloat16() for key, value in weights_of(path).items()}}, path)
    assert load_policy(path).model.dtype == torch.float32
    half = load_policy(path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.tokenizer.quant_conv.weight.dtype == torch.float32


def test_an_argrpo_folder_holds_policy_and_tokenizer(tiny):
    folder = tiny / "ar-grpo-256"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "other"}')
    parts = {"gpt_model.": weights_of(tiny / "c2i_tiny_256.pt"), "vq_model.": weights_of(tiny / "vq_ds16_c2i.pt")}
    whole = {prefix + key: value.clone() for prefix, weights in parts.items() for key, value in weights.items()}
    names = sorted(whole)
    for shard, part in enumerate((names[:20], names[20:])):
        save_file({key: whole[key] for key in part}, folder / f"model-{shard + 1:05d}-of-00002.safetensors")
    policy, plain = load_policy(folder), load_policy(tiny / "c2i_tiny_256.pt")
    assert policy.tokenizer_name is None  # it is the folder's own
    for one, other in ((policy.model, plain.model), (policy.tokenizer, plain.tokenizer)):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("norm.weight"), "missing norm.weight"),
        (lambda w: w.update({"layers.0.new": torch.zeros(1)}), "unexpected layers.0.new"),
        (lambda w: w.update({"output.weight": torch.zeros(3, 32)}), r"output.weight is \[3, 32\], expected \[32, 32\]"),
        (lambda w: w.pop("tok_embeddings.weight"), "is no LlamaGen checkpoint: it has no tok_embeddings.weight"),
        (lambda w: w.update({"tok_embeddings.weight": torch.zeros(CODES, 48)}), "is 48 wide, like no published size"),
    ],
)
def test_a_misfit_is_one_line(tiny, spoil, message):
    path = tiny / "c2i_tiny_256.pt"
    weights = weights_of(path)
    spoil(weights)
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=message) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_say_its_size_is_asked_to(tiny):
    (tiny / "c2i_tiny_256.pt").rename(tiny / "policy.pt")
    with pytest.raises(UserError, match=r"does not say whether it draws 256, 384, 512 pixels.*--image-size"):
        load_policy(tiny / "policy.pt")


def test_a_tokenizer_of_other_codes_is_refused(tiny):
    weights = weights_of(tiny / "c2i_tiny_256.pt")
    for key in ("tok_embeddings.weight", "output.weight"):
        weights[key] = torch.zeros(CODES + 1, 32)
    torch.save({"model": weights}, tiny / "c2i_tiny_256.pt")
    with pytest.raises(UserError, match="has 32 codes, and the policy draws 33"):
        load_policy(tiny / "c2i_tiny_256.pt")


def test_a_tokenizer_that_is_none_is_refused(tiny):
    with pytest.raises(UserError, match="is no LlamaGen tokenizer"):
        published.open_tokenizer(tiny / "c2i_tiny_256.pt")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("c2i-l-384", "FoundationVision/LlamaGen/resolve/main/c2i_L_384.pt"),
        ("c2i-3b-384-cca", "ChenDRAG/CCA_LlamaGen/resolve/main/CCA_LlamaGen_Guidance_Free/c2i_3B_384_CCA_0005000.pt"),
    ],
)
def test_without_a_network_a_name_says_what_to_download(name, place, offline, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["sample", "--policy", name, "--class", "207", "--out", "images"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "error: cannot fetch " in error
    assert f"download https://huggingface.co/{place} and give the file instead" in error
    assert not (tmp_path / "images").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: sizes, hashes and ranges of one file."""

    content = bytes(range(256)) * 4000
    ranges: list = []  # noqa: RUF012 (shared on purpose: a request is an instance)

    def _head(self) -> bytes:
        start = 0
        if "Range" in self.headers and not self.headers["Range"].endswith("-0"):
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        Hub.ranges.append(start)
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"abc123"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        return body

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self.wfile.write(self._head())

    def log_message(self, *args: object) -> None:
        pass


def test_a_name_is_fetched_once_into_the_cache_of_the_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from argrpo_cli.policy.published import POLICIES; from argrpo_cli.system.files import fetch; "
        "one = POLICIES['c2i-b-256']; "
        "print(fetch(one.repo, one.file)); print(fetch(one.repo, one.file))"
    )
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), "600")  # on a busy machine
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second and Path(first).name == "c2i_B_256.pt" and tmp_path in Path(first).parents
    assert Path(first).read_bytes() == Hub.content


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tok_embeddings.weight", torch.zeros(8), "tok_embeddings.weight is [8], expected two sides"),
        ("cls_embedding.embedding_table.weight", torch.zeros(1, 768), "has one row, that of the null class"),
        ("layers.x.foo", torch.zeros(1), "unexpected layers.x.foo"),
        ("layers.100000.ffn_norm.weight", torch.zeros(1), "unexpected layers.100000.ffn_norm.weight"),
    ],
)
def test_a_damaged_policy_is_one_line(tiny, key, value, message):
    path = tiny / "c2i_tiny_256.pt"
    torch.save({"model": {**weights_of(path), key: value}}, path)
    with pytest.raises(UserError) as told:
        load_policy(path)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("gone", ["encoder.conv_blocks.", "encoder.conv_out.weight", "quantize."])
def test_a_damaged_tokenizer_is_one_line(tiny, gone):
    path = tiny / "vq_ds16_c2i.pt"
    state = {key: value for key, value in weights_of(path).items() if not key.startswith(gone)}
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="is no LlamaGen tokenizer") as told:
        load_policy(tiny / "c2i_tiny_256.pt")
    assert "\n" not in str(told.value)


def test_a_policy_folder_made_of_files_needs_no_network(tiny, tmp_path, offline):
    load_policy(tiny / "c2i_tiny_256.pt").save(tmp_path / "folder")
    assert load_policy(tmp_path / "folder").tokenizer_name is None
    published.export(tmp_path / "folder", tmp_path / "back.pt")
    (tiny / "vq_ds16_c2i.pt").unlink()
    with pytest.raises(UserError, match=r"vq_ds16_c2i\.pt and put it beside .*c2i_tiny_256\.pt"):
        load_policy(tiny / "c2i_tiny_256.pt")


def test_an_empty_name_and_an_absent_file_are_told():
    with pytest.raises(UserError, match="the name of the policy is empty"):
        load_policy("")
    with pytest.raises(UserError, match=r"no checkpoint file c2i_B_256\.pt"):
        load_policy("c2i_B_256.pt")
