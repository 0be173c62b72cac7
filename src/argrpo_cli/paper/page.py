"""The page of `make paper-nano`: tables beside the paper's numbers, figures, and which findings show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli import paper_numbers
from argrpo_cli.captions import SHARED
from argrpo_cli.evals.geneval import TOTALS, shares
from argrpo_cli.evals.nano import CORRECTED
from argrpo_cli.evals.statistics import mean_of
from argrpo_cli.evals.tables import markdown_table
from argrpo_cli.recipe import load_recipe
from argrpo_cli.shapes import Value
from argrpo_cli.system.files import atomic_path

Units = dict[str, Any]  # measure to its values over units, a tensor [U]
Verdicts = Sequence[tuple[Any, float]]  # prompt and 1 or 0 for each image

IS = "inception_score"
FIDELITY = {IS: "IS", "fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall"}
MEASURES = {**FIDELITY, "match": "match, dB", "recognised": "recognised", "entropy": "entropy"}
TAGS = tuple(paper_numbers.before_and_after(3)[paper_numbers.AFTER])[:-1]  # GenEval's categories in the paper's order
HELD_OUT = tuple(tag for tag in TAGS if tag not in SHARED)  # those that GRPO does not ask for
CLEAR = 3.0  # standard errors from which a difference is called one


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        c2i: the runs of "base" (one) and of the class-conditional recipes, sampled at guidance 2.
        swept: the model trained at guidance 7, by sampling scale.
        t2i: the runs of "base" and of the text-conditional recipes on GenEval's nano prompts.
        real: rows of `argrpo entropy` on held-out scenes for the base and each run of c2i.
        curve: rows of `argrpo entropy` for the checkpoints of t2i.
    """

    c2i: dict[str, list[Units]]
    swept: dict[float, Units]
    t2i: dict[str, list[Verdicts]]
    real: list[dict[str, Any]]
    curve: list[dict[str, Any]]


def page(results: Results, images: int, per_prompt: int) -> str:
    """The page in Markdown."""
    c2i = {name: _fidelity_row(runs) for name, runs in results.c2i.items()}
    swept = {scale: _fidelity_row([units]) for scale, units in results.swept.items()}
    t2i = {name: _categories(_mean_verdicts(runs)) for name, runs in results.t2i.items()}
    settings = load_recipe("nano/paper/c2i").grpo
    by_scale = sorted((name for name in c2i if _is_scale(name)), key=scale_of)
    columns = {name: name.replace("_", " ") for name in (*TAGS, "overall")}
    fidelity = paper_numbers.before_and_after(2, "c2i-b-256")
    without = paper_numbers.table(5)["c2i_b256_no_kl"]["trained"]
    with_kl = {"base": fidelity[paper_numbers.BEFORE], "without KL": without, "with KL": fidelity[paper_numbers.AFTER]}
    parts = [
        "# The paper's tables in the nano world",
        f"Made by `make paper-nano` from the recipes in `recipes/nano/paper/`: {settings.steps} updates of "
        f"{settings.batch_size} images each, β = {settings.beta:g} except where it is left out. The full recipes "
        f"(AR-GRPO, with KL, D) are means of {len(results.c2i['c2i'])} trainings, the others are one training each. "
        f"{images:,} samples a policy ({per_prompt} per GenEval prompt) with the same seeds; ± standard errors of "
        "drawing the samples. Beside each the paper's own numbers, of models 40 to 160 times larger on other data: "
        "compare directions, not sizes. Fidelity is measured on the nano judge's features, GenEval with the nano "
        "detector. GRPO asked for GenEval's single objects and counts and for none of its other prompts; the base "
        "policy's pre-training drew from the whole grammar. The learning rate was chosen, of two, on samples of the "
        "same seed. Unlike in the paper, only one block and what reads the condition are trained, at a learning rate "
        f"of {settings.learning_rate:g}; as there, images are drawn guided and the conditional log-probability is "
        "trained.",
        "## Table 2: class-conditional",
        _table({"LlamaGen (base)": c2i["base"], "AR-GRPO": c2i["c2i"]}, fidelity, MEASURES),
        "## Table 5: the KL term",
        _table({"base": c2i["base"], "without KL": c2i["c2i_no_kl"], "with KL": c2i["c2i"]}, with_kl, MEASURES),
        "## Table 6: reward designs, class-conditional",
        "A leaves out the conditional rewards, B quality, C realism; D has all.",
        _table({"base": c2i["base"], **_designs(c2i, "c2i")}, paper_numbers.ablation(6), MEASURES),
        "## Table 3: text-conditional, GenEval",
        _table({"LlamaGen (base)": t2i["base"], "AR-GRPO": t2i["t2i"]}, paper_numbers.before_and_after(3), columns),
        "## Table 7: reward designs, GenEval",
        _table({"base": t2i["base"], **_designs(t2i, "t2i")}, paper_numbers.ablation(7), columns),
        "## Figures 4 and 6",
        "![entropy and guidance](paper_nano.png)",
        "Left: entropy along samples of the GenEval prompts against the training step, seed 0. Middle: trained under "
        "different guidance, sampled at 2. Right: the model trained at 7, sampled at different scales.",
        _table({f"trained at {scale_of(name)}": c2i[name] for name in by_scale}, {}, MEASURES),
        _table({f"trained at 7, sampled at {scale:g}": row for scale, row in swept.items()}, {}, MEASURES),
        "## What of the paper's findings shows here",
        f"A difference shows from {CLEAR:g} standard errors on. The error joins that of drawing the samples, paired, "
        f"with that of training: the spread of the {len(results.c2i['c2i'])} trainings of the full recipe, taken for "
        "the spread of every recipe. So few trainings give it to a factor of two only; lines about the same recipe "
        "share its luck, and where there is nothing, one line in a page or two would still seem clear. The lines about "
        "figures 4 and 6 look at one training and leave its part out. FID and sFID "
        "are compared with their jackknife bias taken out, which is larger for a policy of more variety.",
        "\n".join(findings(results)),
    ]
    return "\n\n".join(parts) + "\n"


def findings(results: Results) -> list[str]:
    """One bullet per finding of the paper, with the measured difference and whether it is clear of chance."""
    full, no_kl, a, b, c = "c2i", "c2i_no_kl", "c2i_a", "c2i_b", "c2i_c"
    swept = {scale: [units] for scale, units in results.swept.items()}

    def fidelity(claim: str, one: str, other: str, key: str, sign: int) -> str:
        runs = results.c2i[one], results.c2i[other]
        trained = [len(own) for own, name in zip(runs, (one, other), strict=True) if name != "base"]
        spread = _spread([_corrected(units, key).mean().item() for units in results.c2i[full]])
        return _verdict(claim, _difference(*runs, key), _of_training(spread, trained), sign)

    def scale(claim: str, one: float, other: float, key: str, sign: int) -> str:
        return _verdict(claim, _difference(swept[one], swept[other], key), 0.0, sign)  # one training behind both

    def geneval(claim: str, one: str, other: str, tags: tuple[str, ...], sign: int = +1) -> str:
        runs = results.t2i[one], results.t2i[other]
        trained = [len(own) for own, name in zip(runs, (one, other), strict=True) if name != "base"]
        pick = lambda verdicts: [row for row in verdicts if row[0].tag in tags]  # noqa: E731
        spread = _spread([_categories(pick(run))["overall"].value for run in results.t2i["t2i"]])
        pairs = zip(*(pick(_mean_verdicts(own)) for own in runs), strict=True)
        difference = _categories([(prompt, x - y) for (prompt, x), (_, y) in pairs])["overall"]
        return _verdict(claim, difference, _of_training(spread, trained), sign)

    return [
        fidelity("Quality up: IS rises (table 2)", full, "base", IS, +1),
        fidelity("Quality up: precision rises (table 2)", full, "base", "precision", +1),
        fidelity("Diversity down: recall falls (table 2)", full, "base", "recall", -1),
        fidelity("FID rises (table 2)", full, "base", "fid", +1),
        fidelity("sFID rises (table 2)", full, "base", "sfid", +1),
        fidelity("The KL term guards recall: higher with than without (table 5)", full, no_kl, "recall", +1),
        fidelity("The KL term costs IS: lower with than without (table 5)", full, no_kl, IS, -1),
        fidelity("The KL term costs precision (table 5)", full, no_kl, "precision", -1),
        fidelity("The KL term keeps FID lower (table 5)", full, no_kl, "fid", -1),
        fidelity("Conditional rewards: FID lower with them, D against A (order in table 6)", full, a, "fid", -1),
        fidelity("Quality rewards: IS higher with them, D against B (order in table 6)", full, b, IS, +1),
        fidelity("Realism rewards keep recall, D against C (table 6)", full, c, "recall", +1),
        fidelity("Realism rewards cost IS, D against C (table 6)", full, c, IS, -1),
        geneval("GenEval rises overall (table 3)", "t2i", "base", TAGS),
        geneval("GenEval rises on prompts that GRPO did not ask for (ours)", "t2i", "base", HELD_OUT),
        geneval("Single objects rise (table 3)", "t2i", "base", ("single_object",)),
        geneval("Counting rises (table 3)", "t2i", "base", ("counting",)),
        geneval("Colours rise (table 3)", "t2i", "base", ("colors",)),
        geneval("Conditional rewards help GenEval, D against A (table 7)", "t2i", "t2i_a", TAGS),
        geneval("Quality rewards help GenEval, D against B (table 7)", "t2i", "t2i_b", TAGS),
        geneval("Realism rewards help GenEval, D against C (table 7)", "t2i", "t2i_c", TAGS),
        _verdict("Entropy falls on real images (figure 3)", *_entropy_change(results.real), -1),
        _verdict("Entropy falls during training, text-conditional, seed 0 (figure 4)",
                 *_entropy_change([row for row in results.curve if row["step"]][-2:]), -1),
        scale("More guidance in sampling, more IS: 10 against 1 (figure 6)", 10.0, 1.0, IS, +1),
        scale("Much guidance in sampling, more FID: 10 against 2 (figure 6)", 10.0, 2.0, "fid", +1),
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
        (right, list(results.swept), [[units] for units in results.swept.values()], "sampling guidance scale"),
    ):
        second = axes.twinx()
        for own, key, color in ((axes, "fid", "tab:blue"), (second, IS, "tab:orange")):
            values = [_fidelity_row(runs)[key] for runs in rows]
            means, errors = [one.value for one in values], [one.error for one in values]
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


def _corrected(units: Units, key: str) -> Any:
    """Values over units; those of FID and sFID without their bias."""
    return units.get(f"{key}{CORRECTED}", units[key]).double()


def _fidelity_row(runs: list[Units]) -> dict[str, Value]:
    return {key: mean_of(sum(units[key].double() for units in runs) / len(runs)).summary() for key in MEASURES}


def _mean_verdicts(runs: list[Verdicts]) -> Verdicts:
    """The same images of several runs as one: prompt and share of the runs that are right."""
    return [(rows[0][0], sum(correct for _, correct in rows) / len(rows)) for rows in zip(*runs, strict=True)]


def _categories(verdicts: Verdicts) -> dict[str, Value]:
    return {tag: one.summary() for tag, one in shares(verdicts).items() if tag not in TOTALS}


def _difference(one: list[Units], other: list[Units], key: str) -> Value:
    """Difference of the means over runs, with the error of drawing the samples, unit by unit."""
    means = [sum(_corrected(units, key) for units in runs) / len(runs) for runs in (one, other)]
    return mean_of(means[0] - means[1]).summary()


def _entropy_change(rows: list[dict[str, Any]]) -> tuple[Value, float]:
    """Mean change of the conditional entropy over some policies, its error over images, and that over trainings."""
    rows = [row for row in rows if row["mode"] == "conditional" and "change" in row]
    changes = [row["change"] for row in rows]
    spread = _of_training(_spread(changes), [len(rows)]) if len(rows) > 1 else 0.0
    return Value(sum(changes) / len(rows), max(row["change_error"] for row in rows)), spread


def _spread(means: Sequence[float]) -> float:
    """Standard deviation of a measure over trainings of one recipe."""
    return statistics.stdev(means)


def _of_training(spread: float, runs: list[int]) -> float:
    """Error of the difference of means of so many trainings each; a base policy is given and adds none."""
    return spread * math.sqrt(sum(1 / count for count in runs))


def _verdict(claim: str, difference: Value, of_training: float, sign: int) -> str:
    mean, error = difference.value, math.hypot(difference.error, of_training)
    word = "shows" if mean * sign > 0 else "does not repeat: the opposite shows"
    return f"- {claim}: **{word if abs(mean) > CLEAR * error else 'not clear'}** ({mean:+.3f} ± {error:.3f})"


def _designs(rows: dict[str, Any], task: str) -> dict[str, Any]:
    return {**{letter.upper(): rows[f"{task}_{letter}"] for letter in "abc"}, "D": rows[task]}


def _table(rows: dict[str, dict[str, Value]], paper: dict[str, paper_numbers.Row], columns: dict[str, str]) -> str:
    """Rows of measures, each followed by the paper's numbers where it has some, for the first of the columns."""
    lines: list[tuple[str, list[str]]] = []
    for name, row in rows.items():
        lines.append((name, [row[key].text() for key in columns]))
        if name in paper:
            numbers = [f"{paper[name][key]:g}" if key in paper[name] else "" for key in columns]
            lines.append((f"*{name}, in the paper*", numbers))
    return markdown_table(list(columns.values()), lines)
