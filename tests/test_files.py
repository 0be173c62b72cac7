"""Files appear whole or not at all, and what goes wrong is told in a line."""

from __future__ import annotations

import errno
import json
import os

import pytest
from PIL import Image

from argrpo_cli.system import files
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path, make_dir, read_jsonl, save_png, write_json, write_jsonl, write_text


def test_parents_are_made_and_the_content_is_exact(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "größe\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größe\n".encode()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.png: no space left on device"):
        save_png(tmp_path / "x.png", Image.new("RGB", (4, 4)))
    assert os.listdir(tmp_path) == []


def test_a_path_below_a_file_is_an_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x\.txt: (not a directory|file exists)"):
        write_text(tmp_path / "file" / "x.txt", "")
    with pytest.raises(UserError, match=r"cannot create the folder .*file"):
        make_dir(tmp_path / "file" / "below")


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_text(tmp_path / "taken", "")


def test_results_have_the_permissions_of_ordinary_files(tmp_path):
    write_text(tmp_path / "x", "")
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_jsonl_round_trip_and_the_number_of_a_bad_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}, {"b": "ü"}])
    assert read_jsonl(path) == [{"a": 1}, {"b": "ü"}]
    path.write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not JSON"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected a JSON object"):
        read_jsonl(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_jsonl(path)


def test_a_folder_is_tried_before_it_is_made(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "new" / "below")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        files.check_writable(tmp_path / "file" / "below")

    def refused(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"cannot write .*new: permission denied"):
        files.check_writable(tmp_path / "new")
