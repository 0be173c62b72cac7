"""Writing files so that a reader never sees half of one, reading small ones, fetching published ones."""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.plain import check_shape, lines_of, parse_json, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

WEIGHTS = Path(__file__).parents[1] / "nano" / "weights"  # the networks that come with the package, a folder each


def reason(error: OSError) -> str:
    """The operating system's own words for an error, without the number and the path."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder in the place of ~ or ~name; UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no user, or no home folder, for the ~ in it") from error


def cannot_write(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The error to raise when `path` could not be written."""
    return UserError(f"cannot write {path}: {reason(error)}")


@contextmanager
def writable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within this context an OSError is a UserError: `path` could not be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def stamp_of(path: str | os.PathLike[str]) -> str:
    """What changes when a file does: its size and time; OSError where there is none."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def check_regular(path: str | os.PathLike[str]) -> None:
    """OSError for what is no file, links followed: a pipe without a writer would keep the reader waiting for ever, a
    device such as /dev/zero would never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open refuses a folder
        kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise OSError(errno.EINVAL, f"it is a {kind}, not a file", str(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file opened for reading, links followed; OSError for what is none, see `check_regular`."""
    check_regular(path)
    at_once = getattr(os, "O_NONBLOCK", 0)  # should it have become a pipe since
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))


@contextmanager
def readable(
    path: str | os.PathLike[str], damaged: tuple[type[Exception], ...] = (), why: str = "it is damaged"
) -> Iterator[None]:
    """Within this context an OSError is a UserError `cannot read <path>: <the system's reason>`.

    Args:
        path: what is read, or words for it.
        damaged, why: errors that say something else, and what.
    """
    try:
        yield
    except damaged as error:
        raise UserError(f"cannot read {path}: {why}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def make_dir(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents; UserError when something is in the way."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {reason(error)}") from error
    return path


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Find out before long work whether files can be written to a folder, there already or not; it is not created.

    Raises:
        UserError: they cannot.
    """
    folder = Path(folder)
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise cannot_write(folder, OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        what = "it" if there == folder else there
        raise UserError(f"cannot write to {folder}: {what} is a file, not a folder")
    with writable(folder), tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    On any error the temporary file is removed and an older `path` stays as it was. OSError (disk full, no
    permission, a file where a folder should be, ...) becomes UserError naming `path` and the reason.
    The temporary name ends like `path`, so that writers which look at the suffix work.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder", str(path))
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=f"-{path.name}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        open_to_all(temporary)  # mkstemp gives 0600
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically; a byte of a file name that is none is written as `\\udce9`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text, its ends of lines as they are.

    Raises:
        UserError: it names the path, which is missing, unreadable, not text, or no file that comes to an end.
    """
    with readable(path, (UnicodeDecodeError,), "it is not UTF-8 text"), open_regular(path) as file:
        return TextIOWrapper(file, encoding="utf-8-sig", newline="").read()  # Windows writes a mark at the start


def fill_template(path: Path, **values: Any) -> str:
    """A template of jinja2 with these values; in HTML they are escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=".html" in path.suffixes,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(read_text(path)).render(values)


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {text.strip()[:40]!r}")
    return value


def read_json(path: str | os.PathLike[str], shape: Any = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        shape: see `check_shape`.

    Raises:
        UserError: it names the path, which is missing, unreadable, something else or of another shape.
    """
    value = _json_object(read_text(path), f"cannot read {path}")
    return value if shape is None else check_shape(value, shape, str(path))


def read_jsonl(path: str | os.PathLike[str], shape: Any = None) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; UserError names the file and the line that is none, see `read_json`."""
    rows = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            row = _json_object(line, where)
            rows.append(row if shape is None else check_shape(row, shape, where))
    return rows


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [B, 3, H, W] on any device to B pictures of Pillow, RGB; one transfer."""
    from PIL import Image

    return [Image.fromarray(one) for one in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def save_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a PIL image as PNG, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def save_figure(path: str | os.PathLike[str], figure: Figure, dpi: int = 110) -> None:
    """Write a figure of matplotlib as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def user_cache() -> Path:
    """`argrpo` in the user's cache directory; what lies there can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argrpo"


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        except SafetensorError as error:  # carries the system's reason in its text, a full disk for instance
            raise UserError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """The contents of a .safetensors file; None where there is none, or one that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if Path(path).is_file() else None
    except (OSError, SafetensorError):
        return None


def open_to_all(path: str | os.PathLike[str]) -> None:
    """Let everyone read a file whom the umask allows; some libraries make theirs for the owner alone."""
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


class HubFile(NamedTuple):
    """A file of a hub repository, and how large it is, in bytes, as far as that is known."""

    repo: str
    file: str
    size: int | None = None


def is_cached(one: HubFile, revision: str | None = None) -> bool:
    """Whether `fetch` would find the file on this machine; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(one.repo, one.file, revision=revision), str)
    except HFValidationError as error:
        raise UserError(f"{one.repo!r} is no name of a hub repository, such as owner/name") from error


def in_cache(repo: str) -> bool:
    """Whether there is any file of a hub repository on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}").is_dir()


def fetch_folder(repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A hub repository's files of these patterns, in Hugging Face's cache; fetched where they are not all there.

    Args:
        revision: a commit, branch or tag; None is the newest.

    Raises:
        UserError: no network, no such repository or revision, no room.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from argrpo_cli.system.hub import require_hub

    get = partial(huggingface_hub.snapshot_download, repo, revision=revision, allow_patterns=list(patterns))
    try:
        try:
            folder = Path(get(local_files_only=True))
            if _is_whole(folder):
                return folder
        except LocalEntryNotFoundError:
            pass
        require_hub()
        print(f"fetching {repo}", file=sys.stderr, flush=True)
        return Path(get(local_files_only=False))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_fetched(error, repo, None, revision) from error


def check_fetched(repo: str, file: str = "", revision: str | None = None) -> None:
    """UserError where a file, or a repository without `file`, is neither in the cache nor can the hub be reached."""
    from huggingface_hub import constants

    from argrpo_cli.system.hub import require_hub

    if not is_cached(HubFile(repo, file or "config.json"), revision):
        try:
            if constants.is_offline_mode():  # `require_hub` leaves that to the library, which is not asked here
                raise ConnectionError("the hub is not asked, HF_HUB_OFFLINE is set")
            require_hub()
        except OSError as error:
            raise _not_fetched(error, repo, file or None, revision) from error


def _not_fetched(error: Exception, repo: str, file: str | None, revision: str | None = None) -> UserError:
    """What to say of a file, or of a whole repository, that cannot be fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    why = "the hub is not reached, and it is not in the cache"
    if not isinstance(error, LocalEntryNotFoundError):
        why = first_line(error)
        why += ", and it is not in the cache" if isinstance(error, ConnectionError) else ""
    if file is not None:
        mend = f"download https://huggingface.co/{repo}/resolve/main/{file} and give the file instead"
        return UserError(f"cannot fetch {file} of {repo}: {why}; {mend}")
    at = "" if revision is None else f" --revision {revision}"
    mend = f"fetch it elsewhere with `hf download {repo}{at} --local-dir FOLDER` and give FOLDER instead"
    return UserError(f"cannot fetch {repo}: {why}; {mend}")


def _is_whole(folder: Path) -> bool:
    """Whether a model's folder has its weights in full: an interrupted download leaves some behind."""
    index = folder / "model.safetensors.index.json"
    files = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return all((folder / name).is_file() for name in ("config.json", *files))


def fetch(repo: str, file: str) -> Path:
    """A file of the hub in Hugging Face's cache; fetched, or fetched further, with a progress bar where it is not.

    Raises:
        UserError: no network, no such file, no room.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from argrpo_cli.system.hub import quiet_hub, require_hub

    try:
        with quiet_hub():
            try:
                return Path(hf_hub_download(repo, file, local_files_only=True))
            except LocalEntryNotFoundError:
                require_hub()
                print(f"fetching {file} of {repo}", file=sys.stderr, flush=True)
                return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_fetched(error, repo, file) from error
