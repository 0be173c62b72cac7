"""Rewards of one's own: a plain function of images and conditions.

    # brightness.py
    def reward(images, conditions):
        return images.float().mean((1, 2, 3)) / 255

is the reward `brightness:reward` wherever a reward is named. `images` is uint8 [B, 3, H, W] on the device of the other
rewards, `conditions` has B items with `.prompt` and `.class_id`; B numbers come back, NaN or None where there is none.
`reward.family = "quality"` (or "realism") says that it does not look at the prompt. `reward.scope = "group"` says that
it compares the images of one condition, "batch" that it compares all images of an update: it is called with those of
all processes then. A package offers one under a name of its own as an entry point of the group `argrpo.rewards`.

`brightness:reward` is looked for in the working directory and among what is installed; `path/brightness.py:reward` is
that file, in a recipe relative to the recipe's own folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from argrpo_cli.rewards.base import FAMILIES, SCOPES, Reward, choose
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, first_line, out_of_memory
from argrpo_cli.system.files import expanded
from argrpo_cli.system.references import IN_FILE

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "argrpo.rewards"


@cache
def find_function(name: str) -> Callable[..., Any] | None:
    """The function behind `module:function`, `path/file.py:function` or an entry point's name; None for other names.

    Modules are also looked for in the working directory.

    Raises:
        UserError: the module cannot be imported, or has no such function.
    """
    point = next(iter(entry_points(group=GROUP, name=name)), None)
    target = point.value if point is not None else name
    if IN_FILE in target:
        return _function_in(name, *target.rsplit(":", 1))
    module, colon, attribute = target.partition(":")
    if not colon or not module or not attribute:
        return None
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise UserError(
            f"reward {name}: write module:function with Python's names, such as brightness:reward, or a file as "
            "path/brightness.py:reward"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever its author's code raises while it is imported
        where = f" (looked in {os.getcwd()} and among what is installed)" if isinstance(error, ImportError) else ""
        raise UserError(f"reward {name}: cannot import {module}: {_in_words(error)}{where}") from error
    return _checked(name, function, module, attribute)


def _function_in(name: str, file: str, attribute: str) -> Callable[..., Any]:
    """A function of a file, which may import what lies beside it."""
    path = expanded(file).absolute()
    if not path.is_file():
        raise UserError(f"reward {name}: no file {path}")
    # Its own name would take the place of a module that is called alike.
    key = f"argrpo_reward_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever its author's code raises while it is imported
        del sys.modules[key]
        raise UserError(f"reward {name}: cannot import {path}: {_in_words(error)}") from error
    return _checked(name, getattr(module, attribute, None), str(path), attribute)


def _checked(name: str, function: Any, place: str, attribute: str) -> Callable[..., Any]:
    if not callable(function):
        raise UserError(f"reward {name}: {place} has no function {attribute!r}")
    return function


def reward_of(name: str, function: Callable[..., Any]) -> type[Custom]:
    """A function as a class of rewards; UserError where its family or scope is none."""
    family = getattr(function, "family", "conditional")
    if family not in FAMILIES:
        raise UserError(f"reward {name!r}: its family is {family!r}; choose one of {', '.join(FAMILIES)}")
    scope = getattr(function, "scope", "image")
    choose(f"reward {name!r}", "scope", scope, SCOPES)
    facts = {"name": name, "family": family, "scope": scope, "reads_prompt": family == "conditional"}
    return type("Own", (Custom,), {**facts, "function": staticmethod(function)})


class Custom(Reward):
    """A function as a reward; its options are passed on as keyword arguments."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, device: str = "cpu", /, **options: Any):  # a function may have an option "device"
        self.device, self.options = device, options

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """UserError for options that the function does not take."""
        try:
            inspect.signature(cls.function).bind(None, None, **options)
        except TypeError as error:
            raise UserError(f"reward {cls.name} takes images, conditions and its options: {error}") from error
        except ValueError:
            pass  # written in C: it has no signature to look at

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Float32 [B] of what the function returns; UserError, which names it, where it fails or gives no B numbers."""
        import torch

        try:
            result = self.function(images.clone(), list(conditions), **self.options)  # which it may write into
            if result is None:
                raise TypeError("it returned None; return a score for each image")
            if not isinstance(result, torch.Tensor):
                result = torch.tensor([math.nan if one is None else float(one) for one in result])
            scores = result.detach().float().flatten()
        except (Exception, SystemExit) as error:  # whatever its author's code raises
            if out_of_memory(error):
                raise  # the caller halves the batch
            raise UserError(f"reward {self.name} failed: {_in_words(error)}") from error
        if len(scores) != len(images):
            raise UserError(f"reward {self.name} returned {len(scores)} scores for {len(images)} images")
        return scores

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """`score` of all images of the scope."""
        return self.score(seen.to(self.device), conditions)


def _in_words(error: BaseException) -> str:
    """What was raised, and the line of the author's file where."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = next((one for one in reversed(frames) if one.filename != __file__), None)
    where = f" ({os.path.basename(inner.filename)}, line {inner.lineno})" if inner and inner.line else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
