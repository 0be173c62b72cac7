"""`import argrpo_cli as ar`: policies, rewards and pictures from Python, as docs/python.md says."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import argrpo_cli as ar
from argrpo_cli.policy.tokens import TokenPolicy
from tests.policy.tiny_janus import tiny_janus

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture(scope="module")
def policy() -> TokenPolicy:
    return ar.load_policy("nano-c2i")


def test_the_page_s_examples_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    names: dict[str, object] = {}
    for example in examples[:-1]:  # the last trains for a minute
        exec(example, names)
    assert (tmp_path / "dog.png").is_file() and (tmp_path / "folder" / "policy.json").is_file()
    assert "nano-quality" in capsys.readouterr().out and "run_training" in examples[-1]
    again = ar.load_policy(tmp_path / "folder").generate(["dog", 3], n=4, cfg_scale=2)
    assert torch.equal(again.tokens, names["drawn"].tokens)


def test_importing_it_and_asking_what_it_has_loads_nothing() -> None:
    code = "import argrpo_cli as ar, sys; dir(ar); ar.UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {"load_policy", "run_training", "__version__"} <= set(dir(ar)) and set(ar.__all__) == set(ar._HOMES)
    assert all(getattr(ar, name) is not None for name in ar.__all__ if name != "run_training")  # which brings TRL
    with pytest.raises(AttributeError, match="has no attribute 'load_polcy'"):
        _ = ar.load_polcy


def test_a_condition_and_a_seed_are_one_image_whatever_else_is_drawn(policy) -> None:
    drawn = policy.generate(["dog", "apple"], n=2, seed=5, temperature=0.9)
    assert [one.prompt for one in drawn.conditions] == ["a photo of a dog"] * 2 + ["a photo of an apple"] * 2
    assert drawn.seeds == [5, 6, 5, 6] and len(drawn) == 4
    alone = policy.generate("dog", seed=6, temperature=0.9, batch_size=1)
    assert torch.equal(alone.tokens[0], drawn.tokens[1]) and alone.images.shape == (1, 3, 64, 64)
    picture = drawn.pil()[1]
    assert picture.size == (64, 64) and picture.getpixel((5, 9)) == tuple(alone.images[0, :, 9, 5].tolist())
    assert policy.generate("dog", size=32).images.shape == (1, 3, 32, 32)
    assert not torch.equal(policy.generate("dog", seed=6).tokens, alone.tokens)


def test_another_family_draws_its_captions() -> None:
    drawn = tiny_janus().generate(["a dog", "a cat"], seed=3)
    assert len(drawn) == 2 and drawn.images.dtype == torch.uint8 and drawn.conditions[1].prompt == "a cat"


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (["dgo"], {}, "no class 'dgo'"),
        (["dog"], {"n": 0}, "n is 0: must be 1 or more"),
        (["dog"], {"cfg_scale": 0.5}, "cfg-scale 0.5: must be 1 or more"),
        (["dog"], {"seed": 2**32 - 1, "n": 2}, "seeds are 0 to"),
        ([], {}, "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(policy, asked, options, message) -> None:
    with pytest.raises(ar.UserError, match=message):
        policy.generate(asked, **options)


def test_guidance_on_top_of_what_is_in_the_weights_is_a_warning(policy, monkeypatch) -> None:
    monkeypatch.setattr(policy, "sampling", {"cfg_scale": 1.0})
    with pytest.warns(UserWarning, match="guidance is in its weights already"):
        guided = policy.generate("dog", cfg_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(policy.generate("dog").tokens, guided.tokens)
