"""Which device to compute on."""

from __future__ import annotations

from argrpo_cli.system.errors import UserError


def resolve_device(name: str) -> str:
    """`auto` as the best device of this machine, anything else checked to exist here.

    Raises:
        UserError: the name is no torch device, or this machine has none of that kind.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("a device without numbers")
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            have.append("mps")
        raise UserError(f"device {name!r} is not available; this machine has {', '.join(have)}") from error
    return name
