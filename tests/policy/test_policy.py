"""Opening, using and saving policies by name and path, with a miniature policy in place of a trained one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.classes import class_names
from argrpo_cli.policy.llamagen.checkpoints import from_published, to_published
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, VQConfig
from argrpo_cli.policy.llamagen.policy import LlamaGen
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, VQModel
from argrpo_cli.policy.llamagen.vq import to_uint8
from argrpo_cli.policy.open import choose_trainable
from argrpo_cli.rewards import load_rewards
from argrpo_cli.shapes import Condition, Sampling, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS
from tests.formula import formula_weights
from tests.training.tiny import sample, tiny_caption_policy

CLASSES = ["dog", "umbrella", "hot dog"]


def miniature() -> LlamaGen:
    """16 x 16 pixels, 4 x 4 tokens of 32 codes, 3 classes; formula weights, so that it draws of everything."""
    torch.manual_seed(0)
    tokenizer = VQModel(
        VQConfig(
            codebook_size=32,
            ch=32,
            encoder_ch_mult=[1, 1],
            decoder_ch_mult=[1, 1],
            num_res_blocks=1,
            z_channels=32,
            patch_size=2,
        )
    )
    config = LlamaGenConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        block_size=16,
        num_classes=len(CLASSES),
    )
    shapes = {key: value.shape for key, value in to_published(LlamaGenForImageGeneration(config)).items()}
    model = from_published(formula_weights(shapes), config)
    return LlamaGen(model, tokenizer.eval(), None, list(CLASSES), 16, "miniature")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A policy folder."""
    folder = tmp_path_factory.mktemp("policies") / "miniature"
    miniature().save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A policy folder to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_synonym_names_its_class_and_an_ambiguous_one_is_asked_for_the_id():
    policy = replace(miniature(), class_names=["tench, Tinca tinca", "crane", "boom, crane"])
    assert [one.class_id for one in policy.conditions(["Tinca tinca", "boom", "tench, Tinca tinca"])] == [0, 2, 0]
    assert policy.conditions(["crane"])[0].class_id == 1, "the whole name goes first"
    for names in (["a, crane", "b", "c, crane"], ["crane", "b", "crane"]):
        with pytest.raises(UserError, match="'crane' names the classes 0 and 2; give the id"):
            replace(policy, class_names=names).conditions(["crane"])


def test_imagenet_names_are_the_published_synonyms():
    names = class_names(1000)
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"
    assert names[134] == "crane" and names[517] == "crane"


# --- use ---


def test_saving_and_loading_print_nothing(saved, tmp_path, capfd):
    load_policy(saved).save(tmp_path / "again")
    assert capfd.readouterr() == ("", "")


def test_save_and_load_give_the_same_images(saved):
    before, after = miniature(), load_policy(saved)
    conditions = before.conditions(CLASSES)
    tokens = sample(before, conditions, [1, 2, 3])
    assert torch.equal(sample(after, conditions, [1, 2, 3]), tokens)
    assert torch.equal(after.decode(tokens), before.decode(tokens))
    assert (after.class_names, after.image_size, after.base) == (CLASSES, 16, "miniature")
    assert not after.model.training and not after.tokenizer.training


def test_how_it_is_meant_to_be_drawn_goes_on_to_its_descendants(saved, tmp_path):
    assert load_policy(saved).sampling == {} and "sampling" not in json.loads((saved / "policy.json").read_text())
    policy = load_policy(saved)
    policy.sampling = {"cfg_scale": 1.0}
    policy.save(tmp_path / "child")
    load_policy(tmp_path / "child").save(tmp_path / "grandchild")
    assert load_policy(tmp_path / "grandchild").sampling == {"cfg_scale": 1.0}


def test_saved_files_carry_no_path_and_no_leftovers(saved):
    names = {file.name for file in saved.iterdir()}
    assert {"config.json", "model.safetensors", "policy.json", "tokenizer"} <= names
    assert not [name for name in names if name.startswith(".")]
    for file in saved.rglob("*.json"):
        assert str(saved.parent) not in file.read_text()


def test_saving_again_keeps_the_other_files_of_the_folder(copied):
    (copied / "optimizer.pt").write_bytes(b"state")
    policy = load_policy(copied)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(0.5)
    policy.save(copied)
    assert (copied / "optimizer.pt").read_bytes() == b"state"
    assert torch.equal(load_policy(copied).model.model.norm.weight, torch.full((32,), 0.5))


def test_the_models_config_knows_its_folder(saved):
    """TRL loads the reference model from there."""
    assert load_policy(saved).model.config._name_or_path == str(saved)


def test_conditions_by_name_and_id():
    policy = miniature()
    assert policy.conditions(["umbrella", 0, "2", "hot dog"]) == [
        Condition("a photo of an umbrella", 1),
        Condition("a photo of a dog", 0),
        Condition("a photo of a hot dog", 2),
        Condition("a photo of a hot dog", 2),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("umbrela", "no class 'umbrela' among this policy's 3 classes; did you mean 'umbrella'?"),
        ("zebra", "the classes are dog, umbrella, hot dog"),
        (3, "no class 3: this policy has the ids 0 to 2"),
        ("17", "no class 17: this policy has the ids 0 to 2"),
        (-1, "no class -1"),
    ],
)
def test_an_unknown_class_is_named(given, message):
    with pytest.raises(UserError) as caught:
        miniature().conditions(["dog", given])
    assert message in str(caught.value)


def test_prompts_take_the_right_article():
    assert [class_prompt(name) for name in ("apple", "Orange", "banana", "tv")] == [
        "a photo of an apple",
        "a photo of an Orange",
        "a photo of a banana",
        "a photo of a tv",
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_sampling_does_not_depend_on_the_batch_size(batch_size):
    policy = miniature()
    conditions, seeds = policy.conditions([0, 1, 2, 1, 0]), [4, 5, 6, 7, 8]
    encoded = policy.encode(conditions)
    tokens = [
        policy.sample(encoded[start : start + batch_size], Sampling(), seeds[start : start + batch_size]).tokens
        for start in range(0, 5, batch_size)
    ]
    assert torch.cat(tokens).shape == (5, 16) and tokens[0].dtype == torch.int64
    assert torch.equal(torch.cat(tokens), sample(policy, conditions, seeds))


def test_sampling_settings_reach_the_sampler():
    policy = miniature()
    conditions, seeds = policy.conditions([0, 1, 2]), [1, 2, 3]
    default = sample(policy, conditions, seeds)
    assert torch.equal(default, sample(policy, conditions, seeds, cfg_scale=2.0, temperature=1.0))
    for change in ({"cfg_scale": 1.0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"cfg_interval": 2}):
        assert not torch.equal(sample(policy, conditions, seeds, **change), default), change


def test_decoding_to_another_size_is_llamagens():
    """Bicubic without antialiasing on the decoder's numbers, before they are bytes."""
    policy = miniature()
    tokens = sample(policy, policy.conditions([0, 1]), [1, 2])
    small = policy.decode(tokens, size=policy.image_size // 2)
    with torch.no_grad():
        decoded = policy.tokenizer.decode_tokens(tokens)
    expected = torch.nn.functional.interpolate(decoded, small.shape[-2:], mode="bicubic", antialias=False)
    expected = (127.5 * expected + 127.5).clamp(0, 255).round()
    assert (small.float() - expected).abs().max() <= 1
    assert torch.equal(policy.decode(tokens, size=policy.image_size), policy.decode(tokens))


def test_a_condition_of_words_alone_is_no_class():
    with pytest.raises(UserError, match="'a photo of love' has no class id"):
        miniature().encode([Condition("a photo of love")])


def test_parts_are_what_may_be_trained_and_adapted():
    policy = miniature()
    assert policy.parts()["lora"] == ["wqkv", "wo", "w1", "w3", "w2"]
    choose_trainable(policy, ["attention.wo", "lm_head"])
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in policy.parts()["trainable"] if "attention.wo" in name or "lm_head" in name}
    with pytest.raises(UserError, match=r"no parameter's name contains 'lm_haed'; names are like model\.layers\.0"):
        choose_trainable(policy, "lm_haed")


def test_an_unknown_family_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "other")
    card = json.loads((saved / "policy.json").read_text())
    (tmp_path / "other" / "policy.json").write_text(json.dumps({**card, "family": "llamagem"}))
    with pytest.raises(UserError, match=r"policy\.json: no family of policies 'llamagem'; did you mean 'llamagen'"):
        load_policy(tmp_path / "other")


def test_decoding_is_the_tokenizers_rounded_once_in_chunks(monkeypatch):
    policy = miniature()
    tokens = sample(policy, policy.conditions([0, 1, 2, 0, 1]), range(5))
    monkeypatch.setattr("argrpo_cli.policy.llamagen.vq.DECODE_PIXELS", 2 * 16 * 16)
    images = policy.decode(tokens)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    with torch.no_grad():
        expected = to_uint8(policy.tokenizer.decode_tokens(tokens))
    assert (images.int() - expected.int()).abs().max() <= 1
    assert torch.equal(images[:2], policy.decode(tokens[:2]))
    assert images.float().std() > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_the_models_and_not_the_tokenizers(saved, dtype):
    policy = load_policy(saved, dtype=dtype)
    assert policy.model.dtype == getattr(torch, dtype)
    assert {one.dtype for one in policy.tokenizer.parameters()} == {torch.float32}
    assert policy.decode(sample(policy, policy.conditions([0]), [1])).shape == (1, 3, 16, 16)


def test_half_precision_weights_are_opened_as_float32(copied):
    policy = load_policy(copied)
    policy.model.to(torch.float16).save_pretrained(copied)
    assert load_policy(copied).model.dtype == torch.float32


# --- finding ---


def run_directory(saved: Path, root: Path, steps=(20, 100, 40), final=True) -> Path:
    for step in steps:
        shutil.copytree(saved, root / "checkpoints" / f"step_{step:06d}")
        edit_json(root / "checkpoints" / f"step_{step:06d}" / "policy.json", base=f"step {step}")
    if final:
        shutil.copytree(saved, root / "policy")
        edit_json(root / "policy" / "policy.json", base="final")
    return root


@pytest.mark.parametrize("steps", [(20, 100, 40), (7, 5, 60), (300, 200, 10), (2, 1000000, 999999)])
def test_a_run_directory_means_its_newest_checkpoint(saved, tmp_path, steps):
    run = run_directory(saved, tmp_path / "run", steps)
    assert load_policy(run).base == f"step {max(steps)}"
    assert load_policy(run / "checkpoints" / f"step_{steps[0]:06d}").base == f"step {steps[0]}"
    assert load_policy(run / "policy").base == "final"


def test_an_unfinished_checkpoint_is_passed_over(saved, tmp_path):
    run = run_directory(saved, tmp_path / "run")
    (run / "checkpoints" / "step_000100" / "policy.json").unlink()
    (run / "checkpoints" / "step_000100.partial").mkdir()
    assert load_policy(run).base == "step 40"


def test_a_run_directory_without_checkpoints_means_its_final_policy(saved, tmp_path):
    assert load_policy(run_directory(saved, tmp_path / "run", steps=())).base == "final"


def test_an_unknown_name_lists_the_bundled_ones(tmp_path):
    with pytest.raises(UserError, match=r"no policy 'nano-c2j'.*; did you mean 'nano-c2i'\? \(`argrpo list policies`"):
        load_policy("nano-c2j")
    with pytest.raises(UserError, match=r"is no policy: it has no policy\.json"):
        load_policy(tmp_path)


# --- what is wrong with a folder is said in one line ---


def drop_card(folder):
    (folder / "policy.json").write_text("{")


def drop_classes(folder):
    edit_json(folder / "policy.json", classes=None)


def another_model(folder):
    edit_json(folder / "config.json", model_type="llama")


def bad_geometry(folder):
    edit_json(folder / "config.json", block_size=15)


def wider_model(folder):
    edit_json(folder / "config.json", intermediate_size=512)


def fewer_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)


def more_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def no_config(folder):
    (folder / "config.json").unlink()


def wrong_classes(folder):
    edit_json(folder / "policy.json", classes=["dog"])


def wrong_size(folder):
    edit_json(folder / "policy.json", image_size=32)


def wrong_codebook(folder):
    tokenizer = VQModel.from_pretrained(folder / "tokenizer")
    tokenizer.config.codebook_size = 16
    VQModel(tokenizer.config).save_pretrained(folder / "tokenizer")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_card, "policy.json: not JSON"),
        (drop_classes, "policy.json is damaged: classes is None"),
        (another_model, "holds a 'llama' model; expected 'llamagen'"),
        (bad_geometry, "block_size is 15"),
        (wider_model, "w1.weight is [256, 32], config.json says [512, 32]"),
        (fewer_layers, "unexpected keys"),
        (more_layers, "missing keys"),
        (no_weights, "cannot load"),
        (cut_weights, "cannot load"),
        (no_tokenizer, "tokenizer"),
        (no_config, "config.json"),
        (wrong_classes, "1 class names, but the model's num_classes is 3"),
        (wrong_size, "64 tokens at this image size, but the model's block_size is 16"),
        (wrong_codebook, "16 codes in the tokenizer, but the model's vocab_size is 32"),
    ],
)
def test_a_spoiled_folder_is_explained_in_one_line(copied, spoil, message, capfd):
    spoil(copied)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        load_policy(copied)
    assert capfd.readouterr() == ("", "")
    assert message in str(caught.value)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_or_device_is_named(saved):
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        load_policy(saved, dtype="int8")
    with pytest.raises(UserError, match="device"):
        load_policy(saved, device="cuda:99")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        miniature().save(tmp_path / "file" / "policy")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, argrpo_cli.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the bundled policy ---


@pytest.mark.skipif(not (WEIGHTS / "nano-c2i").is_dir(), reason="the bundled weights are not built yet")
def test_the_bundled_policy_opens_and_draws():
    policy = load_policy("nano-c2i")
    assert policy.tokenizer_name == "nano-vq"
    conditions = policy.conditions(policy.class_names[:2])
    images = policy.decode(sample(policy, conditions, [0, 0]))
    assert images.shape == (2, 3, policy.image_size, policy.image_size)
    assert not torch.equal(images[0], images[1])
    assert Path(policy.model.config._name_or_path).is_dir()


@pytest.mark.parametrize("name", ["nano-t2i", "nano-janus"])
def test_the_bundled_caption_policies_draw_what_they_are_asked(name):
    policy, rewards = load_policy(name), load_rewards(["nano-geneval"])
    objects = ["a red car", "two clocks", "three apples", "a giraffe"]
    conditions = policy.conditions([f"a photo of {one}" for one in objects * 8])
    images = policy.decode(sample(policy, conditions, range(32)))
    own = rewards.score(images, conditions)["nano-geneval"]
    other = rewards.score(images, conditions[1:] + conditions[:1])["nano-geneval"]
    assert own.mean() > 0.8 and other.mean() < 0.3, "the share of what is asked for that is there"


def test_a_bundled_policy_without_weights_says_how_to_train_them(monkeypatch, tmp_path):
    monkeypatch.setattr("argrpo_cli.policy.folder.WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"the weights of nano-t2i are not in this version; `.*--only nano-t2i"):
        load_policy("nano-t2i")


def test_the_fingerprint_knows_what_no_weight_shows(tmp_path):
    """Where a text encoder's padding stands, for instance: the same weights draw other pictures."""
    policy = tiny_caption_policy()
    first = policy.fingerprint()
    policy.text_encoder.right_padded = True
    second = policy.fingerprint()
    policy.model.config.rope_theta = 500.0
    assert len({first, second, policy.fingerprint()}) == 3
    assert first == tiny_caption_policy().fingerprint()
