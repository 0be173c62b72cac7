"""A policy folder with any one value changed is opened or refused in a line, before anything is built of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argrpo_cli.networks.weights import load_pretrained, read_state
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import CARD, glance, mark_adapter
from argrpo_cli.policy.llamagen.model import Backbone
from argrpo_cli.policy.llamagen.pretrained import LlamaGenModel
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.runs.checkpoints import _is_readable
from argrpo_cli.system.errors import UserError
from tests.training.tiny import save_tiny_policy

CONFIG = "config.json"
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "block_size", "cls_token_num", "num_classes",
)  # fmt: skip
ODD = ("x", -1, 0, True, 1.5, [], {}, 10**9, 10**18, 10**29)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("saved") / "policy")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(*args: Any, **options: Any) -> None:
        raise AssertionError("a layer was built of it")

    for backbone in (Backbone, LlamaGenModel):  # drawn by, and trained
        monkeypatch.setattr(backbone, "layer", layer)


def test_the_name_of_a_layer_is_right(folder: Path, nothing_is_built: None) -> None:
    with pytest.raises(UserError, match="describes no model: a layer was built of it"):
        load_policy(folder)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ODD, ids=str)
def test_a_size_that_cannot_be_is_told_by_its_key(folder: Path, key: str, value: Any) -> None:
    edit(folder / CONFIG, **{key: value})
    for opened in (load_policy, outline_policy):
        with pytest.raises(UserError, match=rf"{CONFIG}|policy") as told:
            opened(folder)
        assert "\n" not in str(told.value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            assert f"{CONFIG} is damaged: {key} is " in str(told.value)


@pytest.mark.parametrize("value", [-1, True, 10**9, "x"])
def test_nothing_is_built_of_layers_that_are_not_there(folder: Path, value: Any, nothing_is_built: None) -> None:
    edit(folder / CONFIG, num_hidden_layers=value)
    with pytest.raises(UserError, match="num_hidden_layers is ") as told:
        load_policy(folder)
    assert value != 10**9 or "and there are 18 tensors in the weights" in str(told.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 0),
        ("rope_theta", "x"),
        ("rope_theta", 1e300),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", 5),
        ("rms_norm_eps", [1]),
        ("tie_word_embeddings", True),
        ("condition", "colour"),
        ("condition", ["class"]),
        ("auto_map", "x"),
    ],
)
def test_what_no_shape_shows_is_checked_by_its_range(folder: Path, key: str, value: Any) -> None:
    edit(folder / CONFIG, **{key: value})
    with pytest.raises(UserError, match=rf"{CONFIG}.*{key} is "):
        load_policy(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_ch_mult", []),
        ("encoder_ch_mult", [1] * 13),
        ("encoder_ch_mult", [1, -1]),
        ("encoder_ch_mult", "12"),
        ("num_res_blocks", 10**9),
        ("ch", 10**12),
        ("patch_size", 10**9),
        ("z_channels", None),
    ],
)
def test_a_damaged_tokenizer_is_one_line(folder: Path, key: str, value: Any) -> None:
    edit(folder / "tokenizer" / CONFIG, **{key: value})
    for opened in (load_policy, outline_policy):
        with pytest.raises(UserError, match=rf"tokenizer/{CONFIG}|cannot load .*tokenizer") as told:
            opened(folder)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", True),
        ("image_size", 0),
        ("image_size", 10**9),
        ("classes", [1, 2]),
        ("classes", {"a": 1}),
        ("tokenizer", 3),
        ("family", ["llamagen"]),
        ("base", {}),
        ("right_padded", "yes"),
        ("adapter_of", 3),
        ("sampling", [1]),
        ("sampling", {"cfg_scale": "x"}),
        ("sampling", {"top_k": 10**29}),
    ],
)
def test_a_damaged_card_is_told_by_its_key_before_torch_and_after(folder: Path, key: str, value: Any) -> None:
    edit(folder / CARD, **{key: value})
    for opened in (glance, load_policy, outline_policy):
        with pytest.raises(UserError, match=rf"policy\.json.*{key}"):
            opened(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": 1, "a": 2}', b"[" * 99_999])
@pytest.mark.parametrize("name", [CONFIG, CARD, f"tokenizer/{CONFIG}"])
def test_a_file_that_is_no_object_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read .*{name}: (not JSON|it is not UTF-8|expected a JSON object)"):
        load_policy(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"{" * 50 + content[58:],
        lambda content: b"",
    ],
)
def test_torn_weights_are_one_line(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"cannot load .*the file is damaged"):
        load_policy(folder)


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "pipe"), (lambda path: path.symlink_to("/dev/zero"), "device")])
def test_weights_that_are_no_file_are_refused(folder: Path, make: Callable[[Path], None], kind: str) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=f"cannot read .*model.safetensors: it is a {kind}, not a file"):
        load_policy(folder)
    with pytest.raises(UserError, match="is not a readable file of weights"):
        read_state(path)
    assert not _is_readable(path)  # of a checkpoint


def test_adapters_that_lead_back_to_themselves_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "../b"), ("b", "../c"), ("c", "../a"), ("own", ".")):
        (tmp_path / name).mkdir()
        mark_adapter(tmp_path / name, base, {})
    for name in ("a", "own"):
        for opened in (glance, load_policy, outline_policy):
            with pytest.raises(UserError, match="leads back to itself"):
                opened(tmp_path / name)


def test_a_model_of_transformers_of_endless_layers_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, T5EncoderModel

    from tests.training.tiny import tiny_text_encoder

    tiny_text_encoder().save(tmp_path)
    edit(tmp_path / CONFIG, num_layers=10**9)
    for kind in (T5EncoderModel, AutoModelForImageTextToText):
        with pytest.raises(UserError, match=r"config\.json: num_layers is 1000000000, and there are \d+ tensors"):
            load_pretrained(kind, tmp_path, None)
    edit(tmp_path / CONFIG, num_layers="x")
    with pytest.raises(UserError, match=r"config\.json describes no model: .*num_layers': TypeError: "):
        load_pretrained(T5EncoderModel, tmp_path, None)
