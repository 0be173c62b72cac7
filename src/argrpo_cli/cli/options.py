"""What commands share: the options of drawing, lists of names, options of rewards."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError, did_you_mean, printable
from argrpo_cli.system.plain import to_json
from argrpo_cli.system.processes import WARNING, quietly


@dataclass(frozen=True)
class Drawing:
    """What the shared options of a command that draws say: those of `Sampling` that are given, and these.

    Options:
        --cfg-scale: Classifier-free guidance scale, 1 or more; 1 is no guidance.  [default: the policy's own, else 2]
        --temperature: Softmax temperature; 0 takes the likeliest token.  [default: the policy's own, else 1]
        --top-k: Keep the k likeliest tokens; 0 keeps all.  [default: the policy's own, else 0]
        --top-p: Keep the likeliest tokens up to this probability; 1 keeps all.  [default: the policy's own, else 1]
        --cfg-interval: Guide decoding steps 0 to this one only, as LlamaGen; -1: all.  [default: the policy's own,
            else -1]
        --dtype float32|bfloat16|float16: Number format of the policy.
        --seed: Of the noise: another seed, other images.
        --batch-size: Images at a time; by rounding it turns a few tokens.
        --device: auto, cpu, cuda, cuda:1, mps.
        --text-device same|offload|DEVICE: Of the text encoder: beside the policy, there only while it reads captions,
            or elsewhere.
    """

    sampling: Mapping[str, Any]
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    text_device: str = "same"


@dataclass(frozen=True)
class Output:
    """How a command tells what it has found.

    Options:
        --json: Print the result as JSON, and nothing else on standard output.
        --quiet: No progress and no remarks: the table or the JSON alone, and warnings.
    """

    json: bool = False
    quiet: bool = False


AS_TABLE = Output()
OUTPUT: ContextVar[Output] = ContextVar("output", default=AS_TABLE)
SAMPLING = {  # None is not given: a policy may have its own
    name: one if name == "dtype" else one.replace(annotation=one.annotation | None, default=None)
    for name, one in inspect.signature(Sampling, eval_str=True).parameters.items()
}
DRAWING = SAMPLING | dict(list(inspect.signature(Drawing, eval_str=True).parameters.items())[1:])


def command(
    *,
    least: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
    tells: Sequence[str] = ("json", "quiet"),
    **defaults: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose docstring ends with its options, in the words of `--help`.

        Options:
            RECIPE: An argument, by its metavar.
            --n, --per-class NUMBER: An option by its flags, and a metavar if it is to have one;
                further lines are indented.

    A parameter whose type is a dataclass stands for a group of options: its fields, with words in its docstring, which
    the function's own replace. Of `Drawing` those of `Sampling` are options, too; its words serve a command that has an
    option of it alone.

    Args:
        least: name of a number to the least it may be.
        without: options of groups that the command has no use for.
        tells: options of `Output` that it has; `present` and `tell` do as they say.
        defaults: of options of groups, where it has its own.
    """
    least = {"seed": 0, "batch_size": 1, **(least or {})}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(function, eval_str=True).parameters)
        groups = {name: one.annotation for name, one in own.items() if is_dataclass(one.annotation)}
        members = {name: _members(group, without, defaults) for name, group in groups.items()}
        outputs = _members(Output, [one.name for one in fields(Output) if one.name not in tells], {})
        words = {}
        for one in (Drawing, *groups.values(), Output, function):
            words |= _options_in(one)

        @functools.wraps(function)
        def parsed(**values: Any) -> None:
            output = Output(**{name: values.pop(name) for name in outputs})
            for name, group in groups.items():
                given = {key: values.pop(key) for key in members[name]}
                values[name] = _drawing(given) if group is Drawing else group(**given)
            before = OUTPUT.set(output)
            try:
                with quietly(output.quiet):
                    function(**values)
            finally:
                OUTPUT.reset(before)

        parts = [part for name, one in own.items() for part in members.get(name, {name: one}).values()]
        parameters = []
        for one in (*parts, *outputs.values()):
            if one.annotation is not typer.Context:
                flags, metavar, told = words[one.name.strip("_")]
                named = typer.Option(*flags, help=told, metavar=metavar, min=least.get(one.name))
                info = named if flags else typer.Argument(help=told, metavar=metavar, show_default=False)
                one = one.replace(annotation=Annotated[one.annotation, info])
            # By keyword those with and without defaults may come in any order.
            parameters.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        parsed.__signature__ = inspect.Signature(parameters)
        parsed.__doc__ = inspect.getdoc(function).partition("\n\nOptions:")[0]
        return parsed

    return decorate


def _members(group: type, without: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The options of a group, by name."""
    members = DRAWING if group is Drawing else inspect.signature(group, eval_str=True).parameters
    return {
        name: one.replace(default=defaults.get(name, one.default))
        for name, one in members.items()
        if name not in without
    }


def _drawing(given: dict[str, Any]) -> Drawing:
    """What was given of `DRAWING`; UserError for what no policy can be sampled with."""
    sampling = {name: given.pop(name) for name in SAMPLING if name in given}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    Sampling(**sampling).check()
    return Drawing(sampling, **given)


def _options_in(thing: Callable[..., Any]) -> dict[str, tuple[list[str], str | None, str]]:
    """Name to flags, metavar and words of the options in a docstring, see `command`."""
    options = {}
    _, _, text = inspect.getdoc(thing).partition("Options:\n")
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(text)):
        head, _, words = entry.partition(": ")
        flags = re.findall(r"--[\w-]+", head)
        metavar = head.split()[-1] if head and not head.split()[-1].startswith("--") else None
        name = re.sub(r"\W+", "_", flags[0] if flags else head).strip("_").lower()
        options[name] = (flags, metavar, " ".join(map(str.strip, words.splitlines())))
    return options


def tell(text: str) -> None:
    """A line on standard output, or beside JSON on standard error; names of files in it become `printable`."""
    output = OUTPUT.get()
    if not output.quiet:
        print(printable(text), file=sys.stderr if output.json else sys.stdout)


def present(plain: Callable[[], Any], table: Callable[[int], Any] | None = None) -> None:
    """What a command was asked for: plain data as JSON with --json, else a table, if any, for so wide a terminal."""
    if OUTPUT.get().json:
        print(to_json(plain(), indent=2))
    elif table is not None:
        from rich.console import Console

        width = Console().width
        shown = table(width)
        least = Console(width=10**4).measure(shown).minimum
        Console(width=max(width, least)).print(shown)  # wider lines than the terminal's rather than figures in pieces


def warn(text: str) -> None:
    """What to know before believing the numbers, on standard error as soon as it is known."""
    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"{WARNING}{printable(text)}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)


def set_options(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of a command's options that are on the command line, and not left at their defaults."""
    return [name for name in names if name in context.params and context.get_parameter_source(name).name != "DEFAULT"]


def check_policies(
    policies: Sequence[str],
    out: Path | None = None,
    space: str = "",
    seed: int = 0,
    n: int = 1,
    rewards: Mapping[str, Mapping[str, Any]] | None = None,
    networks: Sequence[str] = (),
) -> None:
    """Refuse before torch is loaded what needs none: policies that are not there, an --out in use, odd numbers, and
    last what is not on this machine and cannot be fetched.

    Args:
        space: of `seeds.py`, where images are drawn of it.
        rewards: that judge the images, with their options.
        networks: of `--diversity`.
    """
    from argrpo_cli import seeds
    from argrpo_cli.kept import check_claim
    from argrpo_cli.policy.folder import check_weights_at_hand, glance, say_unfinished
    from argrpo_cli.rewards import check_weights
    from argrpo_cli.system.processes import notice

    for policy in policies:
        glance(policy)
    if out is not None:
        check_claim(out)
    if space:
        seeds.check(space, seed, n)
    for policy in policies:
        check_weights_at_hand(policy)
        say_unfinished(policy)
    for name, options in (rewards or {}).items():
        check_weights(name, options)
    if networks:
        from argrpo_cli.evals.diversity_networks import check_at_hand

        check_at_hand(networks)
    notice(f"loading {', '.join(policies)} ..." if policies else "loading ...")


def read_rewards(
    text: str, settings: Sequence[str] | None, where: str = "--rewards"
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names with commas between them, and `hpsv2.version=2.0` and the like as options of each reward.

    Args:
        settings: of `--set`; values are read as YAML.
        where: the option that names the rewards.

    Raises:
        UserError: another form, a reward that is not among the names; and what `check_rewards` refuses.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    options = read_settings(settings, names, where)
    check_rewards(names, options)
    return names, options


def read_settings(
    settings: Sequence[str] | None, names: Sequence[str], where: str = "--rewards"
) -> dict[str, dict[str, Any]]:
    """`hpsv2.version=2.0` and the like as options of those with these names; arguments and errors of `read_rewards`."""
    from argrpo_cli.recipe.text import parse_yaml

    options: dict[str, dict[str, Any]] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        name, dot, option = key.rpartition(".")
        if not (equals and dot and name and option):
            raise UserError(f"--set {setting}: expected REWARD.KEY=VALUE, such as hpsv2.version=2.0")
        if name not in names:
            hint = did_you_mean(name, names)
            raise UserError(f"--set {setting}: {name!r} is not among {where} {','.join(names)}{hint}")
        options.setdefault(name, {})[option] = parse_yaml(value, f"--set {setting}")
    return options


def check_rewards(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse before torch is loaded rewards that there are not, and options that they do not have."""
    from argrpo_cli.rewards import check_options

    for name in names:
        check_options(name, options.get(name, {}))
