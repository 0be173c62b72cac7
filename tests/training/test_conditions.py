"""What a run draws: weighted classes, captions of files and data sets, and streams that go on where they were."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file

import argrpo_cli.training.streams as streams
from argrpo_cli.captions import read_captions
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import Recipe
from argrpo_cli.recipe.sections import DatasetSection
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from argrpo_cli.training.conditions import condition_order, run_conditions
from argrpo_cli.training.streams import StreamedConditions
from tests.training.tiny import FakeRewards, tiny_caption_policy, tiny_policy, tiny_recipe


@pytest.fixture(scope="module")
def caption_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions") / "policy"
    tiny_caption_policy().save(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_shards(folder: Path, rows: list[list[Any]], column: str = "caption") -> Path:
    """A data set of several parquet files, as the hub has them."""
    folder.mkdir()
    for number, shard in enumerate(rows):
        Dataset.from_dict({column: shard, "url": ["u"] * len(shard)}).to_parquet(folder / f"train-{number}.parquet")
    return folder


def stream_of(folder: Path, deduplicate: bool = True, **keys: Any) -> StreamedConditions:
    def read(text: str) -> Condition:
        if "unreadable" in text:
            raise UserError(f"cannot read {text!r}")
        return Condition(text)

    return StreamedConditions(DatasetSection(name=str(folder), **keys), deduplicate, read)


def texts(source: Any, groups: range) -> list[str]:
    return [source[group].prompt for group in groups]


def of_classes(**conditions: Any) -> Any:
    return run_conditions(tiny_recipe("tiny", conditions=conditions), tiny_policy())


# Classes


def test_weighted_classes_are_drawn_in_proportion_and_never_at_weight_0() -> None:
    source = of_classes(weights={"ant": 3.0, "1": 0.0, "dog": 0.5})  # cat counts 1
    assert [one.class_id for one in source] == [0, 2, 3]
    order = condition_order(source.weights, groups=900, seed=7)
    counts = Counter(source[index].class_id for index in order)
    assert counts == pytest.approx({0: 600, 2: 200, 3: 100}, abs=2)
    assert order == condition_order(source.weights, 2000, seed=7)[:900]  # a longer run starts alike
    assert order != condition_order(source.weights, 900, seed=8)


def test_a_large_weight_among_many_classes_is_kept_closely() -> None:
    weights = [1.0] * 999 + [111.0]
    for seed in range(3):
        counts = Counter(condition_order(weights, 5000, seed))
        assert counts[999] == pytest.approx(500, abs=3)
        assert max(counts[index] for index in range(999)) <= 6  # 4.5 on average, evenly


def test_equal_weights_are_the_uniform_order() -> None:
    passes = [np.random.Generator(np.random.PCG64([3, number])).permutation(7) for number in range(6)]
    assert (
        condition_order([2.5] * 7, 40, seed=3)
        == condition_order([1.0] * 7, 40, seed=3)
        == np.concatenate(passes)[:40].tolist()
    )


def test_classes_are_drawn_once_each_unless_repeats_are_wanted() -> None:
    assert [one.class_id for one in of_classes(classes=["dog", 3, "ant"])] == [3, 0]
    assert [one.class_id for one in of_classes(classes=["dog", 3, "ant"], deduplicate=False)] == [3, 3, 0]


def test_classes_of_the_same_name_are_all_drawn() -> None:
    policy = tiny_policy()
    policy.class_names = ["crane", "bee", "crane", "dog"]  # as ImageNet has them
    assert [one.class_id for one in run_conditions(tiny_recipe("tiny"), policy)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"weights": {"unicorn": 2.0}}, "no class 'unicorn'"),
        ({"weights": {"dog": 2.0}, "classes": ["cat"]}, r"conditions\.weights 'dog': conditions\.classes leaves"),
        ({"weights": {"dog": 2.0, "3": 1.0}}, "'dog' and '3' are the same class"),
        ({"weights": {"dog": 0.0}, "classes": ["dog"]}, "every class has weight 0"),
        ({"dataset": {"name": "x"}}, r"conditions\.dataset 'x': the policy .* draws classes"),
    ],
)
def test_wrong_class_conditions_are_one_line(conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_classes(**conditions)


# Captions of files and of data sets that are read at once


def test_a_column_of_a_jsonl_file_may_hold_texts_lists_and_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    rows = [{"text": "a dog"}, {"text": ["a cat", " ", "a  dog"]}, {"text": None}, {"text": ""}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_captions(str(file), "text") == ["a dog", "a cat", "a  dog"]
    file.write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: 'text' holds a int, expected text"):
        read_captions(str(file), "text")


def test_captions_that_differ_in_white_space_are_the_same(caption_folder: Path) -> None:
    policy, given = load_policy(caption_folder), ["a dog", "a  dog ", "a cat", "a dog"]
    for deduplicate, expected in ((True, ["a dog", "a cat"]), (False, given)):
        section = {"source": "captions", "captions": given, "deduplicate": deduplicate}
        source = run_conditions(tiny_recipe(caption_folder, conditions=section), policy)
        assert [one.prompt for one in source] == expected


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "arrow", "folder"])
def test_a_data_set_that_is_no_stream_is_read_at_once(caption_folder: Path, tmp_path: Path, kind: str) -> None:
    data = Dataset.from_dict({"words": ["a dog", "a cat", "a dog", "", "a red dog"]})
    path = tmp_path / (f"data.{kind}" if kind != "folder" else "saved")
    if kind in ("folder", "arrow"):
        data.save_to_disk(tmp_path / "saved")
    if kind == "arrow":
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif kind != "folder":
        getattr(data, f"to_{kind}")(path)
    keys = {"name": str(path), "column": "words", "streaming": False}
    recipe = tiny_recipe(caption_folder, conditions={"source": "captions", "dataset": keys})
    captions = [one.prompt for one in run_conditions(recipe, load_policy(caption_folder))]
    assert captions == ["a dog", "a cat", "a red dog"]
    recipe.conditions.dataset.limit = 2
    assert [one.prompt for one in run_conditions(recipe, load_policy(caption_folder))] == captions[:2]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"column": "captoin"}, r"conditions\.dataset\.column: .* no column 'captoin'; did you mean 'caption'"),
        ({"split": "test"}, r"conditions\.dataset: cannot read .*test"),
        ({"config": "other"}, r"conditions\.dataset: cannot read .*'other'"),
        ({"name": "nobody/nothing"}, r"cannot read nobody/nothing: .*hf download --repo-type dataset nobody/nothing"),
        ({"name": "notes.docx"}, r"a file ending in '\.docx'; it reads \.json"),
    ],
)
def test_a_wrong_data_set_is_one_line(
    caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str,
    streaming: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("notes.docx").write_text("")
    keys = {"name": str(write_shards(tmp_path / "data", [["a dog"]])), "streaming": streaming, **keys}
    recipe = tiny_recipe(caption_folder, conditions={"source": "captions", "dataset": keys})
    with pytest.raises(UserError, match=message) as told:
        source = run_conditions(recipe, load_policy(caption_folder))
        source[0]
    assert "\n" not in str(told.value)


def test_weights_are_not_for_captions(caption_folder: Path) -> None:
    recipe = tiny_recipe(caption_folder, conditions={"source": "captions", "weights": {"dog": 1.0}})
    with pytest.raises(UserError, match=r"conditions\.weights 'dog': weights are of classes"):
        run_conditions(recipe, load_policy(caption_folder))


# Streams

SHARDS = [["one", "two", None, "two"], [["three", "four"], ["one"]], [["  "], ["five", " six "]]]


def test_a_stream_is_drawn_in_its_order_and_comes_again(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", [*SHARDS[:1], ["three"]])
    assert texts(stream_of(data), range(7)) == ["one", "two", "three", "one", "two", "three", "one"]
    assert texts(stream_of(data, deduplicate=False), range(5)) == ["one", "two", "two", "three", "one"]
    assert texts(stream_of(data, limit=2), range(5)) == ["one", "two", "one", "two", "one"]


def test_a_list_in_a_column_is_several_captions(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", [[["one", "two"], ["", None, "two"]], [["three"]]])
    assert texts(stream_of(data), range(4)) == ["one", "two", "three", "one"]


def test_a_group_gets_the_same_caption_whatever_was_asked_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WINDOW", 4)
    data = write_shards(tmp_path / "data", [[f"{shard}-{row}" for row in range(5)] for shard in range(3)])
    whole = texts(stream_of(data), range(40))
    odd = stream_of(data)
    assert texts(odd, range(1, 40, 2)) == whole[1::2]  # as one of two processes asks
    assert odd[38].prompt == whole[38]  # still at hand
    assert odd[3].prompt == whole[3]  # long gone: read again


def test_what_cannot_be_read_is_passed_over_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shards(tmp_path / "data", [["unreadable", "one", "unreadable 2", "forbidden", "two"]])
    source = stream_of(data)
    capsys.readouterr()

    def check(conditions: Any) -> None:
        if conditions[0].prompt == "forbidden":
            raise UserError("no reward reads this")

    source.require(check)
    assert texts(source, range(2)) == ["one", "two"]
    assert source.skipped == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot read 'unreadable'" in told


def test_a_stream_of_nothing_usable_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = write_shards(tmp_path / "empty", [["", None]])
    with pytest.raises(UserError, match=r"has no usable caption in the column 'caption'"):
        stream_of(empty)[0]
    bad = write_shards(tmp_path / "bad", [[f"unreadable {row}" for row in range(20)]])
    with pytest.raises(UserError, match=r"has no usable caption \(the latest: cannot read 'unreadable 19'\)"):
        stream_of(bad)[0]
    monkeypatch.setattr(streams, "HOPELESS", 5)
    with pytest.raises(UserError, match=r"none of the first 5 captions .* cannot read 'unreadable 4'"):
        stream_of(bad)[0]
    numbers = write_shards(tmp_path / "numbers", [[1, 2]])
    with pytest.raises(UserError, match="'caption' holds a int"):
        stream_of(numbers)[0]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_stream_goes_on_where_its_state_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deduplicate: bool
) -> None:
    """Also in the middle of a row, after the last one, and in a second pass."""
    monkeypatch.setattr(streams, "WINDOW", 3)
    data = write_shards(tmp_path / "data", [[["one"], ["two"]], [["three", "one", "four"]], [["two"], ["five"]]])
    whole = texts(stream_of(data, deduplicate), range(20))
    once = ["one", "two", "three", "four", "five", "one"]
    assert whole[:6] == (once if deduplicate else ["one", "two", "three", "one", "four", "two"])
    first = stream_of(data, deduplicate)
    for stop in range(14):
        state = json.loads(json.dumps(first.state_dict()))
        second = stream_of(data, deduplicate)
        second.load_state_dict(state)
        assert texts(second, range(stop, 20)) == whole[stop:]
        assert first[stop].prompt == whole[stop]


def test_going_on_reads_nothing_before_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shards(tmp_path / "data", [[f"{shard}-{row}" for row in range(10)] for shard in range(4)])
    first = stream_of(data)
    first[34]
    state = first.state_dict()
    (data / "train-1.parquet").write_bytes(b"gone")  # it looks at the columns of the first, and the end of the latest
    second = stream_of(data)
    second.load_state_dict(state)
    assert second[30].prompt == "3-0"  # the latest ones travel along: a gallery may have read ahead of training
    assert texts(second, range(35, 40)) == [f"3-{row}" for row in range(5, 10)]


def test_the_state_of_another_stream_is_refused(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", [["one"]])
    with pytest.raises(UserError, match="position in the captions"):
        stream_of(data, limit=3).load_state_dict(stream_of(data).state_dict())


# Whole runs


class Watch(FakeRewards):
    """Remembers what was drawn, batch by batch; dies before batch `last`."""

    def __init__(self, last: int = 0) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.last = last

    def score(self, images: torch.Tensor, conditions: Any) -> dict[str, torch.Tensor]:
        if self.calls + 1 == self.last:
            raise KeyboardInterrupt
        self.seen += [one.prompt for one in conditions][::4]
        return super().score(images, conditions)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    words = ["a dog", "a cat", "a red dog", "a blue dog", "a zebra", "a red cat", "a blue cat", "red", "blue"]
    return write_shards(tmp_path / "data", [words[:4], words[4:6], words[6:]])


@pytest.fixture
def recipe_of(caption_folder: Path, captions: Path) -> Callable[..., Recipe]:
    def build(limit: int | None = None, **grpo: Any) -> Recipe:
        data = {"name": str(captions), "limit": limit}
        return tiny_recipe(
            caption_folder, conditions={"source": "captions", "dataset": data}, steps=6, save_every=2, **grpo
        )

    return build


def train(recipe: Recipe, out: Path, rewards: FakeRewards, resume: bool = False) -> None:
    run_training(recipe, out, resume, rewards=rewards, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("updates_per_batch", [1, 2])
def test_a_resumed_run_draws_the_same_captions_as_an_uninterrupted_one(
    recipe_of: Callable[..., Recipe], tmp_path: Path, updates_per_batch: int
) -> None:
    recipe = recipe_of(updates_per_batch=updates_per_batch)
    whole, first, second = Watch(), Watch(last=3 if updates_per_batch == 2 else 4), Watch()
    train(recipe, tmp_path / "whole", whole)
    usable = ["a dog", "a cat", "a red dog", "a blue dog", "a red cat", "a blue cat", "red", "blue"]
    assert whole.seen == (usable * 2)[: 12 // updates_per_batch]  # no zebra: the encoder does not know the word
    with pytest.raises(SystemExit):
        train(recipe, tmp_path / "parts", first)
    train(recipe, tmp_path / "parts", second, resume=True)
    done = 2 if updates_per_batch == 1 else 4
    assert first.seen[: 2 * done // updates_per_batch] + second.seen == whole.seen
    ends = [load_file(tmp_path / run / "policy" / "model.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_position_is_in_every_checkpoint(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_of(grid_images=1)
    train(recipe, tmp_path / "run", Watch())
    steps = {}
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        steps[folder.name] = json.loads((folder / "prompts.json").read_text())["group"]
    assert steps == {"step_000004": 8, "step_000006": 12}


def test_a_run_keeps_its_stream(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe_of(), tmp_path / "run", Watch())
    with pytest.raises(UserError, match=r"conditions\.dataset\.limit was None and is 5: .*keeps its recipe"):
        train(recipe_of(limit=5), tmp_path / "run", Watch(), resume=True)


def test_weighted_classes_are_trained(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(policy_folder, conditions={"weights": {"ant": 6.0, "bee": 0.0}}, steps=4)
    rewards = Watch()
    train(recipe, tmp_path / "run", rewards)
    assert Counter(rewards.seen) == {"a photo of an ant": 6, "a photo of a cat": 1, "a photo of a dog": 1}
