"""Files that lie at a plain address, and not on the hub: fetched once, into the user's cache."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from urllib.error import URLError

from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import atomic_path, user_cache
from argrpo_cli.system.processes import progress

CHUNK = 2**20
SECONDS = 60  # without a byte from the server


def fetch_url(url: str, option: str, sha256: str = "", note: str = "", name: str = "") -> Path:
    """The file at an address in the user's cache, fetched if it is not there.

    Args:
        option: that takes the file otherwise, for messages.
        sha256: of the file, where it is known.
        note: said before it is fetched, such as its licence.
        name: of the file in the cache, where the address's would not tell it from others.

    Raises:
        UserError: no connection, fewer bytes than announced, or another file than `sha256` is of.
    """
    target = user_cache() / (name or url.rpartition("/")[2])
    if target.is_file():
        return target
    mend, digest = f"download {url} and give the file with {option}", hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as response, atomic_path(target) as temporary:
            size = int(response.headers.get("Content-Length") or 0)
            label = f"fetching {target.name}{f' ({note})' if note else ''}"
            with open(temporary, "wb") as file, progress(label, size // CHUNK, "MB") as advance:
                got = 0
                while block := response.read(CHUNK):
                    got += file.write(block)
                    digest.update(block)
                    advance(round(len(block) / CHUNK))
            if size and got != size:
                raise UserError(f"cannot fetch {url}: it ended after {got:,} of {size:,} bytes; try again, or {mend}")
            if sha256 and digest.hexdigest() != sha256:
                raise UserError(f"cannot fetch {url}: it is another file than the published one; {mend}")
    except (URLError, OSError) as error:
        raise UserError(f"cannot fetch {url}: {first_line(error)}; {mend}") from error
    return target
