"""What rewards say of themselves before anything is loaded: facts, and needs that are those of their networks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from argrpo_cli.networks import blip
from argrpo_cli.networks.clip import (
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    TransformersClip,
    build_open_clip,
    open_clip_config,
)
from argrpo_cli.rewards import REWARDS, check_reward, clip, geneval, imagereward, maniqa
from argrpo_cli.rewards.base import FAMILIES, Needs
from argrpo_cli.rewards.judge import MODEL
from argrpo_cli.system.files import HubFile, is_cached


def needs_of(name: str, device: str = "cpu", **options: object) -> Needs:
    return check_reward(name).needs(options, device)


def places(name: str, **options: object) -> list[tuple[str, str]]:
    return [(file.repo, file.file) for file in needs_of(name, **options).files]


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_goes_by_its_name_in_the_table(name: str) -> None:
    reward = check_reward(name)
    assert reward.name == name and reward.family in FAMILIES and reward.low < reward.high
    assert reward.reads_prompt == (reward.family == "conditional" or name == "judge-quality")


def test_facts_options_and_needs_are_known_without_torch() -> None:
    code = """
import sys
from argrpo_cli.rewards import REWARDS, check_options, check_reward, identity
for name in REWARDS:
    check_reward(name).needs({})
    check_options(name, {})
check_options("judge-fake", {"backend": "server", "timeout": 3.0})
identity(list(REWARDS))
heavy = {"torch", "transformers", "open_clip", "pyiqa", "rapidocr", "httpx2"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_files_are_those_that_the_rewards_fetch() -> None:
    from argrpo_cli.geneval.detector import FILES, REPO

    large = (open_clip_config("ViT-L-14-quickgelu", "openai")[1]["hf_hub"].rstrip("/"), OPEN_CLIP_FILES[0])
    base = open_clip_config("ViT-B-32-quickgelu", "openai")[1]["hf_hub"].rstrip("/")
    assert places("clip") == [(base, OPEN_CLIP_FILES[0])]
    assert places("clip", model="ViT-L/14") == [large]
    assert places("clip", model="openai/clip-vit-large-patch14") == [
        ("openai/clip-vit-large-patch14", TRANSFORMERS_FILES[0])
    ]
    assert places("hpsv2") != places("hpsv2", version="2.0")
    assert places("aesthetic")[1] == large
    assert len(places("imagereward")) == 2
    assert clip.PickScore.files["weights"].file == TRANSFORMERS_FILES[0]
    assert places("geneval") == [*((REPO, file) for file in FILES), large]
    assert {repo for repo, _ in places("judge-fake")} == {MODEL}
    assert clip.Clip.__init__.__kwdefaults__["model"] == "ViT-B-32-quickgelu"


def test_the_sizes_are_those_of_the_networks() -> None:
    from argrpo_cli.geneval.detector import build_mask2former

    with torch.device("meta"):
        assert count(build_open_clip(open_clip_config("ViT-B-32-quickgelu", "openai")[0])) == clip.B32
        assert count(build_open_clip(open_clip_config("ViT-L-14-quickgelu", "openai")[0])) == clip.L14
        assert count(build_open_clip(open_clip_config("ViT-H-14", "laion2b_s32b_b79k")[0])) == clip.H14
        assert count(TransformersClip(clip.PickScore.config)) == clip.H14
        assert count(blip.build_network()) == imagereward.PARAMETERS
        assert count(build_mask2former()) == geneval.PARAMETERS


def test_half_precision_takes_half_the_memory() -> None:
    assert needs_of("hpsv2", dtype="bfloat16").weights * 2 == needs_of("hpsv2").weights
    assert needs_of("judge-fake", "cuda").weights * 2 == needs_of("judge-fake", "cpu").weights


@pytest.mark.parametrize("name", ["clip", "hpsv2", "maniqa", "pickscore"])
def test_a_local_file_is_not_fetched(name: str) -> None:
    assert places(name, weights="here.pt") == []


def test_a_server_takes_no_memory_here_and_must_have_an_address() -> None:
    needs = needs_of("judge-quality", backend="server", url="http://localhost:8000/v1")
    assert needs.server and not needs.weights and not needs.files and not needs.missing
    assert "option url" in needs_of("deqa").missing


def test_judges_share_a_network() -> None:
    assert len({needs_of(name).network for name in ("judge-quality", "judge-fake", "judge-weird")}) == 1


def test_the_bundled_rewards_need_nothing() -> None:
    bundled = {name for name in REWARDS if needs_of(name) == Needs()}
    assert bundled == {name for name in REWARDS if name.startswith("nano-")} | {"stage-entropy"}  # which loads nothing
    assert needs_of("geneval", detector="nano") == Needs()


def test_maniqa_brings_its_package_and_its_crops() -> None:
    needs = needs_of("maniqa")
    assert (
        list(needs.packages) == ["pyiqa"]
        and needs.working == 4 * 10**9
        and needs.files == (maniqa.Maniqa.files["weights"],)
    )


def test_what_is_cached_is_seen_without_asking(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = HubFile("owner/name", "weights.pt")
    assert not is_cached(file)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "weights.pt").write_text("")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    assert is_cached(file)
