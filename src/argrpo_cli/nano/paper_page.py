"""The page of `make paper-nano`: tables beside the paper's numbers, figures, and which findings show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.files import atomic_path
from argrpo_cli.geneval.summary import tag_scores
from argrpo_cli.nano import paper_numbers as published

Value = tuple[float, float | None]  # mean and standard error
Units = dict[str, Any]  # measure to its values over units, a tensor [U]
Verdicts = Sequence[tuple[Any, float]]  # prompt and 1 or 0 for each image

IS = "inception_score"
FIDELITY = {IS: "IS", "fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall"}
MEASURES = {**FIDELITY, "match": "match, dB", "recognised": "recognised", "entropy": "entropy"}
CATEGORIES = ("position", "colors", "color_attr", "counting", "single_object", "two_object", "overall")  # as table 3
CLEAR = 2.0  # standard errors from which a difference is called one


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        c2i: "base" and the class-conditional recipes, sampled at guidance 2.
        swept: the model trained at guidance 7, by sampling scale.
        t2i: "base" and the text-conditional recipes on GenEval's nano prompts.
        curve: rows of `argrpo entropy` for the checkpoints of t2i.
    """

    c2i: dict[str, Units]
    swept: dict[float, Units]
    t2i: dict[str, Verdicts]
    curve: list[dict[str, Any]]


def page(results: Results, images: int, per_prompt: int) -> str:
    """The page in Markdown."""
    c2i = {name: {key: _mean(values) for key, values in units.items()} for name, units in results.c2i.items()}
    swept = {scale: {key: _mean(values) for key, values in units.items()} for scale, units in results.swept.items()}
    t2i = {name: _categories(verdicts) for name, verdicts in results.t2i.items()}
    by_scale = sorted((name for name in c2i if _is_scale(name)), key=scale_of)
    columns = {name: name.replace("_", " ") for name in CATEGORIES}
    parts = [
        "# The paper's tables in the nano world",
        "Made by `make paper-nano` from the recipes in `recipes/nano/paper/`: 60 updates of 48 images each, β = 0.1 "
        f"except where it is left out, one run per row. {images:,} samples a policy ({per_prompt} per GenEval prompt) "
        "with the same seeds; ± standard errors of drawing the samples, which leave out that another training seed "
        "would give another run. Beside each the paper's own numbers, of models 20 to 160 times larger on other data: "
        "compare directions, not sizes. Fidelity is measured on the nano judge's features, GenEval with the nano "
        "detector. GenEval's single objects and counts were trained on, its other categories were not.",
        "## Table 2: class-conditional",
        _table({"LlamaGen (base)": c2i["base"], "AR-GRPO": c2i["c2i"]}, published.TABLE_2, MEASURES),
        "## Table 5: the KL term",
        _table(
            {"base": c2i["base"], "without KL": c2i["c2i_no_kl"], "with KL": c2i["c2i"]}, published.TABLE_5, MEASURES
        ),
        "## Table 6: reward designs, class-conditional",
        "A leaves out the conditional rewards, B quality, C realism; D has all.",
        _table({"base": c2i["base"], **_designs(c2i, "c2i")}, published.TABLE_6, MEASURES),
        "## Table 3: text-conditional, GenEval",
        _table({"LlamaGen (base)": t2i["base"], "AR-GRPO": t2i["t2i"]}, published.TABLE_3, columns),
        "## Table 7: reward designs, GenEval",
        _table({"base": t2i["base"], **_designs(t2i, "t2i")}, published.TABLE_7, columns),
        "## Figures 4 and 6",
        "![entropy and guidance](paper_nano.png)",
        "Left: entropy along samples of the GenEval prompts against the training step. Middle: trained under different "
        "guidance, sampled at 2. Right: the model trained at 7, sampled at different scales.",
        _table({f"trained at {scale_of(name)}": c2i[name] for name in by_scale}, {}, MEASURES),
        _table({f"trained at 7, sampled at {scale:g}": row for scale, row in swept.items()}, {}, MEASURES),
        "## What of the paper's findings shows here",
        f"Differences with the standard errors of pairs; from {CLEAR:g} of them on one is called clear.",
        "\n".join(findings(results)),
    ]
    return "\n\n".join(parts) + "\n"


def findings(results: Results) -> list[str]:
    """One bullet per finding of the paper, with the measured difference and whether it is clear of chance."""
    c2i, swept, t2i = results.c2i, results.swept, results.t2i
    base, trained, bare = c2i["base"], c2i["c2i"], c2i["c2i_no_kl"]

    def fidelity(claim: str, a: Units, b: Units, key: str, sign: int) -> str:
        return _verdict(claim, _mean(a[key].double() - b[key].double()), sign)

    def geneval(claim: str, a: str, b: str, sign: int) -> str:
        pairs = zip(t2i[a], t2i[b], strict=True)
        return _verdict(claim, _categories([(prompt, x - y) for (prompt, x), (_, y) in pairs])["overall"], sign)

    last = [row for row in results.curve if row["mode"] == "conditional"][-1]
    change = last["change"], last["change_error"]
    return [
        fidelity("Quality up: IS rises (table 2)", trained, base, IS, +1),
        fidelity("Quality up: precision rises (table 2)", trained, base, "precision", +1),
        fidelity("Diversity down: recall falls (table 2)", trained, base, "recall", -1),
        fidelity("FID rises (table 2)", trained, base, "fid", +1),
        fidelity("The KL term guards recall: higher with than without (table 5)", trained, bare, "recall", +1),
        fidelity("The KL term costs IS: lower with than without (table 5)", trained, bare, IS, -1),
        fidelity("The KL term keeps FID lower (table 5)", trained, bare, "fid", -1),
        fidelity("Conditional rewards: FID lower with them, D against A (table 6)", trained, c2i["c2i_a"], "fid", -1),
        fidelity("Quality rewards: IS higher with them, D against B (table 6)", trained, c2i["c2i_b"], IS, +1),
        fidelity("Realism rewards keep recall, D against C (table 6)", trained, c2i["c2i_c"], "recall", +1),
        fidelity("Realism rewards cost IS, D against C (table 6)", trained, c2i["c2i_c"], IS, -1),
        geneval("GenEval rises overall (table 3)", "t2i", "base", +1),
        geneval("Conditional rewards help GenEval, D against A (table 7)", "t2i", "t2i_a", +1),
        geneval("Quality rewards help GenEval, D against B (table 7)", "t2i", "t2i_b", +1),
        geneval("Realism rewards help GenEval, D against C (table 7)", "t2i", "t2i_c", +1),
        fidelity("Entropy falls, on own samples (figure 3: on real images)", trained, base, "entropy", -1),
        _verdict("Entropy falls during training, text-conditional (figure 4)", change, -1),
        fidelity("More guidance in sampling, more IS: 10 against 1 (figure 6)", swept[10.0], swept[1.0], IS, +1),
        fidelity("Much guidance in sampling, more FID: 10 against 2 (figure 6)", swept[10.0], swept[2.0], "fid", +1),
    ]  # fmt: skip


def draw_figures(results: Results, path: Path) -> None:
    """Figure 4 and both halves of figure 6 as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for mode in ("conditional", "guided"):
        own = [row for row in results.curve if row["mode"] == mode]
        means, errors = [row["mean"] for row in own], [row["standard_error"] for row in own]
        left.errorbar([row["step"] for row in own], means, errors, marker="o", capsize=3, label=mode)
    left.set_xlabel("training step")
    left.set_ylabel("entropy, nats per token")
    left.legend()
    names = sorted((name for name in results.c2i if _is_scale(name)), key=scale_of)
    for axes, x, rows, label in (
        (middle, [scale_of(name) for name in names], [results.c2i[name] for name in names], "training guidance scale"),
        (right, list(results.swept), list(results.swept.values()), "sampling guidance scale"),
    ):
        second = axes.twinx()
        for own, key, color in ((axes, "fid", "tab:blue"), (second, IS, "tab:orange")):
            means, errors = zip(*(_mean(row[key]) for row in rows), strict=True)
            own.errorbar(x, means, errors, color=color, marker="o", capsize=3)
            own.set_ylabel(FIDELITY[key], color=color)
        axes.set_xlabel(label)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def scale_of(name: str) -> int:
    """The guidance that a recipe trains under."""
    return int(name.rpartition("_")[2]) if "cfg" in name else 2


def _is_scale(name: str) -> bool:
    return name == "c2i" or "cfg" in name


def _mean(values: Any) -> Value:
    return values.double().mean().item(), (values.double().std() / len(values) ** 0.5).item()


def _categories(verdicts: Verdicts) -> dict[str, Value]:
    by_tag, overall = tag_scores(verdicts)
    return {tag: (score.mean, score.error) for tag, score in {**by_tag, "overall": overall}.items()}


def _verdict(claim: str, difference: Value, sign: int) -> str:
    mean, error = difference
    word = "shows" if mean * sign > 0 else "does not repeat: the opposite shows"
    return f"- {claim}: **{word if abs(mean) > CLEAR * error else 'not clear'}** ({mean:+.3f} ± {error:.3f})"


def _designs(rows: dict[str, Any], task: str) -> dict[str, Any]:
    return {**{letter.upper(): rows[f"{task}_{letter}"] for letter in "abc"}, "D": rows[task]}


def _table(rows: dict[str, dict[str, Value]], paper: dict[str, list[float]], columns: dict[str, str]) -> str:
    """Rows of measures, each followed by the paper's numbers where it has some, for the first of the columns."""
    lines = [f"| | {' | '.join(columns.values())} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row[key]) for key in columns)} |")
        if name in paper:
            numbers = [f"{value:g}" for value in paper[name]] + [""] * (len(columns) - len(paper[name]))
            lines.append(f"| *{name}, in the paper* | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _cell(value: Value) -> str:
    mean, error = value
    return f"{mean:.3f}" if error is None or math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
