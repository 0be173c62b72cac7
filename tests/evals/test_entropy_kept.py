"""Entropy: what is kept and when it is measured again, what is compared with what, and the intervals that are shown."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from rich.console import Console

from argrpo_cli import image_codes
from argrpo_cli.evals import entropy as e
from argrpo_cli.evals.entropy_results import draw_bars, draw_curve, table
from argrpo_cli.image_labels import open_labelled
from argrpo_cli.policy.llamagen.vq import from_uint8
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_jsonl
from tests.evals.entropies import along, measure
from tests.evals.test_entropy_data import class_folders, codes_of, flat, picture, policies  # noqa: F401
from tests.training.tiny import IMAGE_SIZE, TOKENS, tiny_policy

# What is kept


def test_policies_and_settings_that_share_a_journal_keep_their_own_entropies(policies, tmp_path):  # noqa: F811
    subjects = [e.NamedPolicy(path, Path(path).name) for path in policies]
    question = along(class_folders(tmp_path / "data"))
    shown = set()
    for cfg_scale, temperature in ((2.0, 1.0), (4.0, 1.0), (4.0, 0.8)):
        asked = (subjects, question, Sampling(cfg_scale=cfg_scale, temperature=temperature))
        kept = measure(*asked, folder=tmp_path / "journal", cache=tmp_path / "cache")
        assert kept == measure(*asked, cache=tmp_path / "cache")
        shown |= {row["mean"] for row in kept if row["mode"] == "guided"}
    assert len(shown) == 6, "all differ"


def test_pictures_with_other_labels_are_measured_anew(policies, tmp_path):  # noqa: F811
    data, means = flat(tmp_path / "data"), []
    for class_id in (0, 3):
        write_jsonl(
            data / "metadata.jsonl", [{"file": path.name, "class_id": class_id} for path in data.glob("*.JPEG")]
        )
        asked = ([e.NamedPolicy(policies[0], "base")], along(data))
        rows = measure(*asked, folder=tmp_path / "journal", cache=tmp_path / "cache")
        assert rows == measure(*asked, cache=tmp_path / "cache")
        means.append(rows[0]["mean"])
    assert means[0] != means[1]


def test_a_picture_of_another_length_and_the_same_time_is_encoded_anew(tmp_path):
    policy, data = tiny_policy(), class_folders(tmp_path / "data")
    codes_of(data, policy, tmp_path / "cache")
    path = data / open_labelled(data).items[2].file
    before = path.stat()
    picture(path, seed=99, width=14)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size != before.st_size
    tokens, encoded = codes_of(data, policy, tmp_path / "cache")
    assert encoded == 12
    pixels = torch.from_numpy(image_codes.read_cropped(path, IMAGE_SIZE))
    assert torch.equal(tokens[2:3], policy.tokenizer.encode(from_uint8(pixels[None])))


# What is compared with what


def larger_pictures(policy):
    policy.model.config.block_size, policy.image_size = 4 * TOKENS, 2 * IMAGE_SIZE


def fewer_layers(policy):
    policy.model.config.num_hidden_layers = 1


@pytest.mark.parametrize("change", [larger_pictures, fewer_layers])
def test_a_policy_is_compared_with_the_first_of_its_size_and_resolution(policies, tmp_path, change):  # noqa: F811
    other = tiny_policy()
    change(other)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        other.model = type(other.model)(other.model.config).eval()
        torch.nn.init.normal_(other.model.lm_head.weight, std=0.1)
    other.save(tmp_path / "other")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(3)
    other.save(tmp_path / "other surer")
    paths = [policies[0], str(tmp_path / "other"), str(tmp_path / "other surer"), policies[1]]
    subjects = [e.NamedPolicy(path, Path(path).name) for path in paths]
    rows = measure(subjects, along(class_folders(tmp_path / "data")), cache=tmp_path / "c")
    compared = {"other": "base", "other surer": "other", "surer": "base"}
    assert {row["policy"]: row["against"] for row in rows if "against" in row} == compared
    mean = {(row["policy"], row["mode"]): row["mean"] for row in rows}
    for row in rows[2:]:
        expected = row["mean"] - mean[compared[row["policy"]], row["mode"]]
        assert row["change"] == pytest.approx(expected, abs=1e-9) and abs(expected) > 1e-4


# Intervals


def shown_rows(steps=(None, None)):
    rows = []
    for place, (name, step) in enumerate(zip(("base", "mine"), steps, strict=True)):
        for mode, error in (("conditional", 0.05), ("guided", 0.07)):
            row = {"policy": name, "step": step, "mode": mode, "mean": 3 - place / 2, "standard_error": error}
            row |= {"split": "val", "prompts": None, "data": None, "images": 10, "cfg_scale": 2.0}
            row |= {"family": "small", "by_position": [3.0, 2.0]}
            rows.append(row | ({"change": -0.5, "change_error": 0.02, "against": "base"} if place else {}))
    return rows


def drawn(draw, rows, path, monkeypatch) -> Figure:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw(rows, path)
    return figures[0]


def intervals(axes) -> list[tuple[float, float]]:
    """Middle and half-length of the vertical error bars on axes."""
    found = []
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            for segment in container.lines[2][0].get_segments():
                low, high = np.asarray(segment)[:, 1]
                found.append(((low + high) / 2, (high - low) / 2))
    return found


def test_the_table_shows_standard_errors():
    console = Console(width=200)
    with console.capture() as printed:
        console.print(table(shown_rows()))
    text = printed.get()
    assert "± standard error" in " ".join(text.split())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for mode, own, other in (("conditional", "0.0500", "0.0200"), ("guided, cfg 2", "0.0700", "0.0200")):
        base, mine = (line for line in lines if mode in line)
        assert f"3.0000 ± {own}" in base
        assert f"2.5000 ± {own}" in mine and f"-0.5000 ± {other}" in mine


@pytest.mark.parametrize("steps", [(None, None), (0, 20)])
def test_the_curve_shows_standard_errors(steps, tmp_path, monkeypatch):
    figure = drawn(draw_curve, shown_rows(steps), tmp_path / "curve.png", monkeypatch)
    expected = [(mean, error) for error in (0.05, 0.07) for mean in (3.0, 2.5)]
    np.testing.assert_allclose(intervals(figure.axes[0]), expected, rtol=1e-6)


def test_the_bars_and_their_changes_show_standard_errors(tmp_path, monkeypatch):
    figure = drawn(draw_bars, shown_rows(), tmp_path / "bars.png", monkeypatch)
    for axes, error in zip(figure.axes, (0.05, 0.07), strict=True):
        np.testing.assert_allclose(intervals(axes), [(mean, error) for mean in (3.0, 2.5)], rtol=1e-6)
        assert [text.get_text() for text in axes.texts] == ["-0.5000\n± 0.0200"]


# Labels, and the page of results


def test_a_synset_of_the_devkit_with_children_is_no_class(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    flat(tmp_path, 2)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(1, "n15075141", 0), (1001, "n00001740", 3), (1002, "n01443537", 1)]
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n1\n")
    assert [item.extra["label"] for item in open_labelled(tmp_path).items] == ["n15075141", "n15075141"]
    for number in (1001, 1002):
        truth.write_text(f"1\n{number}\n")
        with pytest.raises(UserError, match=f"line 2: expected the devkit's id of a class, 1 to 1000, got '{number}'"):
            open_labelled(tmp_path)
