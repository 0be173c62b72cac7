"""One panel of curves as inline SVG: coloured by CSS variables, so that it is readable on light and on dark ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from argrpo_cli.runs.panels import COLOURS, Panel, smoothed

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 24
MOST_POINTS = 500  # of a curve; a longer one shows every n-th update
Points = list[tuple[int, float]]


def thinned(count: int) -> list[int]:
    """Indices of the values that are drawn, at even distances, the last one among them."""
    stride = -(-count // MOST_POINTS)
    return sorted({*range(0, count, stride), count - 1}) if count else []


def draw_panel(panel: Panel, steps: Sequence[int]) -> tuple[str, dict[str, object]]:
    """The picture of a panel, and the numbers in it, which the page's script reads out under the pointer.

    Returns:
        SVG without width and height, and {"x0", "x1": ends of the axis in steps, "lines": [{"label", "points"}]}.
    """
    drawn = []
    for line in panel.lines:
        known = [(step, value) for step, value in zip(steps, line.values, strict=True) if value is not None]
        if panel.logarithmic:
            known = [(step, value) for step, value in known if value > 0]
        if known:
            trend = [value for _, value in known] if panel.exact else smoothed([value for _, value in known])
            kept = thinned(len(known))
            drawn.append((line, [known[i] for i in kept], [(known[i][0], trend[i]) for i in kept]))
    every = [value for _, measured, trend in drawn for _, value in (*measured, *trend)] or [0.0]
    low, high, marks = _axis(min(every), max(every), panel.logarithmic)
    first, last = (min(steps), max(steps)) if steps else (0, 1)
    last = max(last, first + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        if panel.logarithmic:
            value = math.log10(value)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">']
    for value, text in marks:
        at = f"{y(value):.1f}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at}" text-anchor="end" dy="0.32em">{text}</text>')
    for step in _steps(first, last):
        anchor = "end" if x(step) > WIDTH - RIGHT - 12 else "middle"
        at = WIDTH - RIGHT if anchor == "end" else x(step)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{step}</text>')
    for line, measured, trend in drawn:
        colour = COLOURS[line.colour]
        if len(measured) == 1:
            ((step, value),) = measured
            parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
            continue
        if not panel.exact:
            parts.append(f'<path class="raw" stroke="{colour}" d="{path(measured)}"/>')
        parts.append(f'<path class="trend" stroke="{colour}" d="{path(trend)}"/>')
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/></svg>')
    lines = [{"label": line.label, "points": [[s, _rounded(v)] for s, v in measured]} for line, measured, _ in drawn]
    return "".join(parts), {"x0": first, "x1": last, "lines": lines}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _axis(least: float, most: float, logarithmic: bool) -> tuple[float, float, list[tuple[float, str]]]:
    """Ends of the vertical axis (logarithms where it is logarithmic), and the marks on it: value and text."""
    if logarithmic:
        low, high = math.log10(least), math.log10(most)
        pad = max(0.06 * (high - low), 0.05)
        low, high = low - pad, high + pad
        decades = range(math.floor(low), math.ceil(high) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [digit * 10.0**decade for decade in decades for digit in digits]
            marks = [value for value in values if low <= math.log10(value) <= high]
            if len(marks) <= 6:
                break
        return low, high, [(value, f"{value:g}") for value in marks]
    if most - least <= 1e-9 * max(abs(least), abs(most)):  # flat
        pad = 0.05 * abs(most) or 0.01
        low, high = (0.0, 0.01) if most == 0 else (least - pad, most + pad)
    else:
        pad = 0.05 * (most - least)
        low, high = least - (0 if least == 0 else pad), most + pad
    step = _round_step((high - low) / 4)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    plain = decimals <= 5 and abs(high) < 1e6
    return low, high, [(value, f"{value + 0.0:.{decimals}f}" if plain else f"{value:.2g}") for value in values]


def _steps(first: int, last: int) -> list[int]:
    """Marks on the horizontal axis."""
    step = max(1, round(_round_step((last - first) / 5)))
    return list(range(-(-first // step) * step, last + 1, step))


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
