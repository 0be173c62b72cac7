"""What a CUDA graph does, on a CPU: operations recorded once and then repeated over the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from argrpo_cli.policy.llamagen import sample as sampler


class Tape(TorchDispatchMode):
    """The operations of a job. `replay` runs them again on the very tensors that they were given, whatever Python has
    made of its variables since, and puts results where they were: numbers that were Python's stay as they were."""

    def __init__(self, job: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        with self:
            job()

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        result = function(*given, **(named or {}))
        self.calls.append((function, given, named or {}, tensors_of(result)))
        return result

    def replay(self) -> None:
        for function, given, named, results in self.calls:
            memory = {one.untyped_storage().data_ptr() for one in tensors_of((given, named))}
            for old, new in zip(results, tensors_of(function(*given, **named)), strict=True):
                if old.untyped_storage().data_ptr() not in memory:  # neither a view nor written in place
                    old.copy_(new)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Taped(sampler.Decoder):
    """A decoder that repeats its work from tapes, as one on a GPU does from graphs."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given, bucketed=True)

    def _repeat(self, graphs: dict, key: Any, job: Callable[[], None]) -> None:
        if key not in graphs:
            graphs[key] = Tape(job)
        graphs[key].replay()
