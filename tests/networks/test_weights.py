"""Files of weights that others published: what is read, what is refused, and how it is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from argrpo_cli.networks.clip import transformers_clip
from argrpo_cli.networks.weights import fit_state, load_network, published_file, read_state, save_network
from argrpo_cli.system.errors import UserError

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


class Harmful:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return print, ("code ran",)


def test_reads_torch_files_wrapped_or_not_and_safetensors(tmp_path):
    torch.save(STATE, tmp_path / "plain.pt")
    torch.save({"params": STATE, "epoch": 3}, tmp_path / "wrapped.pt")
    save_file(STATE, tmp_path / "it.safetensors")
    for file in ("plain.pt", "wrapped.pt", "it.safetensors"):
        state = read_state(tmp_path / file, wrappers=("params",))
        assert state.keys() == STATE.keys()
        assert torch.equal(state["weight"], STATE["weight"])


def test_pickled_code_is_not_run(tmp_path, capsys):
    torch.save({"weight": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for file in ("harmful.pt", "bare.pt"):
        with pytest.raises(UserError, match="not a readable file of weights"):
            read_state(tmp_path / file)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_and_absent_files_are_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(UserError, match=rf"weights not found: .*weights{suffix}"):
        read_state(path)
    torch.save(STATE, path) if suffix == ".pt" else save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"weights{suffix} is not a readable file of weights") as error:
        read_state(path)
    assert "\n" not in str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    for number, content in enumerate(([1, 2], {"weight": 3}, {}, {"params": [1]})):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no state dict"):
            read_state(path, wrappers=("params",))


def test_all_of_the_weights_arrive_in_float32():
    with torch.device("meta"):
        network = nn.Linear(3, 2)
    fit_state(network, {key: value.half() for key, value in STATE.items()}, "file")
    assert network.weight.dtype == torch.float32
    assert torch.equal(network(torch.ones(1, 3)), torch.tensor([[4.0, 13.0]]))


def test_what_does_not_fit_is_listed():
    state = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        fit_state(nn.Linear(3, 2), state, "some.pt")
    assert str(error.value) == (
        "weights do not fit: some.pt (missing bias; unexpected extra; wrong shape weight is [2, 4], expected [2, 3])"
    )
    with pytest.raises(UserError, match=r"unexpected a0, a1, a2 and 7 more\)$"):
        fit_state(nn.Linear(3, 2), {**STATE, **{f"a{i}": torch.zeros(1) for i in range(10)}}, "some.pt")


def test_a_local_file_stands_in_for_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt; give the file x\.pt of https://huggingface\.co/a/b"):
        published_file("a/b", "x.pt", tmp_path / "absent.pt")
    (tmp_path / "here.pt").touch()
    assert published_file("a/b", "x.pt", tmp_path / "here.pt") == tmp_path / "here.pt"


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, and no network has more than 1000"),
        ({"hidden_size": -4}, "describes no model: "),
        ({"hidden_size": "x"}, "describes no model: "),
        ({"num_attention_heads": 0}, "describes no model: "),
    ],
)
def test_a_configuration_of_clip_that_cannot_be_is_one_line(part, why):
    with pytest.raises(UserError, match=rf"the config\.json of clip\.bin:? {why}") as told:
        transformers_clip({"text_config": part}, Path("clip.bin"), "cpu", "float32")
    assert "\n" not in str(told.value)


def test_a_configuration_of_the_nano_world_is_held_against_its_weights(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(layers))

    save_network(tmp_path, Net(2), {"layers": 2})
    assert len(load_network(Net, tmp_path).layers) == 2
    for config, why in (
        ({"layers": 10**9}, "layers is 1000000000, and there are 4 tensors in the weights"),
        ({"layers": "x"}, "describes no model: "),
        ({"depth": 1}, "describes no model: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"config\.json:? {why}"):
            load_network(Net, tmp_path)
