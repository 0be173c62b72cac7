"""What rewards say they need must be what their own modules fetch and build."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.networks.clip import OPEN_CLIP_FILES, TRANSFORMERS_FILES, build_open_clip, open_clip_config
from argrpo_cli.rewards import REWARDS, clip, imagereward, maniqa, pickscore
from argrpo_cli.rewards import needs as needs_module
from argrpo_cli.rewards.hpsv2 import CHECKPOINTS, REPOSITORY, build_hpsv2
from argrpo_cli.rewards.judge.rewards import MODEL
from argrpo_cli.rewards.needs import Needs, needs_of
from argrpo_cli.system.hub import HubFile, is_cached


def places(name: str, **options: object) -> list[tuple[str, str]]:
    return [(file.repo, file.file) for file in needs_of(name, options).files]


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_files_are_those_that_the_rewards_fetch() -> None:
    from argrpo_cli.geneval.mask2former import FILES, REPO
    from argrpo_cli.rewards import aesthetic

    large = (open_clip_config("ViT-L-14-quickgelu", "openai")[1]["hf_hub"].rstrip("/"), OPEN_CLIP_FILES[0])
    base = open_clip_config("ViT-B-32-quickgelu", "openai")[1]["hf_hub"].rstrip("/")
    assert places("clip") == [(base, OPEN_CLIP_FILES[0])]
    assert places("clip", model="ViT-L/14") == [large]
    assert places("clip", model="openai/clip-vit-large-patch14") == [
        ("openai/clip-vit-large-patch14", TRANSFORMERS_FILES[0])
    ]
    assert places("hpsv2") == [(REPOSITORY, CHECKPOINTS["2.1"])]
    assert places("hpsv2", version="2.0") == [(REPOSITORY, CHECKPOINTS["2.0"])]
    assert places("maniqa") == [(maniqa.REPO, maniqa.FILE)]
    assert places("aesthetic") == [(aesthetic.REPOSITORY, aesthetic.CHECKPOINT), large]
    assert places("imagereward") == [
        (imagereward.REPO, imagereward.FILE), (imagereward.TOKENIZER_REPO, imagereward.VOCABULARY)
    ]  # fmt: skip
    assert places("pickscore") == [(pickscore.REPOSITORY, TRANSFORMERS_FILES[0])]
    assert places("geneval") == [*((REPO, file) for file in FILES), large]
    assert {repo for repo, _ in places("judge-fake")} == {MODEL}
    assert clip.Clip.__init__.__kwdefaults__["model"] == "ViT-B-32-quickgelu"


def test_the_sizes_are_those_of_the_networks() -> None:
    from argrpo_cli.geneval.mask2former import build_mask2former

    with torch.device("meta"):
        built = {
            "CLIP_B32": build_open_clip(open_clip_config("ViT-B-32-quickgelu", "openai")[0]),
            "CLIP_L14": build_open_clip(open_clip_config("ViT-L-14-quickgelu", "openai")[0]),
            "CLIP_H14": build_hpsv2(),
            "BLIP": imagereward.build_network(),
            "MASK2FORMER": build_mask2former(),
        }
        assert count(pickscore.build_pickscore()) == needs_module.CLIP_H14
    assert {name: getattr(needs_module, name) for name in built} == {name: count(one) for name, one in built.items()}


def test_half_precision_takes_half_the_memory() -> None:
    assert needs_of("hpsv2", {"dtype": "bfloat16"}).weights * 2 == needs_of("hpsv2", {}).weights
    assert needs_of("judge-fake", {}, "cuda").weights * 2 == needs_of("judge-fake", {}, "cpu").weights


@pytest.mark.parametrize("name", ["clip", "hpsv2", "maniqa", "pickscore"])
def test_a_local_file_is_not_fetched(name: str) -> None:
    assert places(name, weights="here.pt") == []


def test_a_server_takes_no_memory_here_and_must_have_an_address() -> None:
    asked = needs_of("judge-quality", {"backend": "server", "url": "http://localhost:8000/v1"})
    assert asked.server and not asked.weights and not asked.files and not asked.missing
    assert "option url" in needs_of("deqa", {}).missing


def test_judges_share_a_network() -> None:
    assert len({needs_of(name, {}).network for name in ("judge-quality", "judge-fake", "judge-weird")}) == 1


def test_every_reward_of_the_package_is_known() -> None:
    bundled = {name for name, entry in REWARDS.items() if entry.steps_of is None and needs_of(name, {}) == Needs()}
    assert bundled == {name for name in REWARDS if name.startswith("nano-")}


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
