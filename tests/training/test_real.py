"""Real images: folders, shards of webdatasets, codes and scenes, with what each shows, tokenised once and kept."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.image_codes import read_cropped
from argrpo_cli.nano import scenes
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.recipe.real import RealSection
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_jsonl
from argrpo_cli.system.processes import ALONE
from argrpo_cli.training.real import Real, open_images
from tests import emoji
from tests.training.reals import save_codes
from tests.training.tiny import CODES, IMAGE_SIZE, TOKENS, tiny_caption_policy, tiny_policy

no_font = emoji.no_font
WORDS = ("a dog", "a red cat", "a blue dog", "a cat")


def png(seed: int, width: int = 11) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def tar_of(path: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def classes() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def captions() -> Policy:
    return tiny_caption_policy()


def opened(policy: Policy, path: Path | str, cache: Path | None = None, **keys: object) -> Real:
    real = open_images(RealSection(path=str(path), **keys), policy)
    if cache is not None:
        real.tokenise(ALONE, cache)
    return real


def prompts(real: Real) -> list[str]:
    return [one.prompt for one in real.conditions]


# --- pictures of folders


def test_class_folders_are_taken_of_all_classes_alike_and_tokenised_as_cropped(classes: Policy, tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in ("ant", "bee", "dog") for number in range(4)]
    folder = folder_of(tmp_path / "data", {name: png(seed) for seed, name in enumerate(names)})
    real = opened(classes, folder, tmp_path / "cache", limit=6)
    assert sorted(one.class_id for one in real.conditions) == [0, 0, 1, 1, 3, 3]
    rows = [4, 1]
    files = [folder / real.images.items[row].file for row in rows]
    pixels = torch.from_numpy(np.stack([read_cropped(file, IMAGE_SIZE) for file in files]))
    assert torch.equal(real.pixels(rows), pixels) and real.codes.dtype == torch.int16
    assert torch.equal(real.tokens(rows), classes.tokenise(pixels))
    again = opened(classes, folder, limit=6)
    encode, classes.tokenise = classes.tokenise, lambda images: pytest.fail("they are kept")
    try:
        again.tokenise(ALONE, tmp_path / "cache")
    finally:
        classes.tokenise = encode
    assert again.digest == real.digest != opened(classes, folder, tmp_path / "cache", limit=7).digest


def test_captions_are_read_from_a_file_from_metadata_or_from_beside(captions: Policy, tmp_path: Path) -> None:
    pictures = {f"{number}.png": png(number) for number in range(4)}
    beside = folder_of(tmp_path / "beside", pictures | {f"{n}.txt": f"{text}\n" for n, text in enumerate(WORDS)})
    assert prompts(opened(captions, beside)) == list(WORDS)
    listed = folder_of(tmp_path / "listed", pictures)
    rows = [{"file": f"{number}.png", "prompt": text} for number, text in enumerate(WORDS)]
    write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    assert prompts(opened(captions, listed, captions=str(tmp_path / "rows.jsonl"), limit=3)) == list(WORDS[:3])
    write_jsonl(listed / "metadata.jsonl", rows)
    real = opened(captions, listed, tmp_path / "cache")
    assert prompts(real) == list(WORDS) and real.tokens([0]).shape == (1, TOKENS)
    with pytest.raises(UserError, match=r"real\.captions: .*metadata\.jsonl says what the pictures show"):
        opened(captions, listed, captions=str(tmp_path / "rows.jsonl"))


def test_what_is_missing_is_one_line(classes: Policy, captions: Policy, tmp_path: Path) -> None:
    silent = folder_of(tmp_path / "silent", {f"{n}.png": png(n) for n in range(2)} | {"0.txt": "a dog", "1.txt": " \n"})
    foreign = folder_of(
        tmp_path / "foreign", {f"{n}.png": png(n) for n in range(2)} | {"0.txt": "a whale", "1.txt": "a dog"}
    )
    one = folder_of(tmp_path / "one", {"ant/0.png": png(0)})
    faults = [
        (captions, silent, r"nothing says what 1\.png shows; see real\.captions, real\.column"),
        (captions, foreign, r"real\.path .*foreign: the policy does not know the word 'whale'"),
        (classes, one, "1 images are too few to learn from"),
        (classes, tmp_path / "nowhere", r"real\.path .*nowhere: no folder, \.npz or \.tar files; or say nano"),
        (classes, tmp_path / "nowhere.tar", r"cannot read .*nowhere\.tar: no such file"),
        (classes, "x\0.tar", "cannot read|no folder"),
        (classes, "x" * 5000, "no folder"),
        (classes, "nano", "scenes of the nano world are nothing to tiny; name a folder"),
    ]
    classes.name = "tiny"
    for policy, path, message in faults:
        with pytest.raises(UserError, match=message):
            opened(policy, path)
    with pytest.raises(UserError, match=r"real\.captions x\.txt: only for a folder and a policy of captions"):
        opened(classes, one, captions="x.txt")


def test_a_damaged_picture_is_one_line(classes: Policy, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"ant/0.png": png(0), "bee/1.png": png(1)[:60]})
    with pytest.raises(UserError, match=r"cannot read the image .*bee/1\.png"):
        opened(classes, folder, tmp_path / "cache")


# --- shards


def test_shards_of_classes_and_of_captions_give_what_folders_give(
    classes: Policy, captions: Policy, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "data", {f"{n % 4}/{n}.png": png(n) for n in range(6)})
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard, numbers in (("0.tar", range(3)), ("1.tar", range(3, 6))):
        files = {}
        for n in numbers:
            files |= {f"some/{n}.seg.txt": "no part of it", f"some/{n}.png": png(n), f"some/{n}.cls": f"{n % 4}\n"}
        tar_of(shards / shard, files)
    plain, real = (opened(classes, path, tmp_path / "cache") for path in (folder, shards))
    order = [[int(Path(item.file).stem) for item in one.images.items] for one in (plain, real)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(6))
    for number in range(6):
        left, right = ([one.index(number)] for one in order)
        assert plain.conditions[left[0]] == real.conditions[right[0]]
        assert torch.equal(plain.tokens(left), real.tokens(right)) and torch.equal(
            plain.pixels(left), real.pixels(right)
        )
    assert order[1] == [int(Path(i.file).stem) for i in opened(classes, f"{shards}/*.tar").images.items]
    rows = {f"{n}.png": png(n) for n in range(3)}
    texts = {"0.txt": "a dog", "1.json": json.dumps({"caption": "a  red cat"}), "2.json": json.dumps({"text": "a cat"})}
    written = tar_of(tmp_path / "captions.tar", dict(sorted((rows | texts).items())))
    assert prompts(opened(captions, written, limit=2)) == ["a dog", "a red cat"]
    with pytest.raises(UserError, match=r"nothing says what .*captions\.tar/2\.png shows"):
        opened(captions, written)


def test_shards_that_are_none_are_one_line(classes: Policy, tmp_path: Path) -> None:
    whole = {"0.png": png(0), "0.cls": "1", "1.png": png(1), "1.cls": "2"}
    packed = tar_of(tmp_path / "packed.tar", whole, "w:gz")
    cut = tar_of(tmp_path / "cut.tar", whole)
    cut.write_bytes(cut.read_bytes()[:1300])
    wrong = tar_of(tmp_path / "wrong.tar", whole | {"1.cls": "two"})
    odd = tar_of(tmp_path / "odd.tar", {"0.png": png(0), "0.json": '{"caption": [1]}'})
    for path, message in (
        (packed, r"cannot read .*packed\.tar: it is no \.tar, a compressed or a damaged one"),
        (cut, r"cannot read .*cut\.tar: it is"),
        (wrong, r"wrong\.tar, 1\.cls: 'two': must be the id of a class"),
        (odd, r"odd\.tar, 0\.json: caption = \[1\]: must be a caption or the id of a class \(real\.column\)"),
    ):
        with pytest.raises(UserError, match=message):
            opened(classes, path)
    links = tmp_path / "links.tar"
    with tarfile.open(links, "w") as archive:
        for n in range(2):
            for name, kind in ((f"{n}.png", tarfile.SYMTYPE), (f"../{n}.png", tarfile.REGTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member, io.BytesIO())
    with pytest.raises(UserError, match=r"nothing says what .*links\.tar/\.\./0\.png shows"):
        opened(classes, links)  # a link is none of its pictures, and nothing is unpacked anywhere


def test_a_shard_that_changes_after_it_was_listed_is_not_read(classes: Policy, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"0.png": png(0), "0.cls": "1", "1.png": png(1), "1.cls": "2"})
    real = opened(classes, path)
    tar_of(path, {"0.png": png(5), "0.cls": "1", "1.png": png(6), "1.cls": "2", "2.png": png(7)})
    with pytest.raises(UserError, match=r"a\.tar changed while it was read"):
        real.pixels([0])


# --- codes


def test_codes_are_taken_as_they_are_and_decoded_for_pixels(classes: Policy, captions: Policy, tmp_path: Path) -> None:
    real = opened(classes, save_codes(tmp_path / "codes.npz"), limit=8)
    assert sorted(one.class_id for one in real.conditions) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(real.pixels([2, 0]), classes.decode(real.tokens([2, 0])))
    assert torch.equal(real.tokens([5])[0] * 4 // CODES, torch.full((TOKENS,), real.conditions[5].class_id))
    assert prompts(opened(captions, save_codes(tmp_path / "texts.npz", 4, prompts=WORDS))) == list(WORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("class_ids"), "has codes, and no array 'class_ids'"),
        (lambda file: file.update(codes=file["codes"][:, :3]), r"codes is int16 \[4, 3\]; tiny reads .* \[N, 16\]"),
        (lambda file: file.update(codes=file["codes"] + 30), r"codes holds 30 to \d+; tiny has the codes 0 to 31"),
        (lambda file: file.update(codes=file["codes"] / 2), r"codes is float64"),
        (lambda file: file.update(class_ids=file["class_ids"][:2]), r"class_ids is int64 \[2\]; 4 whole numbers"),
        (lambda file: file.update(class_ids=file["class_ids"] + 1), r"real\.path .*codes\.npz: .*4"),
        (lambda file: file.update({key: value[:1] for key, value in file.items()}), "1 images are too few"),
        (lambda file: file.update({key: value[:0] for key, value in file.items()}), "0 images are too few"),
        (lambda file: file.update(codes=np.int16(3)), r"codes is int16 \[\]"),
    ],
)
def test_codes_that_do_not_fit_are_one_line(
    classes: Policy, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    classes.name = "tiny"
    content = dict(np.load(save_codes(tmp_path / "codes.npz", 4)))
    change(content)
    np.savez(tmp_path / "codes.npz", **content)
    with pytest.raises(UserError, match=message):
        opened(classes, tmp_path / "codes.npz")


# --- scenes


def test_scenes_are_those_of_their_numbers_and_of_all_classes_alike(
    no_font: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load_policy("nano-c2i")
    monkeypatch.setattr(scenes, "find_font", Path)
    real, fewer = (opened(policy, "nano", tmp_path / "cache", limit=count) for count in (50, 30))
    assert [one.class_id for one in real.conditions] == [index % 24 for index in range(50)]
    assert real.conditions[:30] == fewer.conditions and torch.equal(real.codes[:30], fewer.codes)
    pixels = real.pixels([0, 24])
    assert pixels.shape == (2, 3, 64, 64) and not torch.equal(pixels[0], pixels[1])
    assert torch.equal(real.tokens([0, 24]), policy.tokenise(pixels))


def test_scenes_of_captions_show_nothing_that_the_benchmark_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from argrpo_cli.captions import SHARED
    from argrpo_cli.geneval.prompts import prompt_set

    monkeypatch.setattr(scenes, "find_font", Path)
    real = opened(load_policy("nano-t2i"), "nano", limit=300)
    asked = {
        one.text for name in ("geneval", "geneval-nano-extra") for one in prompt_set(name) if one.tag not in SHARED
    }
    texts = prompts(real)
    assert len(set(texts)) > 150 and not asked.intersection(texts)
