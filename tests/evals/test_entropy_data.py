"""Entropy along real pictures: how folders are read, pictures cropped, codes kept, and what comes out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from argrpo_cli import image_codes
from argrpo_cli.cli.app import run
from argrpo_cli.evals import entropy as e
from argrpo_cli.image_labels import balanced_order, conditions_of, open_labelled, some_of
from argrpo_cli.images import ImageSet, Item
from argrpo_cli.kept import in_batches
from argrpo_cli.policy import Policy
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.shapes import Sampling, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl, write_jsonl
from argrpo_cli.system.processes import Team
from tests.captioned import save_captioned_policy
from tests.evals.entropies import along, entropy_of, measure
from tests.training.tiny import IMAGE_SIZE, TOKENS, tiny_policy

ALONE = Team(0, 1, "cpu")
CLASSES = ("ant", "bee", "cat", "dog")


def picture(path: Path, seed: int, width: int = 11, height: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")  # lossless, whatever the name says; ImageNet has one such, too
    return path


def class_folders(root: Path, names=CLASSES, each: int = 3) -> Path:
    for index, name in enumerate(names):
        for number in range(each):
            picture(root / name / f"{name}_{number}.JPEG", index * 10 + number)
    return root


def flat(root: Path, count: int = 3) -> Path:
    for number in range(1, count + 1):
        picture(root / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    return root


def thousand_classes() -> Policy:
    """As far as labels go, a policy of ImageNet."""
    policy = tiny_policy()
    policy.class_names = [f"class {index}" for index in range(1000)]
    return policy


def class_ids(folder: Path, policy: Policy) -> list[int | None]:
    return [one.class_id for one in conditions_of(open_labelled(folder), policy)]


def codes_of(folder: Path, policy: Policy, cache: Path, team: Team = ALONE) -> tuple[torch.Tensor, int]:
    """The codes of a folder's pictures, and how many of them were encoded for that."""
    encoded, tokenise = [], policy.tokenise
    policy.tokenise = lambda pixels: encoded.append(len(pixels)) or tokenise(pixels)
    try:
        images = open_labelled(folder)
        store = image_codes.tokenise(images, policy, cache, team)
        return store.column(in_batches(images.items, image_codes.CHUNK), image_codes.CODES).long(), sum(encoded)
    finally:
        policy.tokenise = tokenise


def files_of(images: ImageSet) -> list[str]:
    return [item.file for item in images.items]


# What a folder holds


@pytest.mark.parametrize("names", [CLASSES, ("0", "1", "2", "3")])
def test_class_folders_are_named_by_class_or_by_id(tmp_path, names):
    policy = tiny_policy()
    images = open_labelled(class_folders(tmp_path, names, each=2))
    expected = [f"{name}/{name}_{i}.JPEG" for name, i in ((names[0], 0), (names[0], 1), (names[1], 0))]
    assert files_of(images)[:3] == expected
    found = conditions_of(images, policy)
    assert [one.class_id for one in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found[2].prompt == class_prompt("bee")


def test_wordnet_ids_are_numbered_by_their_place_among_the_thousand_even_where_some_are_missing(tmp_path):
    class_folders(tmp_path, ("n01443537", "n15075141"), each=1)
    assert class_ids(tmp_path, thousand_classes()) == [1, 999]
    class_folders(tmp_path / "other", ("n02099601",), each=1)
    assert class_ids(tmp_path / "other", thousand_classes()) == [207], "golden retriever, as everywhere"
    class_folders(tmp_path / "none", ("n00000001",), each=1)
    with pytest.raises(UserError, match="n00000001 is none of ImageNet's 1000 classes"):
        class_ids(tmp_path / "none", thousand_classes())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000003,n15075141 1 2 3 4 n15075141 5 6\n"
         "ILSVRC2012_val_00000001,n01440764 85 1 499 272\nILSVRC2012_val_00000002,n01443537 1 1 9 9\n"),
        ("val_map.txt", "ILSVRC2012_val_00000001.JPEG n01440764\nILSVRC2012_val_00000002.JPEG n01443537\n"
         "ILSVRC2012_val_00000003.JPEG n15075141\n"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 0\nILSVRC2012_val_00000002.JPEG 1\n"
         "ILSVRC2012_val_00000003.JPEG 999\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("above", [0, 4])
def test_a_flat_folder_takes_its_labels_from_a_list_in_it_or_above(tmp_path, name, text, above):
    folder = tmp_path.joinpath(*["ILSVRC", "Data", "CLS-LOC", "val"][:above])
    flat(folder)
    (tmp_path / name).write_text(text)
    assert class_ids(folder, thousand_classes()) == [0, 1, 999]


def test_the_devkits_own_order_is_translated_by_its_table(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    flat(tmp_path / "val")
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(1, "n15075141", 0), (2, "n01440764", 0), (3, "n01443537", 0), (1001, "n00001740", 3)]
    scipy_io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n")
    assert class_ids(tmp_path / "val", thousand_classes()) == [1, 999, 0]
    (data / "meta.mat").unlink()
    with pytest.raises(UserError, match=r"has the devkit's own class ids; put the devkit's meta\.mat beside it"):
        open_labelled(tmp_path / "val")


def test_samples_of_a_policy_are_read_by_their_metadata(tmp_path):
    for name in ("b.png", "a.png", "grid.png"):
        picture(tmp_path / name, 1)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file": "b.png", "class_id": 3}, {"file": "a.png", "class_id": 1}])
    images = open_labelled(tmp_path)
    assert files_of(images) == ["a.png", "b.png"] and [item.extra["label"] for item in images.items] == [1, 3]


def test_a_part_has_every_class_equally_often_and_grows_by_adding():
    labels = tuple(label for label in "aaaaabbbbbccccc")
    order = balanced_order(labels)
    assert sorted(order) == list(range(15)) and order == balanced_order(labels) != sorted(order)
    for n in range(1, 16):
        counts = [sum(labels[i] == label for i in order[:n]) for label in "abc"]
        assert max(counts) - min(counts) <= 1
    items = [Item(f"{index:02d}", "", lambda: None, extra={"label": label}) for index, label in enumerate(labels)]
    images = ImageSet(Path("x"), items, "class folders")
    assert files_of(some_of(images, 9))[:6] == files_of(some_of(images, 6))
    with pytest.raises(UserError, match="--n 16: x holds 15 pictures"):
        some_of(images, 16)


# Cropping


def test_the_centre_crop_of_a_wide_picture_is_its_middle():
    pixels = np.zeros((4, 9, 3), np.uint8)
    pixels[:, :, 0] = np.arange(9) * 10
    found = np.asarray(image_codes.centre_crop(Image.fromarray(pixels), 4))
    assert np.array_equal(found, pixels[:, 2:6]), "of 5 columns too many, 2 on the left and 3 on the right"


def test_large_pictures_are_halved_by_the_mean_of_four_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    expected = pixels.reshape(4, 2, 4, 2, 3).mean((1, 3))
    found = np.asarray(image_codes.centre_crop(Image.fromarray(pixels), 4))
    assert np.abs(found - expected).max() <= 1, "rounded along each axis"
    assert np.abs(found - pixels[::2, ::2].astype(int)).max() > 50, "not the pixels picked out"


def test_what_is_less_than_twice_as_large_is_scaled_at_once_and_bicubic():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (7, 10, 3)).astype(np.uint8))
    scaled = np.asarray(image.resize((round(10 * 4 / 7), 4), Image.Resampling.BICUBIC))  # 6 x 4
    assert np.array_equal(np.asarray(image_codes.centre_crop(image, 4)), scaled[:, 1:5])
    assert image_codes.centre_crop(Image.new("RGB", (3, 2)), 8).size == (8, 8), "a small one is enlarged"


def test_pictures_become_rgb_and_keep_their_stored_orientation(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    grey = image_codes.read_cropped(tmp_path / "grey.png", 8)
    assert np.array_equal(grey, np.broadcast_to(np.arange(64).reshape(1, 8, 8), (3, 8, 8)))
    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # by 180 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert image_codes.read_cropped(tmp_path / "turned.png", 8)[0, 0, 0] == 255, "as LlamaGen's loader has it"


# Codes


def test_codes_are_those_of_direct_encoding_and_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "CHUNK", 5)
    policy, data = tiny_policy(), class_folders(tmp_path / "data")
    tokens, encoded = codes_of(data, policy, tmp_path / "cache")
    assert encoded == 12
    pixels = np.stack([image_codes.read_cropped(data / name, IMAGE_SIZE) for name in files_of(open_labelled(data))])
    direct = policy.tokenizer.encode(from_uint8(torch.from_numpy(pixels)))
    assert torch.equal(tokens, direct) and tokens.unique().numel() > 3
    assert load_file(next((tmp_path / "cache").rglob("*.safetensors")))["codes"].dtype == torch.int16
    again, encoded = codes_of(data, policy, tmp_path / "cache")
    assert encoded == 0 and torch.equal(again, tokens)


def test_a_changed_picture_and_a_damaged_file_are_encoded_anew_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "CHUNK", 5)
    policy, data = tiny_policy(), class_folders(tmp_path / "data")
    before, _ = codes_of(data, policy, tmp_path / "cache")
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    changed = picture(data / files_of(open_labelled(data))[6], seed=99)
    os.utime(changed, ns=(1, 1))
    after, encoded = codes_of(data, policy, tmp_path / "cache")
    assert encoded == 5, "the batch that holds it"
    assert not torch.equal(after[6], before[6]) and torch.equal(after[7:], before[7:])
    for path in kept:
        path.write_bytes(b"half a fi")
    again, encoded = codes_of(data, policy, tmp_path / "cache")
    assert encoded == 7 and torch.equal(again, after), "the two batches that had not changed"


def test_interrupted_tokenising_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "CHUNK", 4)
    policy, data, calls = tiny_policy(), class_folders(tmp_path / "data"), []
    tokenise = policy.tokenise

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tokenise(pixels)

    policy.tokenise = interrupted
    with pytest.raises(KeyboardInterrupt):
        image_codes.tokenise(open_labelled(data), policy, tmp_path / "cache", ALONE)
    assert sum(1 for path in (tmp_path / "cache").rglob("*") if path.is_file()) == 1, "no half file"
    policy.tokenise = tokenise
    assert codes_of(data, policy, tmp_path / "cache")[1] == 8


def test_a_picture_that_changes_while_it_is_read_is_not_taken_for_another(tmp_path, monkeypatch):
    policy, data = tiny_policy(), class_folders(tmp_path / "data")
    images = open_labelled(data)
    picture(data / images.items[3].file, seed=99, width=14)
    with pytest.raises(UserError, match=r"pictures in .*data changed while they were read"):
        image_codes.tokenise(images, policy, tmp_path / "cache", ALONE)
    assert not (tmp_path / "cache").exists()


# Entropy


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> tuple[str, str]:
    """A tiny policy and a surer one."""
    folder = tmp_path_factory.mktemp("policies")
    base = tiny_policy()
    base.save(folder / "base")
    with torch.no_grad():
        base.model.lm_head.weight.mul_(2)
    base.save(folder / "surer")
    return str(folder / "base"), str(folder / "surer")


def test_entropies_along_pictures_equal_the_definition_paired_by_picture(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "CHUNK", 5)
    data = class_folders(tmp_path / "data")
    subjects = [e.NamedPolicy(path, Path(path).name) for path in policies]
    question = along(data, 9)
    sampling = Sampling(cfg_scale=3.0, temperature=0.8)
    rows = measure(subjects, question, sampling, 2, cache=tmp_path / "cache")
    files = files_of(some_of(open_labelled(data), 9))
    means = []
    for path in policies:
        policy = e.load_policy(path)
        pixels = np.stack([image_codes.read_cropped(data / name, IMAGE_SIZE) for name in files])
        tokens = policy.tokenizer.encode(from_uint8(torch.from_numpy(pixels)))
        asked = policy.conditions([name.split("/")[0] for name in files])
        means.append([entropy_of(policy, tokens, asked, scale, 0.8) for scale in (None, 3.0)])
    for place, row in enumerate(rows):
        own = means[place // 2][place % 2]
        assert row["images"] == 9 and row["mean"] == pytest.approx(own.mean().item(), abs=1e-5)
        assert row["by_position"] == pytest.approx(own.mean(0).tolist(), abs=1e-5)
        assert row["by_position_error"] == pytest.approx((own.std(0) / 3).tolist(), abs=1e-5)
    paired = means[1][1].mean(1) - means[0][1].mean(1)
    assert rows[3]["change"] == pytest.approx(paired.mean().item(), abs=1e-5) and rows[3]["change"] < 0
    assert rows[3]["change_error"] == pytest.approx(paired.std().item() / 3, abs=1e-5)
    assert rows[3]["against"] == "base" and rows[0]["labels"] == "class folders" and len(rows[0]["weights"]) == 16


def test_a_policy_of_another_resolution_walks_along_codes_of_its_own_of_the_same_pictures(policies, tmp_path):
    large = tiny_policy()
    config = large.model.config
    config.block_size, large.image_size = 4 * TOKENS, 2 * IMAGE_SIZE
    large.model = type(large.model)(config).eval()
    large.save(tmp_path / "large")
    subjects = [e.NamedPolicy(path, Path(path).name) for path in (policies[0], str(tmp_path / "large"))]
    question = along(class_folders(tmp_path / "data"))
    rows = measure(subjects, question, cache=tmp_path / "cache")
    assert [len(row["by_position"]) for row in rows] == [TOKENS, TOKENS, 4 * TOKENS, 4 * TOKENS]
    assert rows[2]["change"] == pytest.approx(rows[2]["mean"] - rows[0]["mean"], abs=1e-9)
    assert rows[0]["family"] != rows[2]["family"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_measuring_goes_on_and_a_measured_policy_costs_nothing(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "CHUNK", 4)
    subjects, question = [e.NamedPolicy(policies[0], "base")], along(class_folders(tmp_path / "data"))
    calls, interrupt_at, score_tokens = [], [5], e.score_tokens

    def counted(*arguments):
        calls.append(1)
        if len(calls) == interrupt_at[0]:
            raise KeyboardInterrupt
        return score_tokens(*arguments)

    monkeypatch.setattr(e, "score_tokens", counted)
    places = {"folder": tmp_path / "journal", "cache": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        measure(subjects, question, **places)
    assert len(list((tmp_path / "journal").iterdir())) == 2, "of three chunks, each with two modes"
    interrupt_at[0], calls[:] = 0, []
    rows = measure(subjects, question, **places)
    assert len(calls) == 2
    assert measure(subjects, question, **places) == rows and len(calls) == 2
    assert measure(subjects, question, cache=tmp_path / "cache") == rows
    measure(subjects, question, Sampling(temperature=0.5), **places)
    assert len(calls) == 2 + 6 + 6, "another temperature is measured anew"


def test_a_policy_that_is_not_there_is_refused_before_the_others_are_measured(policies, monkeypatch, capsys):
    monkeypatch.setattr(e, "load_policy", lambda *arguments: pytest.fail("opened a policy"))
    assert run(["entropy", "--policy", policies[0], "--policy", "nowhere"]) == 2
    assert "no policy 'nowhere'" in capsys.readouterr().err


def test_the_command_as_typed(policies, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "val")
    asked = ["entropy", "--split", "val", "--data", "val", "--cache", "codes", "--device", "cpu"]
    asked += [word for path in policies for word in ("--policy", path)]
    assert run([*asked, "--n", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 images, split val of val" in out and "pictures in entropy/curve.png and entropy/bars.png" in out
    rows = read_jsonl(tmp_path / "entropy" / "entropy.jsonl")
    assert len(rows) == 4 and rows[0]["data"] == "val" and torch.__version__.startswith(rows[0]["versions"]["torch"])
    assert json.dumps(rows)
    for name in ("curve.png", "bars.png"):
        assert Image.open(tmp_path / "entropy" / name).size[0] > 800
    capsys.readouterr()
    assert run(["entropy", "--policy", policies[0], "--out", "new"]) == 2
    assert "needs --data: a folder of ImageNet's validation pictures" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no folder nowhere"),
        (["--data", "file.txt"], "file.txt is a file, not a folder"),
        (["--data", "empty"], "no images in empty"),
        (["--data", "above"], "above holds no pictures, but a folder val; give --data above/val"),
        (
            ["--data", "unlabelled"],
            "deepest holds pictures without class folders or labels; put one of metadata.jsonl,",
        ),
        (["--data", "short"], "short/val.txt has no label for ILSVRC2012_val_00000002.JPEG"),
        (["--data", "odd"], "odd/val.txt, line 1: expected a file and a WordNet id or class id, got 'what is this'"),
        (["--data", "named"], "named, label 'eel' by class folders: no class 'eel' among this policy's 4 classes"),
        (["--data", "wnids"], "wnids holds ImageNet's n01440764, and this policy draws 4 classes"),
        (["--data", "high"], "label 4 by high/metadata.jsonl: no class 4: this policy has the ids 0 to 3"),
        (["--data", "untold"], "untold/metadata.jsonl has no label for a.png"),
        (["--data", "above/val", "--n", "1"], "--n 1: an interval needs 2"),
        (["--data", "above/val", "--n", "13"], "--n 13: above/val holds 12 pictures"),
        (["--data", "damaged"], "cannot read the image damaged/ant/b.jpeg: it is not an image, or a damaged one"),
        (["--data", "above/val", "--prompts", "geneval"], "give --data or --prompts, not both"),
        (["--cache", "x"], "--cache keeps tokens of pictures; give --data with it"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_no_results(
    policies, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    class_folders(tmp_path / "above" / "val")
    flat(tmp_path / "unlabelled" / "deep" / "deeper" / "deepest")
    for name, text in (("short", "ILSVRC2012_val_00000001.JPEG 0\n"), ("odd", "what is this\n")):
        flat(tmp_path / name, 2)
        (tmp_path / name / "val.txt").write_text(text)
    class_folders(tmp_path / "named", ("ant", "eel"))
    class_folders(tmp_path / "wnids", ("n01440764", "n01443537"))
    for name, row in (("high", {"file": "a.png", "class_id": 4}), ("untold", {"file": "a.png"})):
        picture(tmp_path / name / "a.png", 1)
        picture(tmp_path / name / "b.png", 2)
        write_jsonl(tmp_path / name / "metadata.jsonl", [row, row | {"file": "b.png"}])
    picture(tmp_path / "damaged" / "ant" / "a.jpeg", 1)
    (tmp_path / "damaged" / "ant" / "b.jpeg").write_bytes(b"no picture")
    arguments = [("unlabelled/deep/deeper/deepest" if one == "unlabelled" else one) for one in arguments]
    assert run(["entropy", *arguments, "--policy", policies[0]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "entropy").exists()


def test_a_policy_that_reads_captions_is_sent_to_prompts(tmp_path):
    captioned = str(save_captioned_policy(tmp_path / "captioned"))
    question = along(class_folders(tmp_path / "data"))
    with pytest.raises(UserError, match="holds pictures of classes, and this policy reads captions; use --prompts"):
        measure([e.NamedPolicy(captioned, "t")], question, cache=tmp_path / "cache")
