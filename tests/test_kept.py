"""The one journal: what is there is not made again, a batch is made whole, a folder is not used for two things."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

from argrpo_cli.kept import SETTINGS, Pictures, Rows, Tensors, check_claim, claim, kept
from argrpo_cli.shapes import Condition, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import Team


class Maker:
    """Counts what it makes: ten times each item."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(list(batch))
        return [10 * item for item in batch]


def rows(folder, identity="a"):
    return Rows(folder, identity, lambda item: item)


def keep(store, items=range(5), **options):
    make = Maker()
    before = kept(items, make, store, batch_size=2, label="making", **options)
    return make.batches, before


def test_what_is_there_is_not_made_again(tmp_path):
    assert keep(rows(tmp_path)) == ([[0, 1], [2, 3], [4]], 0)
    assert keep(rows(tmp_path)) == ([], 5)
    assert rows(tmp_path).read(range(5)) == [0, 10, 20, 30, 40]


def test_a_batch_of_which_something_is_missing_is_made_whole_or_not(tmp_path):
    rows(tmp_path).write([1, 4], [10, 40])
    assert keep(rows(tmp_path), whole=False) == ([[0], [2, 3]], 2)
    rows(tmp_path / "b").write([1, 4], [10, 40])
    assert keep(rows(tmp_path / "b")) == ([[0, 1], [2, 3]], 2)


def test_rows_of_another_identity_are_left_alone(tmp_path):
    keep(rows(tmp_path, "a"))
    assert rows(tmp_path, "b").read([3]) == [None]
    rows(tmp_path, "b").remove()
    assert rows(tmp_path, "a").read([3]) == [30]
    rows(tmp_path, "a").remove()
    assert not tmp_path.exists()


def test_a_row_that_is_not_complete_is_read_and_made_again(tmp_path):
    def store():
        return Rows(tmp_path, "a", lambda item: item, complete=lambda row: row["score"] is not None)

    for number in range(8):  # whatever the order of their files
        store().write([number, 100 + number], [{"score": None}, {"score": 1}])
        store().write([number], [{"score": 2}])
    assert store().read(range(8)) == [{"score": 2}] * 8
    store().write([9], [{"score": None}])
    assert store().read([9]) == [{"score": None}] and store().missing([0, 9, 10]) == [1, 2]


def test_what_is_prepared_comes_with_its_batch(tmp_path):
    seen = []

    def make(batch, ready):
        seen.append((list(batch), ready))
        return [0] * len(batch)

    kept(range(5), make, rows(tmp_path), batch_size=2, label="making", prepare=sum)
    assert seen == [([0, 1], 1), ([2, 3], 5), ([4], 4)]


def test_an_error_keeps_what_was_made_before_it(tmp_path):
    def make(batch):
        if 2 in batch:
            raise UserError("the judge is gone")
        return [0] * len(batch)

    with pytest.raises(UserError, match="the judge is gone"):
        kept(range(5), make, rows(tmp_path), batch_size=2, label="making")
    assert rows(tmp_path).missing(range(5)) == [2, 3, 4]


def test_only_missing_and_torn_pictures_are_written(tmp_path):
    shots = [Shot(Condition("a dog"), seed, f"{seed}.png") for seed in range(3)]
    store = Pictures(tmp_path)
    store.write(shots, torch.zeros(3, 3, 4, 4, dtype=torch.uint8))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:-5])
    assert store.missing(shots) == [1]
    store.write(shots, torch.full((3, 3, 4, 4), 9, dtype=torch.uint8))
    assert [Image.open(tmp_path / f"{seed}.png").getpixel((0, 0))[0] for seed in range(3)] == [0, 9, 0]


def test_tensors_are_of_one_batch_and_a_torn_file_is_missing(tmp_path):
    store = Tensors(tmp_path, "a", lambda item: item)
    store.write([1, 2], {"features": torch.ones(2)})
    assert store.missing([1, 2]) == [] and store.missing([2, 1]) == [0, 1]
    assert torch.equal(store.read([1, 2])["features"], torch.ones(2))
    path = store.path([1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    assert store.missing([1, 2]) == [0, 1]
    with pytest.raises(UserError, match="gone or damaged"):
        store.read([1, 2])


def test_a_folder_is_claimed_once_and_keeps_its_batch_size(tmp_path):
    out = tmp_path / "new" / "out"
    assert claim(out, {"n": 1, "sampling": {"seed": 0}}, 8) == 8
    assert claim(out, {"n": 2, "sampling": {"seed": 0}}, 4) == 4, "nothing has come of it"
    (out / "summary.json").write_text("{}")
    assert claim(out, {"n": 2, "sampling": {"seed": 0}}, 16) == 4
    with pytest.raises(UserError, match=r"holds samples \(n, sampling\.seed\); mend it"):
        claim(out, {"n": 1, "sampling": {"seed": 1}}, 4, "samples", "mend it")


def test_a_file_and_a_folder_of_other_things_are_refused(tmp_path):
    check_claim(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty; choose another --out"):
        check_claim(tmp_path)
    with pytest.raises(UserError, match="it is a file, not a folder"):
        check_claim(tmp_path / "thesis.tex")


@pytest.mark.parametrize("size", [0, -1, True, "8", None, 10**29])
def test_a_batch_size_that_is_none_is_not_gone_on_with(tmp_path, size):
    claim(tmp_path, {"n": 1}, 8)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / SETTINGS).write_text(json.dumps({"n": 1, "batch_size": size}))
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(batch_size\)"):
        claim(tmp_path, {"n": 1}, 8)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"key": "1"}', "row: field required"),
        ('{"key": 1, "row": {}}', "key is 1"),
        ('{"key": "1", "row": [1]}', r"row is \[1\]"),
        ('{"key": "1", "row": {"clip": "high"}}', r"row\.clip is 'high'"),
    ],
)
def test_a_kept_row_of_another_shape_is_told(tmp_path, line, why):
    store = Rows(tmp_path, "a", str, shape=dict[str, float | None])
    store.write([1], [{"clip": 0.5}])
    (path,) = store.folder.iterdir()
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"{path.name}, line 1 is damaged: {why}"):
        Rows(tmp_path, "a", str, shape=dict[str, float | None]).read([1])


def test_a_key_may_be_a_file_name_of_any_bytes(tmp_path):
    for name in (os.fsdecode(b"caf\xe9.png"), "a\u2028b.png", "\x1b.png"):
        rows(tmp_path).write([name], [1])
        assert rows(tmp_path).read([name]) == [1]


class Member(Team):
    """One of two processes that do their parts one after the other, from what the first has found missing."""

    def together(self, action):
        return action()

    def lead(self, action):
        """Not the check at the end: the other's part may be still to come."""

    def from_lead(self, action):
        return [[0], [0, 1], [], [0]]


def test_the_batches_of_a_team_are_dealt_out(tmp_path):
    parts = [keep(rows(tmp_path), range(7), team=Member(index, 2, "cpu")) for index in (0, 1)]
    assert parts == [([[0, 1], [6]], 3), ([[2, 3]], 3)]
