"""Everything that can be interrupted and taken up again: pictures, scores, verdicts, entropies, features, codes.

A long job is a list of items in batches of a fixed size. What was made of a batch goes into a store as soon as it is
made, and `kept` makes what the store lacks: alone, or as one of several processes that share the batches. A batch of
which something is missing is made whole, since what comes out of a network depends, by rounding, on what else is in its
batch: so bytes are the same however often a job was interrupted. That is why a folder keeps the batch size it was begun
with (`claim`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from typing_extensions import TypedDict

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import (
    check_regular,
    load_tensors,
    make_dir,
    open_regular,
    read_json,
    read_jsonl,
    readable,
    save_png,
    save_tensors,
    to_pil,
    write_json,
    write_jsonl,
)
from argrpo_cli.system.processes import ALONE, Team, shared_progress

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.shapes import Shot

SETTINGS = "settings.json"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
WRITERS = 8  # threads that pack pictures
PASSED = "surrogatepass"  # a name of a file may hold bytes that are no UTF-8
Item = TypeVar("Item")


class Store(Protocol):
    """Where made things lie, of one kind; see `Pictures`, `Rows` and `Tensors`."""

    def missing(self, batch: Sequence[Any]) -> list[int]:
        """Places in a batch of the items that are still to be made."""
        ...

    def write(self, batch: Sequence[Any], contents: Any) -> None:
        """Keep what was made of a batch, on disk when this returns."""
        ...


def in_batches(items: Sequence[Item], batch_size: int) -> list[Sequence[Item]]:
    """The items in runs of `batch_size`, the last one shorter."""
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]


def kept(
    items: Sequence[Item],
    make: Callable[..., Any],
    store: Store,
    *,
    batch_size: int,
    label: str,
    team: Team = ALONE,
    whole: bool = True,
    prepare: Callable[[Sequence[Item]], Any] | None = None,
) -> int:
    """Make of the items what the store lacks, those of this process among its team, and wait for the others.

    Args:
        make: of a batch, what the store takes. With `prepare` it gets the batch and what that returned.
        label: of the progress bar.
        whole: make batches of which something is missing whole. False makes the missing items alone, for what is dear
            and does not depend on its batch; what is then still missing (a judge that failed) stays so.
        prepare: is called in a thread, a batch ahead, to read pictures while a network looks at the last ones.

    Returns:
        How many items the store had before.

    Raises:
        UserError: what `make` or the store raised, in any of the processes; or a folder that they do not share.
    """
    batches = in_batches(items, batch_size)
    missing = team.from_lead(lambda: [store.missing(batch) for batch in batches])
    jobs = [
        (batch if whole else [batch[place] for place in places], len(places))
        for batch, places in zip(batches, missing, strict=True)
        if places
    ]
    own = jobs[team.index :: team.count]

    def work() -> None:
        with shared_progress(team, label, sum(count for _, count in own)) as advance:
            for (batch, count), ready in zip(own, _ahead([batch for batch, _ in own], prepare), strict=True):
                store.write(batch, make(batch) if prepare is None else make(batch, ready))
                advance(count)

    team.together(work)
    if whole:
        team.lead(lambda: _check_all_there(store, batches))
    return len(items) - sum(map(len, missing))


def _check_all_there(store: Store, batches: Sequence[Sequence[Any]]) -> None:
    if any(store.missing(batch) for batch in batches):
        raise UserError("what another process wrote is not there; give an --out that all processes share")


def _ahead(batches: Sequence[Sequence[Item]], prepare: Callable[[Sequence[Item]], Any] | None) -> Iterator[Any]:
    """What `prepare` returns for each batch, made in a thread of its own while the last one is used."""
    if prepare is None:
        yield from (None for _ in batches)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(prepare, batch) for batch in batches[:1]]
        for number in range(len(batches)):
            ready = coming.pop().result()
            coming = [thread.submit(prepare, batch) for batch in batches[number + 1 : number + 2]]
            yield ready


class Pictures:
    """PNG files of shots in a folder; a file is there when it is whole, to its end and by its checksums."""

    def __init__(self, folder: Path):
        self.folder = folder

    def missing(self, batch: Sequence[Shot]) -> list[int]:
        return [place for place, shot in enumerate(batch) if not is_whole_png(self.folder / shot.file)]

    def write(self, batch: Sequence[Shot], contents: Tensor) -> None:
        """Write the missing ones of images uint8 [B, 3, H, W]."""
        pictures, places = to_pil(contents), self.missing(batch)
        with ThreadPoolExecutor(WRITERS) as writers:
            list(writers.map(lambda i: save_png(self.folder / batch[i].file, pictures[i]), places))


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there, to its end and with the checksums that it was written with."""
    from PIL import Image

    try:
        with open_regular(path) as file:
            Image.open(file, formats=("PNG",)).verify()
        with open_regular(path) as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except Exception:  # whatever Pillow raises for a damaged one
        return False


class Rows:
    """A row of plain data for each item, such as scores or a verdict; a file for each batch in a folder.

    Args:
        identity: what decides the rows, plain data; rows of another identity lie beside them and are left alone.
        key: what an item is known by, plain data; it changes when the item does.
        complete: whether a row is all that can be; others are kept, and made again.
        shape: of a row, see `plain.check_shape`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Any,
        key: Callable[[Any], Any],
        complete: Callable[[Any], bool] = lambda row: True,
        shape: Any = Any,
    ):
        self.folder = folder / digest(identity)
        self.key = lambda item: json.dumps(key(item), ensure_ascii=False)
        self.complete = complete
        self._line = TypedDict("Line", {"key": str, "row": shape})
        self._known: dict[str, Any] = {}
        self._files: set[str] = set()

    def missing(self, batch: Sequence[Any]) -> list[int]:
        self._refresh()
        rows = [self._known.get(self.key(item)) for item in batch]
        return [place for place, row in enumerate(rows) if row is None or not self.complete(row)]

    def write(self, batch: Sequence[Any], contents: Sequence[Any]) -> None:
        """Keep a row for each item; None for one that has none yet."""
        known = {self.key(item): row for item, row in zip(batch, contents, strict=True) if row is not None}
        if known:
            name = f"{digest(list(known))}.jsonl"
            write_jsonl(self.folder / name, [{"key": key, "row": row} for key, row in known.items()])
            self._known |= known

    def read(self, items: Sequence[Any]) -> list[Any]:
        """The row of each item, None where there is none."""
        self._refresh()
        return [self._known.get(self.key(item)) for item in items]

    def remove(self) -> None:
        """Take the files away, and the folders that are empty then."""
        _remove(self.folder, "*.jsonl")
        _remove_empty(self.folder.parent)

    def _refresh(self) -> None:
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.name not in self._files and not path.name.startswith("."):
                self._files.add(path.name)
                rows = {line["key"]: line["row"] for line in read_jsonl(path, self._line)}
                self._known |= {key: row for key, row in rows.items() if key not in self._known or self.complete(row)}


class Tensors:
    """Tensors of each batch, such as features or entropies; a .safetensors file for each in a folder.

    Args:
        identity, key: see `Rows`.
    """

    def __init__(self, folder: Path, identity: Any, key: Callable[[Any], Any]):
        self.folder, self.identity, self.key = folder, digest(identity), key

    def path(self, batch: Sequence[Any]) -> Path:
        return self.folder / f"{digest([self.identity, [self.key(item) for item in batch]])}.safetensors"

    def missing(self, batch: Sequence[Any]) -> list[int]:
        from safetensors import SafetensorError, safe_open

        try:
            check_regular(self.path(batch))
            with safe_open(self.path(batch), "pt") as file:  # reads the header, which says how long the file must be
                return [] if list(file.keys()) else list(range(len(batch)))
        except (OSError, SafetensorError):
            return list(range(len(batch)))

    def write(self, batch: Sequence[Any], contents: Mapping[str, Tensor]) -> None:
        save_tensors(self.path(batch), contents)

    def read(self, batch: Sequence[Any]) -> dict[str, Tensor]:
        """What was kept of one batch; UserError when it is gone."""
        tensors = load_tensors(self.path(batch))
        if tensors is None:
            raise self._gone(batch)
        return tensors

    def each(self, batches: Sequence[Sequence[Any]], key: str) -> Iterator[Tensor]:
        """One of the tensors, batch by batch; the others are not read."""
        from safetensors import SafetensorError, safe_open

        for batch in batches:
            try:
                with safe_open(self.path(batch), "pt") as file:
                    yield file.get_tensor(key)
            except (OSError, SafetensorError) as error:
                raise self._gone(batch) from error

    def column(self, batches: Sequence[Sequence[Any]], key: str) -> Tensor:
        """One of the tensors of all batches, [N, ...], which is in memory once."""
        place, whole = 0, None
        for rows in self.each(batches, key):
            if whole is None:
                whole = rows.new_empty(sum(map(len, batches)), *rows.shape[1:])
            whole[place : place + len(rows)] = rows
            place += len(rows)
        return whole

    def remove(self) -> None:
        """Take the files away, and the folder when it is empty then."""
        _remove(self.folder, "*.safetensors")

    def _gone(self, batch: Sequence[Any]) -> UserError:
        return UserError(f"cannot read {self.path(batch)}: it is gone or damaged; run the same command again")


def digest(value: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", PASSED)).hexdigest()[:24]


def _remove(folder: Path, pattern: str) -> None:
    for path in [*folder.glob(pattern), *folder.glob(f".tmp-{pattern}")]:  # the last are of a killed process
        path.unlink(missing_ok=True)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_claim(out: Path) -> None:
    """What can be refused of an --out before anything is loaded.

    Raises:
        UserError: `out` is a file, or a folder of something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to {out}: it is a file, not a folder")
    with readable(f"the folder {out}"):
        foreign = out.is_dir() and not (out / SETTINGS).is_file() and any(path.name[0] != "." for path in out.iterdir())
    if foreign:
        raise UserError(f"{out} is not empty; choose another --out")


def claim(
    out: Path,
    identity: Mapping[str, Any],
    batch_size: int,
    what: str = "an evaluation of something else",
    mend: str = "choose another --out",
) -> int:
    """Use a new folder, or one that a call with the same `identity` left; the batch size to go on with.

    Args:
        identity: plain data that decides what comes out; written to settings.json with the batch size.
        what, mend: for the message: what the folder holds, and what to do about it.

    Raises:
        UserError: the folder holds something else; the keys that differ are named.
    """
    check_claim(out)
    path = out / SETTINGS
    identity = json.loads(json.dumps(identity))  # tuples come back as lists
    if not path.is_file() or not any(one.name[0] != "." and one != path for one in out.iterdir()):  # nothing came of it
        make_dir(out)
        write_json(path, {**identity, "batch_size": batch_size})
        return batch_size
    settings = read_json(path)
    size = settings.get("batch_size")
    other = _differing(settings, identity) + ([] if type(size) is int and size >= 1 else ["batch_size"])
    if other:
        raise UserError(f"{out} holds {what} ({', '.join(other)}); {mend}")
    return size


def _differing(settings: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Keys of `identity` that `settings` has otherwise, nested ones with dots."""
    keys = []
    for key, value in identity.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), Mapping):
            keys += [f"{key}.{inner}" for inner in _differing(settings[key], value)]
        elif settings.get(key) != value:
            keys.append(key)
    return keys
