"""`argrpo eval nano --images`: finished pictures in a folder or an .npz file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.evals import nano
from argrpo_cli.evals.nano import run_nano
from argrpo_cli.evals.tables import table
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.scenes import CLASS_NAMES
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError

OF_SAMPLES = {"precision", "recall", "coverage"}  # and not of real scenes
SHOWN = {"inception_score", "fid", "sfid"} | OF_SAMPLES
LABEL_FREE = SHOWN | {"fid_corrected", "sfid_corrected"}
BY_CLASS = {"match", "match_at_size", "size", "mirrored", "recognised", "diversity", "vendi"}
REWARDS = {"nano-clip", "nano-quality", "nano-critic", "total_reward"}
N = 48


@pytest.fixture(autouse=True)
def fewer_real_scenes(monkeypatch):
    monkeypatch.setattr(nano, "UNSEEN_SCENES", 48)


@pytest.fixture
def folder(tmp_path):
    """Reference scenes as files; their names are in the reverse of the judge's order."""
    judge = load_judge()
    target = tmp_path / "images"
    target.mkdir()
    rows = []
    for index in range(N):
        file = f"{N - 1 - index:03d}.png"
        Image.fromarray(judge.reference_images[index].permute(1, 2, 0).numpy()).save(target / file)
        rows.append({"file": file, "prompt": "a scene", "class_id": int(judge.reference_classes[index])})
    Image.new("RGB", (640, 640)).save(target / "grid.png")
    write_metadata(target, rows)
    return target


def evaluate_images(path, **options):
    return run_nano([], path, device="cpu", **options)


def values(result):
    """Of the pictures."""
    return {key: one.value for key, one in next(iter(result.rows.values())).items()}


def known(result):
    """Whether the classes were."""
    return next(iter(result.protocol["measured"].values()))["classes_known"]


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metadata(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_labelled_folder_gets_every_measure_of_its_pictures(folder):
    result = evaluate_images(folder, batch_size=17)
    found = values(result)
    assert set(found) == LABEL_FREE | BY_CLASS | REWARDS
    assert all(math.isfinite(one.value) and one.error >= 0 for one in next(iter(result.rows.values())).values())
    assert result.protocol["measured"] == {
        "images": {"path": str(folder), "count": N, "classes_known": True},
    }
    judge = load_judge()
    assert found["match"] == pytest.approx(judge.reference_match.db[:N].mean().item(), abs=1e-4)
    assert found["recognised"] == 1 and found["precision"] == 1
    assert set(result.rows[nano.REAL]) == (LABEL_FREE | BY_CLASS | REWARDS) - OF_SAMPLES - {"diversity", "vendi"}


def test_pictures_without_classes_get_what_needs_none(folder):
    labelled = values(evaluate_images(folder, weights={"nano-quality": 1.0}))
    (folder / "metadata.jsonl").unlink()
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])
    np.savez(folder.parent / "set.npz", arr_0=pixels)
    for path in (folder, folder.parent / "set.npz"):
        result = evaluate_images(path)
        found = values(result)
        assert set(found) == LABEL_FREE and set(result.rows[nano.REAL]) == LABEL_FREE - OF_SAMPLES
        assert "reward_weights" not in result.protocol and not known(result)
        for key in SHOWN:
            assert found[key] == pytest.approx(labelled[key], rel=1e-6), key
        assert "classes unknown" in table(result).caption
        assert table(result).row_count == len(LABEL_FREE)


def test_a_class_id_for_none_is_as_no_metadata(folder):
    write_metadata(folder, [{**row, "class_id": None} for row in read_metadata(folder)])
    assert not known(evaluate_images(folder))


def test_class_folders_give_the_classes_and_what_is_left_out_is_in_the_result(folder):
    rows = read_metadata(folder)
    (folder / "metadata.jsonl").unlink()
    for row in rows:
        (folder / CLASS_NAMES[row["class_id"]]).mkdir(exist_ok=True)
        (folder / row["file"]).rename(folder / CLASS_NAMES[row["class_id"]] / row["file"])
    result = evaluate_images(folder)
    assert known(result) and values(result).keys() >= BY_CLASS
    assert any("as no images of the set (1): grid.png" in text for text in result.warnings)


def test_a_class_with_one_picture_has_no_diversity(folder):
    rows = read_metadata(folder)
    for row in rows[24:]:
        (folder / row["file"]).unlink()
    write_metadata(folder, rows[:24])
    found = values(evaluate_images(folder, weights={"nano-quality": 1.0}))
    assert "diversity" not in found and "vendi" not in found and "match" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"000\.png is not in .*metadata\.jsonl"),
        (lambda rows: [*rows, {"file": "gone.png", "class_id": 1}], "lists gone.png, which is not there"),
        (lambda rows: [{**rows[0], "class_id": 24}, *rows[1:]], r"047\.png: class_id = 24: nano classes are 0 to 23"),
        (lambda rows: [{**rows[0], "class_id": "dog"}, *rows[1:]], "class_id = 'dog'"),
        (lambda rows: [{**rows[0], "class_id": None}, *rows[1:]], r"no class_id for 047\.png; give one for every"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(change, message, folder):
    write_metadata(folder, change(read_metadata(folder)))
    with pytest.raises(UserError, match=message):
        evaluate_images(folder)


def test_an_unfinished_folder_of_samples_is_refused(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "settings.json").write_text('{"command": "sample"}')
    with pytest.raises(UserError, match="is unfinished"):
        evaluate_images(folder)


def test_the_command_refuses_in_one_line(folder, capsys):
    def fails(*arguments) -> str:
        assert run(["eval", "nano", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("argrpo: error: ") and error.count("\n") == 1, error
        return error

    large, few = folder.parent / "large", folder.parent / "few"
    for path, size, count in ((large, 65, 5), (few, 64, 4)):
        path.mkdir()
        for index in range(count):
            Image.new("RGB", (size, 64)).save(path / f"{index}.png")
    assert f"{large / '0.png'} is 65x64; nano pictures are 64x64" in fails("--images", large)
    assert "recall and its error need 5, there are 4" in fails("--images", few)
    assert "no folder or .npz file" in fails("--images", folder / "nowhere")
    assert "leave out --policy" in fails("--images", folder, "--policy", "nano-c2i")
    assert "leave out --cfg-scale" in fails("--images", folder, "--cfg-scale", "2")
    assert "it is a folder" in fails("--images", folder, "--out", folder)


def test_the_command_prints_a_table_and_writes_json(folder, capsys):
    (folder / "metadata.jsonl").unlink()
    out = folder.parent / "deep" / "numbers.json"
    assert run(["eval", "nano", "--images", str(folder), "--out", str(out)]) == 0
    assert "sFID" in capsys.readouterr().out
    assert set(values(Result.load(out))) == LABEL_FREE


def test_an_interrupted_evaluation_writes_nothing(folder, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(nano, "manifold_measures", interrupted)
    before = sorted(folder.parent.rglob("*"))
    assert run(["eval", "nano", "--images", str(folder), "--out", str(folder.parent / "new" / "numbers.json")]) == 130
    assert sorted(folder.parent.rglob("*")) == before
