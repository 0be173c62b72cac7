"""What run.json and metrics.jsonl hold: checked where they are read, so that a damaged one is told in a line."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, Required

from annotated_types import Ge, Interval
from typing_extensions import TypedDict

Number = Annotated[float, Interval(ge=-1e39, le=1e39)] | None  # what float32 can hold


class MetricsRow(TypedDict, total=False, extra_items=Number):
    """A line of metrics.jsonl: the record of an update, of numbers."""

    step: Required[Annotated[int, Ge(0)]]
    rewards: dict[str, dict[str, Number]]
    drift: dict[str, float] | None


class Role(TypedDict):
    family: str | None
    weight: float


class Warned(TypedDict):
    step: int
    guard: str
    text: str


class Finished(TypedDict):
    step: int
    out_of_time: NotRequired[bool]
    time_limit_minutes: NotRequired[float | None]


class Told(TypedDict):
    id: str
    told: int


class Scale(TypedDict):
    cfg_scale: float
    scales: list[dict[str, float | None]]


class Gained(TypedDict):
    name: str
    start: float
    trained: float
    gain: float
    error: float | None
    images: int


class Notes(TypedDict, total=False):
    """What run.json holds; `RunDirectory.note` says what it means."""

    recipe: dict[str, Any]
    base_policy: str
    trained: list[str]
    conditions: str
    real: str
    tokens: int
    sharding: str
    started: str
    device: str
    versions: dict[str, str]
    rewards: dict[str, Role]
    finished: Finished | None
    warnings: list[Warned]
    trackers: Told
    scale: Scale
    transfer: list[Gained]
