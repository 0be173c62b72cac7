"""The curves of a run: what they show, what they say about it, and how curves.png and report.html draw them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argrpo_cli.system.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = ("text", "rollout", "reward", "update")  # of an update; "text" are the captions, and classes have none
NO_STAGE = 1e-3  # seconds; a stage that took less did nothing, so it has no speed

# Colour-blind safe, and readable on white and on a dark ground; a family keeps its colour everywhere.
COLOURS = {
    "total": "#3b7dd8",
    "conditional": "#d9822b",
    "quality": "#1f9d6b",
    "realism": "#b65fc4",
    "held_out": "#8a8f98",
    "plain": "#3b7dd8",
    "second": "#d9534f",
    "text": "#8a8f98",
    "rollout": "#3b7dd8",
    "reward": "#d9822b",
    "update": "#1f9d6b",
}

HUES = ("total", "conditional", "quality", "realism", "second")  # of lines that are of one kind

Record = Mapping[str, Any]
Roles = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One curve: a value per record, None where it was not measured, and the key of its colour in `COLOURS`."""

    label: str
    values: list[float | None]
    colour: str = "plain"


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    Attributes:
        held_out: a reward that is measured and not optimised.
        reward: what is optimised: the total, or a reward that counts.
        exact: a setting, or what is measured now and then: there is no noise to smooth away. Shown where it changes.
        about: a sentence for the report: what this is, and what it tells.
    """

    title: str
    lines: list[Line]
    held_out: bool = False
    reward: bool = False
    logarithmic: bool = False
    exact: bool = False
    about: str = ""


MOST_PARTS = 5  # of a model, whose drift is shown: those that moved most


def panels(records: Sequence[Record], roles: Roles) -> list[Panel]:
    """The panels of a run, one per question, in the order in which they are read; what was never measured, or is
    constant, has none (a constant reward has: something is wrong with it).

    Args:
        records: lines of metrics.jsonl. Keys that an earlier version did not write count as not measured.
        roles: name of a reward to {"family": ..., "weight": ...}; weight 0 is held out.
    """

    def panel(title: str, *lines: tuple[str, str, str], **kind: Any) -> Panel:
        return Panel(title, [Line(label, [one.get(key) for one in records], hue) for key, label, hue in lines], **kind)

    names = dict.fromkeys(name for record in records for name in record.get("rewards", {}))  # in the recipe's order
    rewards = [_reward(name, records, roles) for name in names]
    every = [
        panel("reward, weighted total", ("reward", "", "total"), reward=True),
        *sorted(rewards, key=lambda one: one.held_out),
        panel(
            "divergence to the guided teacher (nats per token)",
            ("divergence_teacher", "teacher's images", "plain"),
            ("divergence_student", "student's images", "second"),
        ),
        panel("loss of the contrast", ("contrast", "", "plain")),
        panel(
            "log-ratio of images to the base (nats)",
            ("gain_own", "under their own condition", "plain"),
            ("gain_other", "under another", "second"),
        ),
        panel("share of images told apart by their condition", ("told_apart", "", "plain")),
        panel("total reward, std within groups", ("within_group_std", "", "total")),
        panel(
            "standard deviation of advantages",
            ("advantage_std", "", "plain"),
            about="Near 1 with advantages divided by their group's deviation; lower where groups have no spread.",
        ),
        panel("KL to the base policy (nats per token)", ("kl", "", "plain")),
        panel(
            "KL on the grid's images (nats per token)",
            ("kl_start", "to the start", "plain"),
            ("kl_base", "to the policy before it", "second"),
            exact=True,
            about="How far the policy has moved, measured alike with a KL term and without.",
        ),
        panel(
            "KL efficiency",
            ("kl_efficiency", "", "plain"),
            exact=True,
            about="The KL that an ideal policy needs for the gain (half its square, in deviations of the reward within "
            "a condition), over the KL spent: 1 is ideal, near 0 the policy moves without learning.",
        ),
        panel(
            "gradient noise scale (images)",
            ("noise_scale", "estimate", "plain"),
            ("noise_scale_least", "at least", "second"),
            logarithmic=True,
            about="Images an update that make its gradient as large as its noise, over all updates so far; far fewer "
            "and most of each step is noise.",
        ),
        panel("policy entropy (nats per token)", ("entropy", "", "plain")),
        panel("cross entropy to real images' codes (nats per token)", ("cross_entropy", "", "plain")),
        panel("weight of the entropy bonus", ("entropy_weight", "", "plain"), exact=True),
        panel("ratio to the sampler, mean", ("ratio", "", "plain")),
        panel(
            "|ratio - 1|",
            ("ratio_deviation_mean", "mean", "plain"),
            ("ratio_deviation", "largest", "second"),
            logarithmic=True,
        ),
        panel("share of tokens clipped", ("clip_low", "low", "plain"), ("clip_high", "high", "second")),
        panel(
            "share of groups without spread",
            ("groups_without_spread", "", "plain"),
            about="The other groups are the effective ones: where all images score alike there is nothing to learn.",
        ),
        panel("gradient norm", ("grad_norm", "", "plain")),
        _drift(records),
        panel("learning rate", ("learning_rate", "", "plain"), exact=True),
        panel(
            "images per second, by stage",
            *((f"images_per_second_{stage}", stage, stage) for stage in STAGES),
            logarithmic=True,
        ),
    ]
    for one in every:
        one.lines[:] = [line for line in one.lines if _says_something(one, line)]
    return [one for one in every if one.lines]


def _says_something(panel: Panel, line: Line) -> bool:
    """Whether a line was measured and, but for a reward's and a run's first update, is not the same all along."""
    known = [value for value in line.values if value is not None]
    if panel.reward or panel.held_out or (len(known) == 1 and not panel.exact):
        return bool(known)
    return bool(known) and max(known) - min(known) > ROUNDING * max(map(abs, known))


def _drift(records: Sequence[Record]) -> Panel:
    """How far the parts of the model have moved that moved most."""
    latest = next((one["drift"] for one in reversed(records) if one.get("drift")), {})
    parts = sorted(sorted(latest, key=latest.__getitem__)[-MOST_PARTS:], key=list(latest).index)
    lines = [
        Line(part, [(one.get("drift") or {}).get(part) for one in records], hue)
        for part, hue in zip(parts, HUES, strict=False)
    ]
    about = "Distance from the start in parts of its own size, of the parts that moved most; the table has all of them."
    return Panel("drift of the weights", lines, exact=True, about=about)


def _reward(name: str, records: Sequence[Record], roles: Roles) -> Panel:
    role = roles.get(name, {})
    held_out = role.get("weight") == 0
    colour = "held_out" if held_out else role.get("family") or "plain"
    values = [record.get("rewards", {}).get(name, {}).get("mean") for record in records]
    title = f"{'held out' if held_out else 'reward'}: {name}"
    return Panel(title, [Line("", values, colour)], held_out, reward=not held_out)


# --- trends

WINDOW = 0.1  # of the run, fitted for the thick line; the pale one is what was measured
SHARE = 0.1  # of the run, whose mean is held against that of the same share at its other end
LEAST = 100  # measured updates below which that difference has no error: the error's own would be too large
DEGREE = 3  # of the polynomial about which the scatter of a whole run is counted
ROUNDING = 1e-6  # spread of equal float32 scores, in parts of their mean
MAX_CORRELATION = 0.95


@dataclass(frozen=True)
class Change:
    """Means of the first and the last tenth of the updates; standard errors are None where there are too few."""

    first: float
    last: float
    first_error: float | None
    last_error: float | None

    @property
    def difference(self) -> float:
        return self.last - self.first

    @property
    def error(self) -> float | None:
        """Standard error of the difference."""
        if self.first_error is None or self.last_error is None:
            return None
        return math.hypot(self.first_error, self.last_error)


def change(values: Sequence[float | None]) -> Change | None:
    """First against last tenth of one curve; None when there are not two measured values.

    The curve is taken as a trend plus noise of the updates. The trend is a cubic fitted to the whole run, so a run that
    rises has no larger error for it, and what the cubic misses counts as noise. The variance of a mean of n is that of
    n independent values (as they scatter in that third of the run) times `inflation`. In simulations two standard
    errors covered 95% of the differences with independent noise; with a correlation of 0.6 between neighbours 92% at
    100 to 140 updates, and 95% at 300.

    The error says how well the mean reward, say, of the policies of those updates is known. It says nothing of how
    another training run would have come out.
    """
    y = np.array([value for value in values if value is not None], dtype=float)
    if len(y) < 2:
        return None
    count = max(1, round(SHARE * len(y)))
    first, last = float(y[:count].mean()), float(y[-count:].mean())
    if len(y) < LEAST:
        return Change(first, last, None, None)
    noise = residuals(y, DEGREE)
    if noise @ noise <= 1e-24 * len(y) * (1 + np.abs(y).max()) ** 2:  # the curve is the cubic, up to rounding
        return Change(first, last, 0.0, 0.0)
    freedom = len(y) / (len(y) - DEGREE - 1)  # what the cubic took
    third = len(y) // 3  # a run may grow noisier: its first third speaks for the first tenth, its last for the last
    ends = (noise[:third], noise[-third:])
    errors = [math.sqrt(end @ end / third * freedom * inflation(noise) / count) for end in ends]
    return Change(first, last, *errors)


def trend(values: np.ndarray) -> tuple[float, float]:
    """How much a straight line through equally spaced values rises from the first to the last, and its standard error.

    The error is that of least squares, its square times `inflation`.

    Args:
        values: [n], n > 2.

    Returns:
        (0, 0) for values that are equal up to rounding.
    """
    n = len(values)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return 0.0, 0.0
    time = np.arange(n) - (n - 1) / 2
    noise = residuals(values, 1)
    error = math.sqrt(noise @ noise / (n - 2) / (time @ time) * inflation(noise))
    return float(time @ values / (time @ time) * (n - 1)), error * (n - 1)


def residuals(values: np.ndarray, degree: int) -> np.ndarray:
    """What a polynomial of that degree, fitted to equally spaced values [n], leaves of them."""
    x = np.linspace(-1, 1, len(values))
    return values - np.polyval(np.polyfit(x, values, degree), x)


def inflation(noise: np.ndarray) -> float:
    """How much larger correlated neighbours make the variance of a mean: (1 + r) / (1 - r), as of AR(1); at least 1."""
    power = noise @ noise
    r = min(max(noise[1:] @ noise[:-1] / power, 0.0), MAX_CORRELATION) if power else 0.0
    return float((1 + r) / (1 - r))


def smoothed(values: Sequence[float]) -> list[float]:
    """A straight line fitted around each value, at that value: a moving average that does not lag at the ends.

    Held to the range of the values, so that a share does not fall below 0 at an end.
    """
    y = np.asarray(values, dtype=float)
    if len(y) < 2:
        return y.tolist()
    reach = max(2, int(len(y) * WINDOW / 2))
    width = min(len(y), 2 * reach + 1)
    index = np.arange(len(y))
    start = np.clip(index - reach, 0, len(y) - width)  # as many values at the ends as in the middle
    middle, offset = start + (width - 1) / 2, y.mean()
    sums, moments = (
        np.concatenate([[0.0], np.cumsum(series)]) for series in (y - offset, (y - offset) * index)
    )  # differences of running sums: no loop over windows
    total, moment = (series[start + width] - series[start] for series in (sums, moments))
    slope = (moment - middle * total) / (width * (width**2 - 1) / 12)
    return np.clip(offset + total / width + slope * (index - middle), y.min(), y.max()).tolist()


# --- drawing

COLUMNS = 4
SIZE = (3.9, 2.6)  # of a panel of curves.png, in inches
HEAD = 0.35
DPI = 110
HEADROOM = 0.18  # of a panel's height
WIDTH, HEIGHT = 360, 190  # of a panel of the report, in points
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 22
LOGARITHMIC = 1e-30, 1e30  # what an axis of that kind shows: it has no place for 0, and ends of floats overflow
MOST_POINTS = 500  # of a curve; a longer one shows every n-th update
FAINT, RULE = "#667081", "#dfe3e9"  # stand in a picture for the page's own colours of that name


def draw_curves(
    records: Sequence[dict[str, Any]], path: str | Path, title: str = "", roles: Roles | None = None
) -> None:
    """Draw the records of metrics.jsonl to a PNG, written atomically. No records, no file.

    Args:
        roles: family and weight of each reward, see `panels`. Rewards of weight 0 get rows of their own.
    """
    from matplotlib.figure import Figure

    rows = panel_rows(panels(records, roles or {}))
    if not rows:
        return
    across = max(map(len, rows))
    width, height = SIZE[0] * across, SIZE[1] * len(rows) + HEAD
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, y=1 - 0.2 / height)
    # Fixed margins, in inches: matplotlib's own layout would take as long as the drawing.
    edges = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - (HEAD + 0.25) / height}
    grid = figure.add_gridspec(len(rows), across, **edges, wspace=0.27, hspace=0.45)
    steps = [record["step"] for record in records]
    for row, shown in enumerate(rows):
        for place, panel in enumerate(shown):
            axes = figure.add_subplot(grid[row, place])
            _draw(axes, panel, steps)
            if any(line.label for line in panel.lines) and axes.has_data():
                columns = 3 if len(panel.lines) > 4 else len(panel.lines)
                room = HEADROOM * -(-len(panel.lines) // columns)  # for the legend above the curves
                low, high = axes.get_ylim()
                axes.set_ylim(low, high * (high / low) ** room if panel.logarithmic else high + (high - low) * room)
                axes.legend(fontsize=8, loc="upper center", ncols=columns, frameon=False, columnspacing=1.2)
            if panel.held_out:
                axes.set_facecolor("#f4f4f4")
            axes.set_title(panel.title, fontsize=10)
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.3)
    save_figure(path, figure, DPI)


def panel_rows(every: Sequence[Panel]) -> list[list[Panel]]:
    """The panels row by row; held-out rewards stand in rows of their own, below what is optimised."""
    first = next((index for index, panel in enumerate(every) if panel.held_out), len(every))
    last = first + sum(panel.held_out for panel in every)
    blocks = [every[:first], every[first:last], every[last:]] if last > first else [every]
    return [list(block[at : at + COLUMNS]) for block in blocks for at in range(0, len(block), COLUMNS)]


def panel_svg(panel: Panel, steps: Sequence[int]) -> tuple[str, dict[str, object]]:
    """The picture of a panel for the report, and the numbers in it, which the page's script reads out.

    Returns:
        SVG without width, height, names and addresses, its greys the page's own, readable on light and on dark ground;
        {"x0", "x1": ends of the axis in steps, "lines": [{"label", "points"}]}.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    first, last = (min(steps), max(steps)) if steps else (0, 1)
    last = max(last, first + 1)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
    )
    measured = _draw(axes, panel, steps)
    axes.set_xlim(first, last)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=FAINT, labelsize=10)
    axes.yaxis.offsetText.set(color=FAINT, fontsize=10)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    svg = file.getvalue()
    svg = re.sub(r"<defs>.*?</defs>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|id|clip-path|width|height|version)="[^"]*"|font-family: [^;"]*;?', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)  # a tenth of a point will do
    svg = svg.replace(FAINT, "var(--faint)").replace(RULE, "var(--rule)")
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/></svg>'
    lines = [
        {"label": line.label, "points": [[step, float(f"{value:.6g}")] for step, value in points]}
        for line, points in measured
    ]
    return svg.replace("</svg>", cursor), {"x0": first, "x1": last, "lines": lines}


def _draw(axes: Axes, panel: Panel, steps: Sequence[int]) -> list[tuple[Line, list[tuple[int, float]]]]:
    """Draw the lines of a panel and set its axes; the points that were drawn, thinned to `MOST_POINTS` of a line."""
    from matplotlib.ticker import LogLocator

    plotted = []
    for line in panel.lines:
        known = [(step, value) for step, value in zip(steps, line.values, strict=True) if value is not None]
        if panel.logarithmic:
            known = [(step, value) for step, value in known if LOGARITHMIC[0] < value < LOGARITHMIC[1]]
        if not known:
            continue
        kept = sorted({*range(0, len(known), -(-len(known) // MOST_POINTS)), len(known) - 1})
        y = [value for _, value in known]
        fitted = y if panel.exact else smoothed(y)
        points = [known[index] for index in kept]
        colour, x = COLOURS[line.colour], [step for step, _ in points]
        if not panel.exact:
            axes.plot(x, [value for _, value in points], color=colour, alpha=0.3, linewidth=1)
        width = 2 if len(x) > 1 else 6  # a single value is a dot: the round end of a line without length
        axes.plot(
            x if len(x) > 1 else x * 2,
            [fitted[index] for index in kept] * (1 if len(x) > 1 else 2),
            color=colour,
            linewidth=width,
            linestyle="--" if panel.held_out and len(x) > 1 else "-",
            solid_capstyle="round",
            label=line.label or None,
        )
        plotted.append((line, points))
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 6))
    if all(value in (0, None) for line in panel.lines for value in line.values):
        axes.set_ylim(-0.0005, 0.01)  # shares that stay at 0 have no room below
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    return plotted
