"""Published state dicts and files: exact round trip, and every kind of misfit named."""

from __future__ import annotations

import argparse

import pytest
import torch

from argrpo_cli.policy.llamagen.checkpoints import from_published, read_checkpoint, to_published
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.system.errors import UserError
from tests.formula import formula_weights
from tests.goldens import cases, golden_config, golden_model


def published(name="A_c2i"):
    """Published state dict and our configuration of a golden case."""
    case = cases()[name]
    return formula_weights(case["shapes"]), golden_config(case["config"])


@pytest.mark.parametrize("name", ["A_c2i", "B_t2i8", "B_t2i120"])
def test_published_state_dict_round_trip(name):
    state, config = published(name)
    again = to_published(from_published(state, config))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_the_loaded_model_trains_its_parameters_and_not_the_null_caption():
    model = from_published(*published("B_t2i8"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not model.model.null_caption.requires_grad
    assert "model.null_caption" in model.state_dict()


def test_every_misfit_is_named_at_once():
    state, config = published()
    del state["layers.2.attention.wo.weight"], state["norm.weight"]
    state["layers.9.attention.wo.weight"] = torch.zeros(2, 2)
    state["output.weight"] = torch.zeros(300, 64)
    with pytest.raises(UserError) as caught:
        from_published(state, config, "some.pt")
    message = str(caught.value)
    assert "some.pt" in message and "\n" not in message
    assert "missing layers.2.attention.wo.weight, norm.weight" in message
    assert "unexpected layers.9.attention.wo.weight" in message
    assert "output.weight is [300, 64], expected [256, 64]" in message


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"hidden_size": 128},
        {"num_classes": 11},
        {"num_key_value_heads": 2},
        {"intermediate_size": 512},
        {"vocab_size": 128},
    ],
)
def test_another_geometry_does_not_load(change):
    state, config = published()
    with pytest.raises(UserError, match=r"do not fit: .* as a class-conditional LlamaGen"):
        from_published(state, LlamaGenConfig(**{**config.to_dict(), "intermediate_size": None, **change}))


def test_a_caption_checkpoint_is_no_class_policy():
    state, _ = published("B_t2i8")
    with pytest.raises(UserError, match=r"missing cls_embedding\.embedding_table\.weight"):
        from_published(state, published("A_c2i")[1])


def load_published(path, config):
    return from_published(read_checkpoint(path), config, str(path))


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_published_files_open_in_every_wrapping(wrapper, tmp_path):
    state, config = published()
    # A training checkpoint carries the trainer's arguments, and some files a rotary table.
    extra = {"args": argparse.Namespace(lr=1e-4), "steps": 5}
    state["freqs_cis"] = torch.zeros(3)
    torch.save(state if wrapper is None else {wrapper: state, **extra}, tmp_path / "c2i.pt")
    model = load_published(tmp_path / "c2i.pt", config)
    assert torch.equal(model.lm_head.weight, state["output.weight"])


def test_half_precision_files_are_loaded_as_float32(tmp_path):
    state, config = published()
    torch.save({key: value.bfloat16() for key, value in state.items()}, tmp_path / "c2i.pt")
    model = load_published(tmp_path / "c2i.pt", config)
    assert model.lm_head.weight.dtype == torch.float32


class Harmful:
    """A pickle that would run code when opened."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code was run')",))


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"model": published()[0], "args": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt is not a readable file of weights"):
        load_published(tmp_path / "bad.pt", published()[1])


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    config = published()[1]
    with pytest.raises(UserError, match=r"weights not found: .*absent\.pt"):
        load_published(tmp_path / "absent.pt", config)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"text\.pt is not a readable file of weights"):
        load_published(tmp_path / "text.pt", config)
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.pt is not a readable"):
        load_published(tmp_path / "empty.pt", config)
    torch.save({"steps": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt holds no state dict"):
        load_published(tmp_path / "other.pt", config)
    torch.save({"model": published()[0]}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.pt is not a readable"):
        load_published(tmp_path / "cut.pt", config)


def test_an_older_torch_file_opens(tmp_path):
    state, config = published()
    torch.save({"model": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_published(tmp_path / "old.pt", config).lm_head.weight, state["output.weight"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (3, torch.zeros(2), "3 is "),
        ("norm.weight", "text", "'norm.weight' is a str"),
        ("norm.weight", torch.zeros(64).to_sparse(), "'norm.weight' is of layout torch.sparse_coo"),
        ("norm.weight", torch.zeros(64, dtype=torch.int64), "wrong numbers norm.weight is torch.int64"),
        ("norm.weight", torch.zeros(64, dtype=torch.complex64), "wrong numbers norm.weight is torch.complex64"),
    ],
)
def test_what_is_no_weight_is_named(key, value, message, tmp_path):
    state, config = published()
    torch.save({**state, key: value}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=message) as told:
        load_published(tmp_path / "odd.pt", config)
    assert "\n" not in str(told.value)


def test_real_size_b_has_exactly_the_published_keys():
    shapes = cases()["G_gptB"]["shapes"]
    ours = {key: list(value.shape) for key, value in to_published(golden_model("G_gptB")).items()}
    assert ours == shapes
