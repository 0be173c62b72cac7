"""Published files, fetched from their hub when they are first asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from argrpo_cli.system.errors import UserError


class HubFile(NamedTuple):
    """A file of a hub repository, and how large it is, in bytes, as far as that is known."""

    repo: str
    file: str
    size: int | None = None


def is_cached(one: HubFile) -> bool:
    """Whether `fetch` would find the file on this machine; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(one.repo, one.file), str)
    except HFValidationError as error:
        raise UserError(f"{one.repo!r} is no name of a hub repository, such as owner/name") from error


def fetch(repo: str, file: str) -> Path:
    """A file of the hub in Hugging Face's cache; fetched, or fetched further, with a progress bar where it is not.

    Raises:
        UserError: no network, no such file, no room.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of every attempt; the outcome is enough
    try:
        try:
            return Path(hf_hub_download(repo, file, local_files_only=True))
        except LocalEntryNotFoundError:
            print(f"fetching {file} of {repo}", file=sys.stderr, flush=True)
            return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = "the hub is not reached, and it is not in the cache"
        if not isinstance(error, LocalEntryNotFoundError):
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = f"download https://huggingface.co/{repo}/resolve/main/{file} and give the file instead"
        raise UserError(f"cannot fetch {file} of {repo}: {why}; {mend}") from error
    finally:
        hub_logging.set_verbosity(level)
