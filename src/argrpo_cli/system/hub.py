"""The hub: names of repositories there, and whether it can be reached, told before the library has tried for long."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from argrpo_cli.system.errors import UserError

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATIENCE = 1.0  # seconds for a connection; one that takes longer is slow, and no sign that there is none
PAUSE = 0.3  # seconds before a name is asked for again that was said to be unknown for now


def require_hub() -> None:
    """Return where the hub may be reached, or the library knows itself that it may not (HF_HUB_OFFLINE).

    A connection that times out may come about later, and the library asks for it five times more with growing pauses.
    Without a network there is nothing to wait for.

    Raises:
        ConnectionError: its name (or that of the proxy before it) cannot be resolved, there is no route to it, or
            nobody listens there.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return
    place = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(place.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(place.hostname):
        place = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    try:
        try:
            _connect(place.hostname, place.port or (443 if place.scheme == "https" else 80))
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                raise
            time.sleep(PAUSE)
            _connect(place.hostname, place.port or (443 if place.scheme == "https" else 80))
    except TimeoutError:
        return
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConnectionError(f"the hub is not reached ({place.hostname}: {why})") from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Within this context the library does not tell of every attempt: the outcome is enough."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _connect(host: str | None, port: int) -> None:
    socket.create_connection((host, port), PATIENCE).close()


def check_repo(name: str) -> None:
    """UserError for what is no name of a repository of one's own on the hub."""
    if not REPO.fullmatch(name) or len(name) > 96 or "--" in name or ".." in name or name.endswith((".git", "-", ".")):
        raise UserError(f"{name!r} is no name on the hub: give USER/NAME, of letters, digits, '-', '_' and '.'")


def repo_of(name: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Repository and revision of `user/name` or `user/name@revision`; None for what is, or looks like, a path here."""
    repo, at, revision = str(name).partition("@")
    if not REPO.fullmatch(repo) or (at and not revision):
        return None
    return None if Path(str(name)).exists() or Path(repo).parent.exists() else (repo, revision or None)
