"""Sets of images in .npz files, and .jsonl, .csv and .txt files of rows: the numbers that are there, or refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from argrpo_cli.captions import read_captions
from argrpo_cli.image_prompts import find_items
from argrpo_cli.images import open_images
from argrpo_cli.kept import Rows
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.files import read_jsonl
from tests.fuzz.mutate import Damage, damaged, damaged_json, damaged_jsonl

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
NAMES = ("a", "b", "c")
HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (5, -6, -4, 3), }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (5, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (5.0, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (6, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 99999999, 99999999, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (5, 6, 4, 3), }",
    "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (5, 6, 4, 3), }",
    "{'descr': 'x', 'fortran_order': False, 'shape': (5, 6, 4, 3), }",
    "{'descr': '|u1', 'shape': (5, 6, 4, 3), }",
    "__import__('os').getcwd()",
    "(" * 3000,
    "",
)


def seeds(folder: Path) -> dict[str, bytes]:
    """Files of each kind."""
    made = {}
    for name, save in (("stored.npz", np.savez), ("packed.npz", np.savez_compressed)):
        file = io.BytesIO()
        save(file, arr_0=PIXELS)
        made[name] = file.getvalue()
    rows = [{"file": f"{name}.png", "prompt": f"a dog {name}", "class_id": 3, "seed": 1.5} for name in NAMES]
    made["metadata.jsonl"] = _lines(rows)
    made["captions.jsonl"] = _lines([{"prompt": f"a {name}\u2028cat", "file": f"{name}.png"} for name in NAMES])
    made["captions.json"] = json.dumps([f"a {name} cat" for name in NAMES]).encode()
    made["captions.csv"] = b'prompt,n\n"a red, dog",1\n"two\nlines",2\nc,3\n'
    made["captions.txt"] = "a dog\nein Bär\nc\n".encode()
    made["kept.jsonl"] = _lines([{"key": json.dumps([name, 1]), "row": {"bright": 0.5}} for name in NAMES])
    result = Result(
        "score", {"x": Column("x")}, {"here": {"x": Value(0.5, 0.1, 3)}}, protocol={"images": 3, "rewards": {}}
    )
    result.save(folder / "summary.json")
    made["summary.json"] = (folder / "summary.json").read_bytes()
    return made


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def case(seeds: dict[str, bytes], rng: Damage, folder: Path) -> str:
    """A file of one of the kinds."""
    name = rng.choice(sorted(seeds))
    path, content = folder / name, seeds[name]
    if path.suffix == ".npz":
        return _array(path, content, rng)
    ways = {".jsonl": damaged_jsonl, ".json": damaged_json}
    path.write_bytes(ways.get(path.suffix, damaged)(content, rng))
    return {"captions": _captions, "metadata": _metadata, "kept": _kept, "summary": _result}[path.stem](path)


def _array(path: Path, content: bytes, rng: Damage) -> str:
    other_header = not rng.none and rng.random() < 0.4
    if other_header:
        header = rng.choice(HEADERS).encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        inner = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + PIXELS.tobytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(rng.choice(("arr_0.npy", "arr_0.npy", "arr_0", "x.npy")), inner)
    else:
        path.write_bytes(damaged(content, rng))
    images = open_images(path)
    read = np.stack([item.read() for item in images.items]).transpose(0, 2, 3, 1)
    assert other_header or np.array_equal(read, PIXELS), "other pixels than were saved"
    assert not other_header or np.array_equal(read, PIXELS[: len(read)]), "other pixels than are there"
    return f"{len(read)} images"


def _metadata(path: Path) -> str:
    _pictures(path.parent)
    rows = _checked_rows(path)
    items = find_items([path.parent]).items
    assert [item.file for item in items] == [row["file"] for row in rows], "other pictures than are listed"
    assert [item.condition and item.condition.prompt for item in items] == [row.get("prompt") for row in rows], (
        "other prompts"
    )
    return f"{len(items)} items"


def _pictures(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        Image.new("RGB", (4, 4), "red").save(folder / f"{name}.png")
    return folder


def _captions(path: Path) -> str:
    captions = read_captions(str(path))
    assert all(isinstance(one, str) and one.strip() for one in captions), "an empty caption"
    if path.suffix == ".jsonl":
        rows = _checked_rows(path)
        assert captions == [text for row in rows for text in _texts(row)], "other captions than are there"
        items = find_items([_pictures(path.parent / "images")], captions=path).items
        named = {row["file"]: _texts(row) for row in rows if row.get("file")}
        for item in items if named else ():
            assert named[item.file] == [item.condition.prompt], "the caption of another picture"
    if path.suffix == ".txt":
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        assert captions == [line.strip() for line in lines if line.strip()], "other captions than lines"
    return f"{len(captions)} captions"


def _texts(row: dict) -> list[str]:
    said = row["prompt"]
    return [text for text in (said if isinstance(said, list) else [said]) if text and text.strip()]


def _kept(path: Path) -> str:
    store = Rows(path.parent / "store", "x", key=lambda name: [name, 1])
    store.folder.mkdir(parents=True)
    path.rename(store.folder / "0.jsonl")
    missing = store.missing(NAMES)
    store.write(NAMES, [{"bright": 0.5}] * len(NAMES))
    assert not store.missing(NAMES), "what was written is missing"
    return f"{len(missing)} missing"


def _result(path: Path) -> str:
    from argrpo_cli.evals.tables import read_results, write_report

    write_report(read_results([path.parent]), path.with_name("page.html"))
    write_report({str(path): Result.load(path)}, path.with_name("page.md"))
    return "shown"


def _whole(text: str) -> int | float:
    """A whole number of JSON, the nearest float beyond 64 bits."""
    return int(text) if len(text) <= 20 and -(2**63) <= int(text) < 2**63 else float(text)


def _checked_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, which are those of its lines."""
    rows = read_jsonl(path)
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    plain = [json.loads(line, parse_int=_whole) for line in lines if line.strip()]
    assert repr(rows) == repr(plain), "other rows than lines"
    return rows
