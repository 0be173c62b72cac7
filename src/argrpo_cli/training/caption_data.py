"""Captions in data sets: those of the Hugging Face hub, and folders and files that its library reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli.captions import captions_in
from argrpo_cli.system.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from argrpo_cli.recipe.schema import DatasetSection

BUILDERS = {  # file name ending to the library's name of the format
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip


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
    with told(section):
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

    path = Path(section.name).expanduser()
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
def told(section: DatasetSection) -> Iterator[Any]:
    """What the library complains about, in one line with the mend."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # also what pyarrow and the hub raise
        name = section.name
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            mend = f"; fetch it with `hf download --repo-type dataset {name} --local-dir DIR` and give that folder"
        else:
            mend = ""
        raise UserError(f"conditions.dataset: cannot read {name}: {first_line(error)}{mend}") from error
