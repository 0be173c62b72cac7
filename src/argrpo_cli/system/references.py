"""`path/file.py:function`: functions of the user's by their file."""

from __future__ import annotations

import os

from argrpo_cli.system.files import expanded

IN_FILE = ".py:"  # within such a name


def relative_to(name: str, folder: str | os.PathLike[str]) -> str:
    """A name with its file named from the root, one that is not counted from `folder`; names of other kinds as are."""
    if IN_FILE not in name:
        return name
    file, attribute = name.rsplit(":", 1)
    return f"{os.path.abspath(os.path.join(folder, expanded(file)))}:{attribute}"


def title(name: str) -> str:
    """What such a function is called in tables: without the folders of its file."""
    return name.rpartition("/")[2] if IN_FILE in name else name
