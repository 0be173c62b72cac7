"""Captions in data sets: those of the Hugging Face hub, and folders and files that its library reads.

All of them at once, or as a stream that is read as far as training gets: group after group takes the next one.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from typing_extensions import TypedDict

from argrpo_cli.captions import captions_in, normalized
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean, first_line
from argrpo_cli.system.files import expanded
from argrpo_cli.system.plain import Index, check_shape

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from argrpo_cli.recipe.sections import DatasetSection

BUILDERS = {  # file name ending to the library's name of the format
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
WINDOW = 1024  # latest captions that stay at hand: a batch asks in any order, and each process for its own groups
HOPELESS = 1000  # captions skipped before one could be used: then something is wrong with all of them
DIGEST = 8  # bytes of a caption's hash, of which the state keeps one for each caption of this pass


class StreamState(TypedDict):
    """Where a stream is, as a checkpoint holds it."""

    conditions: str
    group: Annotated[int, Ge(0)]
    taken: Annotated[int, Ge(0)]
    skipped: Annotated[int, Ge(0)]
    rows: dict[str, Any] | None
    rest: list[str]
    window: dict[Index, str]
    seen: str


Check = Callable[[Sequence[Condition]], None]


def open_captions(section: DatasetSection) -> Dataset | IterableDataset:
    """The data set, with its column of captions alone; a stream has read nothing but its head by then.

    Args:
        section: `conditions.dataset` of a recipe. `name` is a name on the hub, a folder of json, csv, parquet or arrow
            files, a folder of `save_to_disk`, or one such file.

    Raises:
        UserError: not there, not reached, or no such configuration, split, revision or column.
    """
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    with _in_one_line(section):
        if section.streaming:
            disable_progress_bar()
        try:
            data = _load(section)
        finally:
            if bars:
                enable_progress_bar()
        if data.column_names is not None and section.column not in data.column_names:
            columns = data.column_names
            hint = did_you_mean(section.column, columns) or f"; there are {', '.join(columns)}"
            raise UserError(f"conditions.dataset.column: {section.name} has no column {section.column!r}{hint}")
        # Nothing else is read or decoded: data sets of captions come with pictures.
        return data if data.column_names is None else data.select_columns([section.column])


def _load(section: DatasetSection) -> Dataset | IterableDataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = expanded(section.name)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if section.split not in data:
                raise ValueError(f"no split {section.split!r}; there are {', '.join(data)}")
            data = data[section.split]
        return data.to_iterable_dataset() if section.streaming else data
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a file ending in {path.suffix!r}; it reads {', '.join(BUILDERS)}")
        if (section.config, section.split, section.revision) != (None, "train", None):
            raise ValueError("config, split and revision are of a data set, and this is one file; leave them out")
        delimiter = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(
            BUILDERS[path.suffix], data_files=str(path), split="train", streaming=section.streaming, **delimiter
        )
    return load_dataset(
        str(path) if path.is_dir() else section.name,
        section.config,
        split=section.split,
        revision=section.revision,
        streaming=section.streaming,
    )


def all_captions(section: DatasetSection) -> Iterator[str]:
    """The captions of a data set that is not a stream, in its order.

    Raises:
        UserError: as `open_captions`, or something else than text in the column.
    """
    for number, row in enumerate(open_captions(section), start=1):
        yield from captions_in(row, section.column, f"{section.name}, row {number}")


@contextmanager
def _in_one_line(section: DatasetSection) -> Iterator[Any]:
    """What the library complains about, in one line with the mend."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # also what pyarrow and the hub raise
        name, why = section.name, first_line(error)
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            why += f"; fetch it with `hf download --repo-type dataset {name} --local-dir DIR` and give that folder"
        raise UserError(f"conditions.dataset: cannot read {name}: {why}") from error


class StreamedConditions:
    """`stream[group]` is the condition of a group: the group-th usable caption of the data set, in its order.

    When the data set or `limit` is exhausted the first caption comes again. Captions that come twice in a pass, and
    those that the policy or a reward cannot read, are passed over; the latter are counted and told once. Which caption
    a group gets depends on the data set alone, whatever was asked before: one that lies far back is found by reading
    from the start. Every process reads for itself.

    Args:
        section: `conditions.dataset` of the recipe.
        deduplicate: `conditions.deduplicate`.
        read: a caption to its condition; UserError for one that the policy cannot read.
    """

    def __init__(self, section: DatasetSection, deduplicate: bool, read: Callable[[str], Condition]) -> None:
        self.section, self.deduplicate, self.read = section, deduplicate, read
        self.checks: list[Check] = []
        self.skipped = 0
        self._fault = ""  # of the latest caption passed over
        self._restart()

    def __repr__(self) -> str:
        """What was asked for, in one line: a run is continued only with the same."""
        one = self.section
        source = (one.name, one.config, one.split, one.revision, one.column, one.limit, self.deduplicate)
        return f"StreamedConditions{source!r}"

    def __getitem__(self, group: int) -> Condition:
        if group < self._group and group not in self._window:
            self._restart()
        while group >= self._group:
            self._advance()
        return self._window[group]

    def require(self, check: Check) -> None:
        """Pass over captions that `check` refuses with UserError; before the first one is read."""
        self.checks.append(check)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON has it; `load_state_dict` of another process goes on from there."""
        return {
            "conditions": repr(self),
            "group": self._group,
            "taken": self._taken,
            "skipped": self.skipped,
            "rows": None if self._data is None else self._data.state_dict(),
            "rest": list(self._rest),
            "window": {str(group): one.prompt for group, one in self._window.items()},
            "seen": base64.b64encode(b"".join(sorted(self._seen))).decode(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; nothing before that is read again.

        Raises:
            UserError: the state is that of another stream, or of none.
        """
        if state.get("conditions") != repr(self):
            raise UserError(f"the position in the captions is that of {state.get('conditions')}, not of {self!r}")
        self._restart()
        check_shape(state, StreamState, "the position in the captions")
        try:
            seen = base64.b64decode(state["seen"])
        except ValueError as error:
            raise UserError(f"the position in the captions is damaged: seen: {error}") from error
        self._group, self._taken, self.skipped = state["group"], state["taken"], state["skipped"]
        self._rest = deque(state["rest"])
        self._window = {int(group): Condition(prompt) for group, prompt in state["window"].items()}
        self._seen = {seen[at : at + DIGEST] for at in range(0, len(seen), DIGEST)}
        if state["rows"] is not None:
            self._open(state["rows"])

    def _restart(self) -> None:
        self._group = 0  # the next caption is this group's
        self._window: dict[int, Condition] = {}
        self._rewind()

    def _rewind(self) -> None:
        """To the first row of a new pass."""
        self._data: IterableDataset | None = None
        self._rows: Iterator[dict[str, Any]] | None = None
        self._rest: deque[str] = deque()  # of a row with several captions
        self._seen: set[bytes] = set()
        self._taken = 0

    def _open(self, state: dict[str, Any] | None = None) -> None:
        self._data = open_captions(self.section)
        if state is not None:
            self._data.load_state_dict(state)
        self._rows = iter(self._data)

    def _advance(self) -> None:
        """Take the next usable caption."""
        while True:
            if self._taken == self.section.limit:
                self._rewind()
            text = self._next_text()
            if text is None:
                if not self._taken:
                    raise UserError(f"conditions.dataset: {self.section.name} has no usable caption{self._why()}")
                self._rewind()
                continue
            if self.deduplicate:
                digest = hashlib.blake2b(normalized(text).encode(), digest_size=DIGEST).digest()
                if digest in self._seen:
                    continue
                self._seen.add(digest)
            condition = self._usable(text)
            if condition is None:
                continue
            self._window[self._group] = condition
            self._window.pop(self._group - WINDOW, None)
            self._group += 1
            self._taken += 1
            return

    def _next_text(self) -> str | None:
        """The next caption, None at the end of the data set."""
        if self._rows is None:
            self._open()
        while not self._rest:
            with _in_one_line(self.section):
                row = next(self._rows, None)
            if row is None:
                return None
            self._rest.extend(captions_in(row, self.section.column, f"conditions.dataset: {self.section.name}"))
        return self._rest.popleft()

    def _usable(self, text: str) -> Condition | None:
        """The condition of a caption; None, and a word the first time, for one that cannot be read."""
        try:
            condition = self.read(text)
            for check in self.checks:
                check([condition])
        except UserError as error:
            self.skipped += 1
            self._fault = str(error)
            if self.skipped == 1:
                print(
                    f"argrpo: warning: captions of {self.section.name} that cannot be read are passed over: {error}",
                    file=sys.stderr,
                )
            if self.skipped >= HOPELESS and not self._group:
                raise UserError(
                    f"conditions.dataset: none of the first {self.skipped} captions of {self.section.name} can be "
                    f"used{self._why()}"
                ) from error
            return None
        return condition

    def _why(self) -> str:
        return f" (the latest: {self._fault})" if self.skipped else f" in the column {self.section.column!r}"
