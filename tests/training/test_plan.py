"""The plan of a run: what it adds up, what it checks, and what it says is missing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.recipe import load_recipe
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.launch import settle_dtype
from argrpo_cli.training.plan import Plan, plan, show_plan
from tests.training.tiny import tiny_caption_policy


def planned(recipe: str, *overrides: str, processes: int = 1) -> Plan:
    return plan(load_recipe(recipe, overrides), processes)


def shown(one: Plan) -> str:
    console = Console(file=io.StringIO(), width=60)
    show_plan(one, console)
    return console.file.getvalue()


def test_a_plan_says_all_of_a_run_in_words() -> None:
    text = shown(planned("c2i_b256", processes=4))
    for line in (
        "table 2, after 100 updates: IS 193.61 -> 211.67, FID 5.46 -> 5.91, sFID 7.5 -> 8.58,",
        "c2i-b-256: 110.9 M parameters, 256 pixels, 256 tokens an image",
        "1000 classes, with guidance 2",
        "64 images: 8 groups of 8",
        "4 devices: 16 images (2 groups) each, 16 at a time in the training pass",
        "100 updates, 6400 images in all",
        "hpsv2            conditional  factor 5      weight 1       ViT-H-14 of xswu/HPSv2\n",  # as the recipe has them
        "hpsv2-quantized  conditional  factor 1      weight 1       ViT-H-14 of xswu/HPSv2\n",  # and counted once
        "to fetch      FoundationVision/LlamaGen: c2i_B_256.pt",
        "to fetch      xswu/HPSv2: HPS_v2.1_compressed.pt",
    ):
        assert line in text, line
    assert not any(line != line.rstrip() for line in text.splitlines())  # and no line is broken


def test_a_distillation_keeps_a_teacher_and_asks_no_rewards_but_for_its_scale() -> None:
    distil = ["method=distil", "grpo.beta=0"]
    one, grpo = planned("c2i_b256", *distil, "distil.micro_batch_size=16"), planned("c2i_b256", "grpo.beta=0")
    parts, others = ({part.name: part.bytes for part in each.memory} for each in (one, grpo))
    assert parts["teacher, float32"] == parts["policy, float32"] and "reference policy, float32" not in parts
    logits = "logits, a part of them, and their gradients"
    assert parts[logits] == 2 * others[logits] and parts["training pass"] == others["training pass"]
    assert not any(name.startswith("reward") for name in parts) and one.supply == []
    assert "1000 classes, by the teacher with guidance 2; 30% of the batches by the student without" in shown(one)
    assert "64 images\n" in shown(one) and "1 device: 64 images each, 16 at a time" in shown(one)
    chosen = shown(planned("c2i_b256", *distil, "distil.cfg_scale=[1.5, 2]", "distil.lmbda=0"))
    assert "by the teacher with one of the guidances 1.5, 2, as rewards choose\n" in chosen and "hpsv2" in chosen


def test_what_learns_from_real_images_asks_for_them_and_draws_nothing() -> None:
    plain = planned("nano/c2i", "start=null", "grpo.micro_batch_size=8")
    cca = planned("nano/cca", "cca.micro_batch_size=4", "real.path=gone/*.tar")
    parts, others = ({part.name: part.bytes for part in each.memory} for each in (cca, plain))
    assert parts["reference policy, float32"] == parts["policy, float32"]
    assert parts["training pass"] == others["training pass"], "each image under two conditions"
    assert cca.supply == [
        "real.path gone/*.tar is missing: a folder of pictures, the .tar files of a webdataset, or codes (.npz)"
    ]
    assert "real images of gone/*.tar, 9,600 at most\n" in shown(cca) and "24 classes, in grids alone\n" in shown(cca)
    here = [f"real.path={Path(__file__).parent}", "pixel.perceptual=lpips"]
    pixel = planned("nano/pixel", *here)
    parts = {part.name: part.bytes for part in pixel.memory}
    assert parts["reward: LPIPS (VGG16)"] == 4 * 14_714_688 and "reference policy, float32" not in parts
    assert parts["decoding what is drawn of real ones"] > 0 and pixel.supply == []
    assert "timm/vgg16.tv_in1k: model.safetensors" in shown(pixel)
    assert "vgg16" not in shown(planned("nano/pixel", *here, "pixel.perceptual_folder=x"))


def test_judges_are_counted_once_and_a_server_not_at_all() -> None:
    local = planned("c2i_b256")
    assert sum("Qwen" in part.name for part in local.memory) == 1
    url = "{name: judge-fake, options: {backend: server, url: 'http://localhost:8000/v1'}}"
    served = planned("c2i_b256", f"rewards.terms=[{{name: maniqa}}, {url}]")
    assert not any("Qwen" in part.name for part in served.memory)
    assert "Qwen/Qwen2.5-VL-3B-Instruct at http://localhost:8000/v1" in shown(served)


def test_a_server_without_an_address_is_to_be_supplied() -> None:
    (line,) = planned("c2i_b256", "rewards.terms=[{name: deqa}]").supply
    assert line == "reward deqa: the option url, that of an OpenAI-compatible server that has the model"


def test_a_machine_s_gpu_is_held_against_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 24 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    text = shown(planned("nano/paper/c2i"))
    assert "GPU has 24.00 GB\n" in text and "lacking" not in text
    Properties.total_memory = 10**8
    text = shown(planned("nano/paper/c2i"))
    assert "this machine's GPU has 0.10 GB, which is not enough" in text
    assert "lacking  memory: this machine's GPU has 0.10 GB\n" in text and "cannot start here yet" in text


def test_a_machine_without_a_gpu_says_so_and_what_its_memory_would_suffice_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device: {"cpu": 2 * 10**9}[device])
    text = shown(planned("nano/c2i"))
    assert "this machine has no GPU; on its CPU the run takes " in text and "of 2.00 GB\n" in text
    assert "lacking" not in text and "cannot start" not in text
    monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device: 10**8)
    text = shown(planned("nano/c2i", "policy.device=cpu"))
    assert "this machine on its CPU" not in text and "this machine has" not in text
    assert "on this machine's CPU the run takes " in text and "of 0.10 GB, which is not enough" in text
    assert "lacking  memory: " in text and "this run cannot start here yet; see lacking" in text


def test_where_rewards_fill_the_memory_the_advice_is_about_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for room, words in ((15 * 10**9, "nor with"), (25 * 10**9, "it would be with")):
        monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device, room=room: room)
        text = " ".join(shown(planned("plus/c2i_b256", "policy.device=cpu")).split())
        assert words in text and "fewer or smaller rewards (ViT-B-32 0.61 GB, " in text and "judges on a server" in text
        assert "a smaller policy" not in text
    monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device: 10**7)
    text = shown(planned("nano/c2i", "policy.device=cpu"))
    assert "so take a smaller policy" in text and "smaller rewards" not in text


def test_devices_that_are_not_here_are_lacking_and_those_that_are_none_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = shown(planned("nano/c2i", "policy.device=cuda:7"))
    assert "lacking  policy.device: device 'cuda:7' is not available; this machine has cpu\n" in text
    for key in ("device", "text_device"):
        with pytest.raises(UserError, match=rf"policy\.{key}: device 'cuad' is not available"):
            planned("nano/c2i", f"policy.{key}=cuad")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("argrpo_cli.training.plan.room_here", lambda device: 10**12)
    plain = ("nano/c2i", "policy.dtype=float32")
    text = shown(planned(*plain))
    assert "2 GPUs are visible and one process takes one" in text and "see lacking" in text
    assert "--processes 3: one GPU each, and this machine has 2\n" in shown(planned(*plain, processes=3))
    assert "lacking" not in shown(planned(*plain, processes=2))


def test_missing_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"pyiqa", "wandb", "peft"}
    monkeypatch.setattr("argrpo_cli.training.plan.find_spec", lambda name: None if name in absent else object())
    one = planned("c2i_b256", "logging.trackers=[wandb]", "policy.lora={rank: 4}")
    assert set(one.packages) == absent
    text = shown(one)
    assert "pip install pyiqa wandb peft" in text
    assert "this run cannot start here yet" in text


def test_captions_that_are_not_there_are_to_be_supplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert planned("nano/t2i", "conditions.captions=captions.txt").supply == [
        "captions.txt is missing: a file of captions, or name a data set (conditions.dataset)"
    ]
    Path("captions.txt").write_text("a dog\na cat\na dog\n")
    one = planned("nano/t2i", "conditions.captions=captions.txt")
    assert one.supply == [] and one.draws == "2 captions of captions.txt"
    streamed = planned("nano/t2i", "conditions.dataset={name: owner/name, column: text}")
    assert streamed.supply == []
    assert streamed.draws == "captions in the column 'text' of the data set owner/name (train), as a stream"


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("nano/c2i", "policy.checkpoint=nano-c3i", "no policy 'nano-c3i'"),
        ("nano/c2i", "policy.trainable=[layers.9.]", r"policy\.trainable: .*'layers\.9\.'"),
        ("nano/c2i", "conditions.classes=[unicorn]", "no class 'unicorn'"),
        ("nano/c2i", "conditions.weights={unicorn: 2}", "no class 'unicorn'"),
        ("nano/c2i", "conditions.weights={dog: 1e308, cat: 1e308}", "their sum is too large a number"),
        ("nano/c2i", "rewards.terms=[{name: nano-clop}]", "'nano-clop' is unknown"),
        ("nano/c2i", "rewards.terms=[{name: hpsv2, options: {versoin: '2.0'}}]", "no option 'versoin'.*'version'"),
        ("nano/c2i", "rewards.terms=[{name: nano-clip, weight: 0}]", "every reward has weight 0"),
        (
            "nano/c2i",
            "rewards.terms=[{name: geneval, options: {detector: nono}}]",
            "detector 'nono' is unknown; there are mask2former, nano",
        ),
        ("nano/c2i", "rewards.terms=[{name: hpsv2, options: {version: '3.0'}}]", "version '3.0' is unknown"),
        ("nano/t2i", "rewards.terms=[{name: ocr}, {name: nano-geneval}]", None),
        ("nano/c2i", "conditions.dataset={name: x}", r"conditions\.dataset 'x'"),
        ("nano/t2i", "conditions.source=classes", "draws captions"),
        ("nano/t2i", "conditions.captions=[a photo of a unicorn]", "does not know the word 'unicorn'"),
        ("nano/t2i", "conditions.captions=nanno", "no captions 'nanno'.*did you mean 'nano'"),
        ("c2i_b256", "conditions.classes=[crane]", "names the classes 134 and 517"),
        ("nano/c2i", "grpo.micro_batch_size=16", None),
    ],
)
def test_what_can_be_checked_is_checked(recipe: str, override: str, message: str | None) -> None:
    overrides = [override] + (["policy.trainable=all"] if "layers.9" not in override else [])
    if message is None:
        planned(recipe, *overrides)
        return
    with pytest.raises(UserError, match=message):
        planned(recipe, *overrides)


def test_images_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="192 images cannot be shared by 5 processes"):
        planned("nano/c2i", processes=5)
    with pytest.raises(UserError, match="32 does not divide the 48 images"):
        planned("c2i_b256", "grpo.batch_size=96", "grpo.micro_batch_size=32", processes=2)


def test_adapters_need_layers_that_exist() -> None:
    with pytest.raises(UserError, match=r"policy\.lora\.targets: no linear layer .q_proj.; there are wqkv"):
        planned("c2i_b256", "policy.lora={targets: [q_proj]}")


@pytest.mark.parametrize("name", ["nano-c2i", "nano-t2i"])
def test_an_outline_has_the_shapes_of_the_policy(name: str) -> None:
    outline, policy = outline_policy(name), load_policy(name)
    shapes = {key: value.shape for key, value in policy.model.state_dict().items()}
    assert {key: value.shape for key, value in outline.policy.model.state_dict().items()} == shapes
    sizes = [[one.numel() for one in part.tokenizer.parameters()] for part in (outline.policy, policy)]
    assert sizes[0] == sizes[1]
    assert outline.policy.class_names == policy.class_names and outline.files == ()
    assert outline.policy.card.reads == ("classes" if name == "nano-c2i" else "captions")


@pytest.mark.parametrize(
    ("name", "millions", "tokens"),
    [
        ("c2i-b-256", 111, 256),
        ("c2i-l-384", 343, 576),
        ("c2i-xl-384", 775, 576),
        ("c2i-xxl-384-cca", 1411, 576),
        ("t2i-xl-256", 778, 256),
    ],
)
def test_published_policies_have_the_sizes_of_table_1(name: str, millions: int, tokens: int) -> None:
    outline = outline_policy(name)
    assert round(outline.policy.model.num_parameters() / 1e6) == millions
    assert outline.config.block_size == tokens
    assert outline.files[0][:2] == (POLICIES[name].repo, POLICIES[name].file)
    assert outline.files[0].size == 4 * outline.policy.model.num_parameters()


def test_every_published_policy_has_an_outline() -> None:
    assert {name: outline_policy(name).policy.image_size for name in POLICIES} == {
        name: entry.image_size for name, entry in POLICIES.items()
    }


def test_policy_folders_and_files_have_outlines_too(tmp_path: Path) -> None:
    from argrpo_cli.policy.llamagen.checkpoints import to_published
    from argrpo_cli.policy.llamagen.config import published_config
    from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration

    policy = tiny_caption_policy()
    policy.save(tmp_path / "policy")
    outline = outline_policy(tmp_path / "policy")
    assert outline.policy.model.num_parameters() == policy.model.num_parameters()
    assert outline.text_bytes == 4 * policy.text_encoder.model.num_parameters()
    config: Any = published_config("B", 256)
    config.num_hidden_layers = 1
    torch.save({"model": to_published(LlamaGenForImageGeneration(config))}, tmp_path / "c2i_B_256.pt")
    outline = outline_policy(tmp_path / "c2i_B_256.pt")
    assert outline.config.num_hidden_layers == 1
    assert [file.file for file in outline.files] == ["vq_ds16_c2i.pt"]


def test_a_number_format_is_settled_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("nano/c2i", ["policy.dtype=auto"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert settle_dtype(recipe, "cpu").policy.dtype == "float32"  # where bfloat16 would be slower
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert settle_dtype(recipe, "cpu").policy.dtype == "bfloat16"
    assert settle_dtype(load_recipe("nano/paper/c2i"), "cpu").policy.dtype == "float32"  # said, and kept
