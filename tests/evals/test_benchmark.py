"""A benchmark of one file, run by the one function that runs them all."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from argrpo_cli import seeds
from argrpo_cli.draw import draw_into
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals.statistics import mean_of
from argrpo_cli.evals.tables import sections, table
from argrpo_cli.images import read_image
from argrpo_cli.kept import Rows, kept
from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Column, Condition, Result, Shot, Value
from argrpo_cli.system.errors import UserError
from tests.training.tiny import CLASSES, save_tiny_policy


class Brightness(b.Benchmark):
    """How bright the pictures of each class are: all that a benchmark needs, and the line of its seeds below."""

    name, title, reads, n = "brightness", "Brightness", "classes", 2

    def open(self, cards, team):
        self.names = cards[0].names if cards else ()

    def prompts(self):
        return self.names

    def measure(self, subject, batch_size, team):
        def look(batch):
            return [read_image(subject.pictures / shot.file).mean() / 255 for shot in batch]

        rows = Rows(subject.folder / "rows", self.name, lambda shot: shot.file)
        kept(subject.shots, look, rows, batch_size=batch_size, label="looking", team=team)
        clusters = [shot.condition.class_id for shot in subject.shots]
        return {"bright": mean_of(rows.read(subject.shots), clusters)}

    def columns(self):
        return {"bright": Column("brightness", percent=True)}

    def finished(self, images):
        return [Shot(Condition("a photo", int(path.name[:5])), -1, path.name) for path in sorted(images.glob("*.png"))]


seeds.SPACES["brightness"] = seeds.Space(3_000_000_000, 100, 10)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return [str(save_tiny_policy(folder / name)) for name in ("one", "two")]


def run(policies, out, **rest):
    return b.run(Brightness(), policies, out, device="cpu", **rest)


def test_it_draws_measures_pairs_and_tells(policies, tmp_path):
    result = run(policies, tmp_path / "o", seed=1, batch_size=3)
    assert Result.load(tmp_path / "o" / "summary.json") == result
    first, second = result.rows
    assert first.endswith("one") and second.endswith("two")
    value = result.rows[first]["bright"]
    assert value.count == 2 * CLASSES and 0 < value.value < 1 and value.error > 0
    assert (result.difference["bright"].value, result.difference["bright"].error) == (0, 0), "the same weights"
    assert result.protocol["sampling"]["seed"] == 1 and result.departures == []
    assert len(list((tmp_path / "o" / first / "images").iterdir())) == 8


def test_a_bundled_policy_is_measured_and_reported(tmp_path):
    result = run(["nano-c2i"], tmp_path / "o", n=1)
    value = result.rows["nano-c2i"]["bright"]
    assert value.count == 24 and 0.2 < value.value < 1 and result.protocol["measured"]["nano-c2i"]["image_size"] == 64
    ((title, columns, lines),) = [(one.title, one.columns, one.lines) for one in sections({"x": result})]
    assert (title, columns) == ("brightness", ["brightness"])
    assert lines == [("nano-c2i", [f"{100 * value.value:.3f} ± {100 * value.error:.3f} %"], "measured")]
    text = io.StringIO()
    Console(file=text, width=80).print(table(result, 80))
    assert f"{100 * value.value:.3f} ± {100 * value.error:.3f} %" in text.getvalue()


def test_it_goes_on_where_it_stopped(policies, tmp_path, monkeypatch):
    whole = run(policies[:1], tmp_path / "whole", batch_size=3)
    draw, calls = draw_into, []

    def stop(folder, policy, shots, *given, **rest):
        calls.append(1)
        draw(folder, policy, shots[:3], *given, **rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("argrpo_cli.draw.draw_into", stop)
        run(policies[:1], tmp_path / "o", batch_size=3)
    assert run(policies[:1], tmp_path / "o", batch_size=8) == whole, "with the batch size it was begun with"
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(sampling.seed\)"):
        run(policies[:1], tmp_path / "o", seed=3)


def test_finished_pictures_are_measured_alike(policies, tmp_path):
    ours = run(policies[:1], tmp_path / "o")
    (name,) = ours.rows
    again = run([], tmp_path / "again", images=tmp_path / "o" / name / "images")
    assert again.rows["images"] == ours.rows[name] and again.protocol["measured"]["images"]["count"] == 8


def test_what_is_not_the_papers_is_told(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(Brightness, "of_paper", True, raising=False)
    result = run(policies[:1], tmp_path / "o", n=1, sampling={"cfg_scale": 3.0})
    assert result.departures == ["images per prompt 1 (paper 2)", "cfg-scale 3 (paper 2)"]


def test_each_policy_is_drawn_in_its_own_way_and_the_table_says_which(policies, tmp_path, capsys):
    own = load_policy(policies[0])
    own.sampling = {"cfg_scale": 1.0}
    own.save(tmp_path / "distilled")
    pair = [str(tmp_path / "distilled"), policies[1]]
    result = run(pair, tmp_path / "o", seed=1)
    assert capsys.readouterr().err.count(f"sampled as {pair[0]} says: guidance 1\n") == 1
    first, second = result.rows
    scales = {name: one["sampling"] for name, one in result.protocol["measured"].items()}
    assert scales == {first: {"cfg_scale": 1.0}, second: {"cfg_scale": 2.0}}
    assert result.protocol["sampling"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_interval": -1, "dtype": "float32", "seed": 1,
    }  # fmt: skip
    alone = [run(pair[:1], tmp_path / "1", seed=1), run(pair[1:], tmp_path / "2", seed=1)]
    assert {name: one for each in alone for name, one in each.rows.items()} == result.rows, "with the same seeds"
    assert result.difference["bright"].value != 0, "of the same weights"
    text = io.StringIO()
    Console(file=text, width=400).print(table(result, 400))
    names, guidance = text.getvalue().splitlines()[2:4]
    assert names.index(second) < names.index(first), "the baseline first"
    assert guidance.index("(cfg 2)") < guidance.index("(cfg 1)")
    (section,) = sections({"x": result})
    assert [name for name, _, _ in section.lines][:2] == [f"{second} (cfg 2)", f"{first} (cfg 1)"]
    assert f"{first} (cfg 1) − {second} (cfg 2)" in [name for name, _, _ in section.lines] and not section.warnings
    assert run(pair, tmp_path / "o", seed=1) == result
    for rest in ({"baseline_cfg_scale": 3.0}, {"sampling": {"cfg_scale": 2.0}}):
        with pytest.raises(UserError, match="holds an evaluation of something else"):
            run(pair, tmp_path / "o", seed=1, **rest)


def test_options_hold_for_both_but_the_baselines_own(policies, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Brightness, "of_paper", True, raising=False)
    own = load_policy(policies[0])
    own.sampling = {"cfg_scale": 1.0}
    own.save(tmp_path / "distilled")
    pair = [str(tmp_path / "distilled"), policies[1]]
    result = run(pair, tmp_path / "o", n=1, sampling={"cfg_scale": 4.0}, baseline_cfg_scale=2.0)
    (warning,) = result.warnings
    told = capsys.readouterr().err.splitlines()
    assert "guidance 4, and" in warning and [line for line in told if "guidance" in line] == [f"WARNING: {warning}"]
    assert result.departures == ["images per prompt 1 (paper 2)", f"cfg-scale 4 (paper 2) of {pair[0]}"]
    both = run(pair, tmp_path / "both", n=1, sampling={"cfg_scale": 2.0})
    assert both.protocol["sampling"]["cfg_scale"] == 2 and "sampling" not in both.protocol["measured"][first_of(both)]
    assert both.difference["bright"].value == 0, "the same weights, guided alike"


def first_of(result):
    return next(iter(result.rows))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"n": 26}, "--n 26: give 1 to 25 images of each of 4 prompts"),
        ({"n": 0}, "--n 0: give 1 to 25 images"),
        ({"seed": 10}, "--seed 10: give 0 to 9"),
        ({"sampling": {"top_p": 0.0}}, "--top-p 0: must be above 0, at most 1"),
    ],
)
def test_bad_input_writes_nothing(policies, tmp_path, rest, message):
    with pytest.raises(UserError, match=message):
        run(policies[:1], tmp_path / "o", **rest)
    assert not (tmp_path / "o").exists()


def test_a_policy_that_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(UserError, match="nano-t2i draws captions, and Brightness asks with classes; try nano-c2i"):
        run(["nano-t2i"], tmp_path / "o")


def test_spaces_of_seeds_are_apart():
    spans = sorted((one.first, one.first + one.most * one.stride) for one in seeds.SPACES.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= 2**32


def test_seeds_are_fixed_for_all_time():
    """Or results of two versions would not be of the same noise."""
    expected = {
        "nano": 1_300_007,
        "critic": 80_000_007,
        "entropy": 200_030_007,
        "geneval": 400_300_007,
        "drawbench": 1_500_300_007,
        "imagenet": 2_000_300_007,
    }
    assert {name: seeds.of(name, 3, 7) for name in expected} == expected


def test_a_mean_is_clustered_and_a_difference_paired():
    mean = mean_of([1.0, 3.0, 3.0, 5.0], [0, 0, 1, 1])  # residuals of the clusters -2 and 2: error^2 = 2/1 * 8 / 16
    assert (mean.value, mean.error, mean.count) == (3.0, 1.0, 4)
    gaps = mean_of(torch.tensor([1.0, torch.nan, torch.nan, torch.nan, 2.0, 2.0]), [0, 0, 1, 1, 2, 2])
    assert gaps.count == 3 and gaps.value == pytest.approx(5 / 3) and len(gaps.strata[0]) == 2
    assert mean_of([torch.nan]).summary() == Value(None, None, 0)
    pair = mean_of([1.0, 2.0, 4.0, 5.0], [0, 0, 1, 1]).minus(mean_of([0.5, 2.0, 3.0, 5.0], [0, 0, 1, 1]))
    assert pair.value == 0.375 and pair.error == pytest.approx(0.125)
