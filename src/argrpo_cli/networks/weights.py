"""Weights on disk: files read without running pickled code, networks filled strictly, nothing ever half written.

network = load_network(QualityNet, folder)                                   # a folder of the nano world
fit_state(network, read_state(published_file(repo, file, weights)), file)    # what others published
model = load_pretrained(LlamaGenForImageGeneration, folder, torch.float32)   # a folder of transformers
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import TypedDict

from argrpo_cli.system.errors import UserError, first_line, some_names
from argrpo_cli.system.files import (
    cannot_write,
    check_regular,
    fetch,
    open_to_all,
    read_json,
    readable,
    save_tensors,
    write_json,
)
from argrpo_cli.system.plain import check_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Model = TypeVar("Model", bound="PreTrainedModel")
Plain = TypeVar("Plain", bound=nn.Module)
# In the keys of a configuration that say how often a part is repeated; max_window_layers, of Qwen, is only a bound.
DEPTH = re.compile("(?<!window_)layers|depth|res_blocks")
MOST_LAYERS = 1000  # where the weights are of a kind whose names cannot be read without them


# files of weights


def published_file(
    repo: str, files: str | Sequence[str], weights: str | Path | None = None, option: str = "weights"
) -> Path:
    """The local file `weights` when it is given, else the first of `files` that a hub repository has, fetched once.

    Raises:
        UserError: the local file is absent, or the hub's cannot be fetched.
    """
    names = [files] if isinstance(files, str) else list(files)
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"weights not found: {weights}; give the file {names[0]} of https://huggingface.co/{repo}")
        return Path(weights)
    first: UserError | None = None
    for name in names:
        try:
            return fetch(repo, name)
        except UserError as error:
            first = first or UserError(str(error).replace("give the file instead", f"give it as the option {option}"))
    raise first or ValueError("no file asked for")


def read_state(path: str | Path, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a torch file (`weights_only`: no pickled code is run).

    Args:
        wrappers: keys under which a torch file may hold it; the first that is there is opened.

    Raises:
        UserError: the file is absent, damaged or something else.
    """
    path = Path(path)
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        # LlamaGen's trainer stored its command-line arguments beside the weights; Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UserError(f"weights not found: {path}") from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        why = "it is cut off, damaged or something else"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            why = "it holds more than weights, and pickled code is not run"
        raise UserError(f"{path} is not a readable file of weights: {why}") from error
    for key in wrappers:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            what = f"of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{path} holds no state dict of tensors: {key!r} is {what}")
    return content


def fit_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give `network` all of `state`, in `dtype` where it is floating point; nothing may be missing or left over.

    The network may live on the meta device: it takes the tensors as they are.

    Args:
        names: the network's own name of a key of `state`, where that is another one. Messages have those of `state`.

    Raises:
        UserError: `source`, and the keys that are missing, unexpected, of another shape or another kind of number.
    """
    names = names or {}
    back = {own: key for key, own in names.items()}
    expected = {back.get(key, key): value for key, value in network.state_dict().items()}
    both = [(key, value, state[key]) for key, value in expected.items() if key in state]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "wrong shape": [
            f"{key} is {list(new.shape)}, expected {list(own.shape)}"
            for key, own, new in both
            if own.shape != new.shape
        ],
        "wrong numbers": [
            f"{key} is {new.dtype}"
            for key, own, new in both
            if own.is_floating_point() != new.is_floating_point() or new.layout != torch.strided
        ],
    }
    if any(problems.values()):
        listing = "; ".join(f"{what} {some_names(keys)}" for what, keys in problems.items() if keys)
        raise UserError(f"weights do not fit: {source} ({listing})")
    values = {names.get(key, key): new.to(dtype) if own.is_floating_point() else new for key, own, new in both}
    network.load_state_dict(values, assign=True)


def fingerprint(modules: Iterable[nn.Module], settings: Mapping[str, Any] | None = None) -> str:
    """A hash over a thousand numbers of every weight, and over plain `settings`: sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().flatten()
            some = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy()
            digest.update(name.encode() + np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()[:16]


# folders of the nano world: config.json and float16 weights in model.safetensors


def save_network(folder: str | Path, network: nn.Module, config: dict[str, Any]) -> None:
    """Write `config` and the float16 weights of `network` into `folder`."""
    write_json(Path(folder) / "config.json", config)
    state = network.state_dict().items()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state}
    save_tensors(Path(folder) / "model.safetensors", halves)


def load_weights(network: nn.Module, folder: str | Path, device: str = "cpu") -> nn.Module:
    """Fill `network` with the weights of `folder`: float32, evaluation mode, no gradients, on `device`."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"weights not found: {path}; install the package again or rebuild them with `make nano`")
    fit_state(network, read_state(path), path)
    return network.to(device).eval().requires_grad_(False)


def load_network(kind: type[nn.Module], folder: str | Path, device: str = "cpu") -> nn.Module:
    """A network of the configuration and with the weights of `folder`, as `load_weights`."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    check_depth(config, len(weight_shapes(Path(folder))), str(path))
    with describing(path):
        network = kind(**config)
    return load_weights(network, folder, device)


# folders of transformers


def weight_shapes(folder: Path, files: str = "model*.safetensors") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in files of a folder, of which the headers alone are read.

    Raises:
        UserError: a file that cannot be read, or is not as long as its header says.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob(files)):
        with readable(path):
            check_regular(path)
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot load {folder}: {first_line(error)}; the file is damaged") from error
    return shapes


def read_config(kind: type[Model], folder: Path) -> PreTrainedConfig | None:
    """The config.json of a model of this kind; None for a class of transformers' that chooses one.

    What it says is checked before anything is built of it: our own configurations by the types and ranges of their
    keys, and every number of layers by that of the tensors beside it.

    Raises:
        UserError: it is missing, damaged, of another kind of model, or says what cannot be.
    """
    config, own = checked_config(kind, folder), getattr(kind, "config_class", None)
    if own is None:
        return None
    with describing(folder / "config.json"):
        return own(**config)


def checked_config(kind: type[nn.Module], folder: Path) -> dict[str, Any]:
    """The config.json of a folder as plain data, see `read_config`."""
    path, own = folder / "config.json", getattr(kind, "config_class", None)
    config = read_json(path)
    expected = getattr(own, "model_type", None)
    if expected is not None and config.get("model_type") != expected:
        raise UserError(f"{folder} holds a {config.get('model_type')!r} model; expected {expected!r}")
    check_depth(config, len(weight_shapes(folder)), str(path))
    keys: dict[str, Any] = {}
    for one in reversed(own.__mro__ if own is not None else ()):
        if one.__module__.startswith("argrpo_cli."):
            keys |= inspect.get_annotations(one, eval_str=True)
    return check_shape(config, TypedDict("Config", keys, total=False), str(path))


@contextmanager
def describing(config: str | Path) -> Iterator[None]:
    """Within this context, where a network is built of a configuration, any error but our own is a UserError: sides
    that are no numbers, negative, or too large to multiply make libraries raise nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{config} describes no model: {first_line(error)}") from error


def check_depth(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """UserError where a configuration has more layers than there are tensors (0: it is not known) in the weights."""
    limit = f"there are {tensors} tensors in the weights" if tensors else f"no network has more than {MOST_LAYERS}"
    for key, number in _numbers(config):
        if DEPTH.search(key) and number > (tensors or MOST_LAYERS):
            raise UserError(f"{where}: {key} is {number}, and {limit}")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in plain data, each with the key that it stands under."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float):
        yield key, value


def load_plain(kind: type[Plain], folder: Path, dtype: torch.dtype) -> Plain:
    """As `load_pretrained`, of a network whose `config_class` is a plain dataclass: nothing of transformers is
    imported. In evaluation mode.

    Raises:
        UserError: files missing or damaged, another kind of model, keys or shapes that do not fit.
    """
    network, state = outline_plain(kind, folder), {}
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"cannot load {folder}: no file model.safetensors")
    for file in files:
        state |= read_state(file)
    own = network.state_dict()
    for what, names in (("missing keys", own.keys() - state.keys()), ("unexpected keys", state.keys() - own.keys())):
        if names:
            raise UserError(f"cannot load {folder}: {len(names)} {what} such as {min(names)}")
    fit_state(network, state, folder, dtype=dtype)
    return network.eval()


class _Uninitialised(TorchFunctionMode):
    """In this mode torch.nn.init leaves tensors alone: of those without numbers it would load torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def blank() -> Iterator[None]:
    """Within this context networks are built with shapes and no numbers, to be filled by `fit_state`."""
    with torch.device("meta"), _Uninitialised():
        yield


def outline_plain(kind: type[Plain], folder: Path) -> Plain:
    """A network of a plain dataclass on the meta device, as its config.json and its weights both say."""
    config, names = checked_config(kind, folder), {one.name for one in fields(kind.config_class)}
    with describing(folder / "config.json"), blank():
        network = kind(kind.config_class(**{key: value for key, value in config.items() if key in names}))
    return _agreed(network, folder)


def outline(kind: type[Model], folder: Path) -> Model:
    """The model of a folder on the meta device: shapes and no numbers, as its config.json and its weights both say.

    Raises:
        UserError: see `read_config`; or the two do not agree.
    """
    config = read_config(kind, folder)
    with describing(folder / "config.json"), torch.device("meta"), quiet_transformers():
        model = kind(config)
    return _agreed(model, folder)


def _agreed(model: Model, folder: Path) -> Model:
    """The model; UserError where a weight in the folder has another shape than its config.json says."""
    shapes = weight_shapes(folder)
    for key, value in model.state_dict().items():
        if key in shapes and shapes[key] != tuple(value.shape):
            own, saved = list(value.shape), list(shapes[key])
            raise UserError(f"cannot load {folder}: {key} is {saved}, config.json says {own}")
    return model


def load_pretrained(
    kind: type[Model], folder: Path, dtype: torch.dtype, optional: tuple[str, ...] = (), **more: Any
) -> Model:
    """`from_pretrained` from a local folder that accepts nothing less than the complete weights of this kind.

    Args:
        kind: a class of models, or of transformers' classes that choose one.
        optional: ends of keys that may be missing or unexpected.
        more: for `from_pretrained`.

    Raises:
        UserError: files missing or damaged, another kind of model, keys or shapes that do not fit.
    """
    if hasattr(kind, "config_class"):
        outline(kind, folder)  # what it refuses would cost memory, or never end
    else:
        read_config(kind, folder)
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
                **more,
            )
    except Exception as error:  # of damaged files it makes nearly anything
        raise UserError(f"cannot load {folder}: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(key for key in info[what] if not key.endswith(optional)):
            raise UserError(f"cannot load {folder}: {len(keys)} {what.replace('_', ' ')} such as {keys[0]}")
    for key, saved, own in sorted(info["mismatched_keys"]):
        raise UserError(f"cannot load {folder}: {key} is {list(saved)}, config.json says {list(own)}")
    return model


def load_tokenizer(kind: Any, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by one of transformers' classes.

    Raises:
        UserError: files missing or damaged.
    """
    read_json(folder / "tokenizer.json")  # whose faults the library tells in its own words
    try:
        with quiet_transformers():
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
            tokenizer("a")  # some damage shows only when it reads
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of damaged files it makes nearly anything, and what is in Rust panics
        raise UserError(f"cannot load the text tokenizer of {folder}: {first_line(error)}") from error
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` beside and then into a folder, so that no file in it is ever half written."""
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as fresh, quiet_transformers():
            model.save_pretrained(fresh)
            for file in sorted(Path(fresh).iterdir()):
                open_to_all(file)
                with open(file, "rb") as written:
                    os.fsync(written.fileno())  # or a power cut may leave the name without the contents
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error if isinstance(error, OSError) else OSError(str(error))) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load reports: loading either works or raises one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
