"""The hub: an answer at once where there is no network, and patience where it is slow."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import check_fetched, fetch, fetch_folder
from argrpo_cli.system.hub import require_hub

GONE = {
    "no such name": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    "no route": OSError(errno.ENETUNREACH, "Network is unreachable"),
    "nobody there": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """An empty cache, and a network of which every connection ends as the last error in the list says."""
    errors: list = []
    asked: list = []

    def connect(place: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(place)
        raise errors[-1]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("argrpo_cli.system.hub.socket.create_connection", connect)
    monkeypatch.setattr("argrpo_cli.system.hub.time.sleep", asked.append)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    errors.append(asked)
    return errors


@pytest.mark.parametrize("error", GONE.values(), ids=GONE)
def test_without_a_network_the_library_is_not_asked(network, error, monkeypatch) -> None:
    def library(*args: object, local_files_only: bool = False, **keys: object) -> None:
        assert local_files_only, "it would try five times, with growing pauses"
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", library)
    monkeypatch.setattr("huggingface_hub.snapshot_download", library)
    network.append(error)
    for ask, repo in ((fetch, ("o/n", "w.pt")), (fetch_folder, ("o/n", ["*"])), (check_fetched, ("o/n", "w.pt"))):
        with pytest.raises(UserError, match=r"the hub is not reached \(huggingface\.co: .*not in the cache; "):
            ask(*repo)


def test_a_slow_network_is_left_to_the_patience_of_the_library(network) -> None:
    network.append(TimeoutError("timed out"))
    require_hub()
    asked = network[0]
    network.append(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    with pytest.raises(ConnectionError, match="temporary failure"):
        require_hub()
    assert asked[-3:] == [("huggingface.co", 443), pytest.approx(0.3), ("huggingface.co", 443)], "asked twice"


def test_a_proxy_is_what_must_be_reached(network, monkeypatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.local:3128")
    network.append(GONE["no route"])
    with pytest.raises(ConnectionError, match=r"proxy\.local: network is unreachable"):
        require_hub()
    assert network[0] == [("proxy.local", 3128)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    require_hub()  # the library knows
    assert network[0] == [("proxy.local", 3128)]
