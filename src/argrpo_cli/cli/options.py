"""What commands share: the options of drawing, lists of names, options of rewards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from argrpo_cli.shapes import DTYPES, Sampling
from argrpo_cli.system.errors import UserError, did_you_mean

BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images at a time; by rounding it turns a few tokens.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
BaselineOption = Annotated[
    str | None, typer.Option("--baseline", help="A second policy, drawn with the same seeds, to compare with.")
]
# What finished pictures have no use for, and a policy that draws them has.
OF_A_POLICY = (
    "policy", "baseline", "n", "cfg_scale", "temperature", "top_k", "top_p", "cfg_interval", "seed", "dtype",
    "text_device", "resize", "keep_images",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """What the shared options of a command that draws say."""

    sampling: Sampling
    seed: int
    batch_size: int
    device: str
    text_device: str


def _drawing(
    cfg_scale: Annotated[
        float, typer.Option("--cfg-scale", help="Classifier-free guidance scale, 1 or more; 1 is no guidance.")
    ] = 2.0,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Softmax temperature; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability; 1 keeps all.")
    ] = 1.0,
    cfg_interval: Annotated[
        int, typer.Option("--cfg-interval", help="Guide decoding steps 0 to this one only, as LlamaGen; -1: all.")
    ] = -1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise: another seed, other images.")] = 0,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="|".join(DTYPES), help="Number format of the policy.")
    ] = DTYPES[0],
    text_device: Annotated[
        str,
        typer.Option(
            "--text-device",
            metavar="same|offload|DEVICE",
            help="Of the text encoder: beside the policy, there only while it reads captions, or elsewhere.",
        ),
    ] = "same",
) -> Drawing:
    sampling = Sampling(cfg_scale, temperature, top_k, top_p, cfg_interval, dtype).check()
    return Drawing(sampling, seed, batch_size, device, text_device)


SHARED = inspect.signature(_drawing, eval_str=True).parameters


def draws(without: Iterable[str] = (), **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options of drawing in the place of its last parameter, `drawing`.

    Args:
        without: names of those that it has no use for.
        defaults: of its own.
    """
    names = [name for name in SHARED if name not in without]
    shared = [SHARED[name].replace(default=defaults.get(name, SHARED[name].default)) for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def parsed(**options: Any) -> None:
            drawing = _drawing(**{name: options.pop(name) for name in names})
            command(**options, drawing=drawing)

        parsed.__signature__ = inspect.Signature([*own, *shared])
        return parsed

    return decorate


def set_options(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of a command's options that are on the command line, and not left at their defaults."""
    return [name for name in names if name in context.params and context.get_parameter_source(name).name != "DEFAULT"]


def check_policies(
    policies: Sequence[str], out: Path | None = None, space: str = "", seed: int = 0, n: int = 1
) -> None:
    """Refuse before torch is loaded what needs none: policies that are not there, an --out in use, odd numbers.

    Args:
        space: of `seeds.py`, where images are drawn of it.
    """
    from argrpo_cli import seeds
    from argrpo_cli.kept import check_claim
    from argrpo_cli.policy.folder import glance
    from argrpo_cli.system.progress import notice

    for policy in policies:
        glance(policy)
    if out is not None:
        check_claim(out)
    if space:
        seeds.check(space, seed, n)
    notice(f"loading {', '.join(policies)} ..." if policies else "loading ...")


def check_rewards(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse before torch is loaded rewards that there are not, and options that they do not have."""
    from argrpo_cli.rewards import REWARDS, check_options, networks_of

    for name, own in networks_of(names, options)[0].items():
        if own and name in REWARDS:
            check_options(name, own)


def names_in(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def reward_options(settings: list[str], names: list[str], where: str = "--rewards") -> dict[str, dict[str, object]]:
    """`hpsv2.version=2.0` and the like as options of each reward; values are read as YAML.

    Args:
        where: the option that names the rewards.

    Raises:
        UserError: another form, a reward that is not among the names.
    """
    import yaml

    options: dict[str, dict[str, object]] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        name, dot, option = key.rpartition(".")
        if not (equals and dot and name and option):
            raise UserError(f"--set {text}: expected REWARD.KEY=VALUE, such as hpsv2.version=2.0")
        if name not in names:
            raise UserError(f"--set {text}: {name!r} is not among {where} {','.join(names)}{did_you_mean(name, names)}")
        try:
            options.setdefault(name, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: {value!r} is not a value in YAML") from error
    return options
