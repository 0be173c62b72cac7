"""What every reward is: a class that carries its facts and gives one score per image.

Nothing heavy is imported here or by the modules of rewards themselves, so that a command line knows a reward, its
options and its needs before torch is there; a reward imports its network when it is made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

from annotated_types import Ge

from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.recipe import Recipe

FAMILIES = ("conditional", "quality", "realism")  # r_C, r_I, r_R of equations 7 to 9
SCOPES = ("image", "group", "batch")  # what a reward looks at before it scores an image

# Of options; `Reward.check_options` holds values against the annotations of a constructor.
File = str | Path | None  # a local one, in the place of the published or bundled one
Count = Annotated[int, Ge(1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Needs(NamedTuple):
    """What a reward network needs before it can score; nothing for a bundled one.

    Attributes:
        files: of the hub.
        packages: names to import, each with what pip installs for it.
        weights: bytes of the network on the device; None where nobody knows before it is loaded.
        working: bytes more while it scores, where it is more than a little.
        network: what is loaded, so that rewards which share a network are counted once.
        server: whether another machine scores; then all of the above is nothing.
        missing: what the recipe has to say and does not.
    """

    files: tuple[HubFile, ...] = ()
    packages: Mapping[str, str] = {}
    weights: int | None = 0
    working: int = 0
    network: str = ""
    server: bool = False
    missing: str = ""


class Reward:
    """A reward model: one raw score per image, in the reward's own unit.

    A subclass takes `device` and, by keyword, its options, which `check_options` has held against their annotations.
    It raises UserError for weights that are missing, damaged or of another network, and for a package that is not
    installed. What it can say without its network are class attributes:

    Attributes:
        name: as on the command line.
        family: one of `FAMILIES`; it decides which lambda applies.
        scope: one of `SCOPES`. A reward of scope image implements `score`; one of scope group or batch implements
            `compare`, for the images of one condition or all images of an update, and `look` where it does not need
            the images themselves for that.
        low, high: the range of its scores; one outside it is taken for none.
        factor: what brings the paper's own rewards to a like scale (appendix D).
        reads_prompt: what the image should show is looked at, too.
        reads_policy: `compare` is given, in the place of what `look` sees, mean entropies of the policy and of the
            reference on each image and the total of the other rewards, [N, 3]; training alone has those.
        label, unit, divisor: of its column in table 4: the heading, the unit there, and what a raw score is divided by.
        files: of the hub, under the option that names a local file in its place.
        parameters, network_name: of what is loaded, in the number format of the option dtype.
        packages, working: see `Needs`.
        remote: another machine scores; the device is free meanwhile.
        mixed: of no published unit that rounding would miss: training in bfloat16 may compute it so.
        last_error: why the latest score that is missing is.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = "conditional"
    scope: ClassVar[str] = "image"
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    factor: ClassVar[float] = 1.0
    reads_prompt: ClassVar[bool] = True
    reads_policy: ClassVar[bool] = False
    label: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    divisor: ClassVar[float] = 1.0
    files: ClassVar[Mapping[str, HubFile]] = {}
    packages: ClassVar[Mapping[str, str]] = {}
    parameters: ClassVar[int] = 0
    working: ClassVar[int] = 0
    network_name: ClassVar[str] = ""
    remote: bool = False
    mixed: ClassVar[bool] = False
    last_error: str = ""

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """What it needs with these options.

        Args:
            device: where it is to run; a judge takes half the memory on a GPU.

        Raises:
            UserError: an option that decides what is fetched has a value that there is not.
        """
        return cls.network_needs(options, cls.files, cls.parameters, cls.network_name)

    @classmethod
    def unfit(cls, options: Mapping[str, Any], recipe: Recipe) -> str:
        """Why a recipe of GRPO makes no sense with it, in words that follow its name; "" where it does."""
        return ""

    @classmethod
    def network_needs(
        cls, options: Mapping[str, Any], files: Mapping[str, HubFile], parameters: int | None, network: str
    ) -> Needs:
        """The needs of a network with those of `files` for which no option names a local one."""
        width = 4 if options.get("dtype", "float32") == "float32" else 2
        apart = [str(options[key]) for key in ("dtype", *files) if options.get(key) is not None]
        return Needs(
            tuple(file for option, file in files.items() if options.get(option) is None),
            cls.packages,
            None if parameters is None else width * parameters,
            cls.working,
            network + (f" ({', '.join(apart)})" if apart else ""),
        )

    @classmethod
    def path(cls, option: str, local: str | Path | None) -> Path:
        """The file that stands under an option: the local one that it names, else the hub's; UserError without it."""
        from argrpo_cli.networks.weights import published_file

        return published_file(cls.files[option].repo, cls.files[option].file, local, option)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """UserError for an option that it does not have, or a value that the constructor's annotation forbids."""
        from pydantic import ConfigDict, TypeAdapter, ValidationError

        hints = option_types(cls)
        for key, value in options.items():
            if key not in hints:
                has = f"it has {', '.join(hints)}" if hints else "it has none"
                raise UserError(f"reward {cls.name}: no option {key!r}; {has}{did_you_mean(key, hints)}")
            plain = hints[key].__origin__ if hasattr(hints[key], "__metadata__") else hints[key]
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                problem = error.errors()[0]
                if problem["type"] == "literal_error":
                    choose(f"reward {cls.name}", key, value, get_args(plain))
                mend = f"expected {getattr(plain, '__name__', str(plain)).replace('pathlib.', '')}"
                if problem["type"].startswith(("greater", "less")):
                    mend = problem["msg"].replace("Input should", "it must")
                raise UserError(f"reward {cls.name}: {key} is {value!r}; {mend}") from error

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a condition that it cannot read."""

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B], NaN where there is no score; UserError as `check`."""
        raise NotImplementedError

    @classmethod
    def derived(cls, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """The reward, with its options, whose scores are all that these scores need; None for one that looks itself."""
        return None

    def derive(self, scores: Tensor) -> Tensor:
        """Float32 [B] from those scores [B], NaN where they are."""
        raise NotImplementedError

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """What `compare` has to know of uint8 [B, 3, H, W], [B, ...]: the images, unless a reward needs less."""
        return images

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """What `look` gave of all images of the scope, [N, ...] on the CPU, to float32 [N]; pure, as it may be asked
        again before an update is settled. All processes compute it, each of all images."""
        raise NotImplementedError

    def advance(self, seen: Tensor) -> None:
        """Take up into `state` what was seen of an update's images, once for each update."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers of earlier updates: a checkpoint has it."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""

    def stop(self) -> None:
        """Break off a `score` in another thread that waits for another machine."""


def option_types(reward: type[Reward]) -> dict[str, Any]:
    """Options to their types: the keywords of its constructor and, where that passes others on, of those before it."""
    types: dict[str, Any] = {}
    for one in reward.__mro__:
        if constructor := vars(one).get("__init__"):
            parameters = inspect.signature(constructor).parameters.values()
            hints = get_type_hints(constructor, include_extras=True)
            own = {each.name: hints[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
            types |= {name: hint for name, hint in own.items() if name not in types}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return types


def choose(name: str, option: str, value: str, allowed: Sequence[str]) -> None:
    """UserError, with the values there are, for a value of an option that is none of them."""
    if value not in allowed:
        raise UserError(
            f"{name}: {option} {value!r} is unknown; there are {', '.join(allowed)}{did_you_mean(value, allowed)}"
        )
