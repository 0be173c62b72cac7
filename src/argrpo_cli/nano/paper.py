"""The paper's tables and figures in the nano world, on one page: `make paper-nano`.

    python -m argrpo_cli.nano.paper [--out build/paper-nano] [--page docs/paper_nano.md] [--n 1008]

Trains the recipes of recipes/nano/paper/, measures every policy with the same seeds, and writes the page. Whatever is
finished is not done again, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.files import make_dir, read_json, write_json, write_jsonl, write_text
from argrpo_cli.nano import paper_numbers as published

C2I = ("c2i", "c2i_no_kl", "c2i_a", "c2i_b", "c2i_c", "c2i_cfg_1", "c2i_cfg_4", "c2i_cfg_7")
T2I = ("t2i", "t2i_a", "t2i_b", "t2i_c")
SAMPLING_SCALES = (1.0, 2.0, 4.0, 7.0, 10.0)  # figure 6, right; the model of CFG_MODEL
CFG_MODEL = "c2i_cfg_7"
FIDELITY = {"inception_score": "IS", "fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall"}
MEASURES = {**FIDELITY, "match": "match, dB", "recognised": "recognised", "entropy": "entropy"}
CATEGORIES = ("position", "colors", "color_attr", "counting", "single_object", "two_object", "overall")  # table 3's
CLEAR = 2.0  # standard errors from which a difference is called one
SEED = 21  # of all samples

Value = dict[str, float]  # mean and error


@dataclass(frozen=True)
class Workplace:
    """Where runs and results lie, and how many images are drawn."""

    root: Path
    images: int
    per_prompt: int

    def run(self, name: str) -> Path:
        """The trained policy of a recipe; trains it, or what is left of it."""
        from argrpo_cli.grpo import run_training
        from argrpo_cli.recipe import load_recipe

        out = self.root / "runs" / name
        if not (out / "policy" / "policy.json").is_file():
            started = (out / "recipe.yaml").is_file()
            run_training(load_recipe(out / "recipe.yaml" if started else f"nano/paper/{name}"), out, resume=started)
        return out

    def fidelity(self, name: str, policy: str, cfg_scale: float = 2.0) -> dict[str, Value]:
        """The measures of `argrpo eval nano`."""
        from argrpo_cli.evals.nano import evaluate

        def measure() -> dict[str, Any]:
            result = evaluate([policy], n=self.images, cfg_scale=cfg_scale, seed=SEED)
            (only,) = result["policies"].values()
            return {**only, "total_sd": {"mean": result["within_class_std"]["total_reward"], "error": 0.0}}

        return self._kept(f"fidelity-{name}-cfg{cfg_scale:g}.json", measure)

    def geneval(self, name: str, policy: str) -> dict[str, Value]:
        """Categories and overall of `argrpo eval geneval`, official and added prompts together."""
        from argrpo_cli.evals.geneval import Protocol, run_geneval

        def measure() -> dict[str, Any]:
            out = self.root / "geneval" / name
            result = run_geneval([policy], out, Protocol(per_prompt=self.per_prompt, seed=SEED))
            (only,) = result["scores"].values()
            return list(only.values())[-1]

        return self._kept(f"geneval-{name}.json", measure)

    def entropy(self, name: str, run: Path) -> list[dict[str, Any]]:
        """Conditional and guided entropy of a run's checkpoints along samples of the benchmark's prompts."""
        from argrpo_cli.entropy import Question, measure, subjects_of_run, write_results

        def rows() -> dict[str, Any]:
            found = measure(subjects_of_run(run), Question(None, "geneval", seed=SEED))
            write_results(found, self.root / f"entropy-{name}")
            return {"rows": found}

        return self._kept(f"entropy-{name}.json", rows)["rows"]

    def _kept(self, file: str, measure: Any) -> dict[str, Any]:
        path = self.root / "results" / file
        if not path.is_file():
            print(f"measuring {path.stem}", flush=True)
            write_json(path, measure())
        return read_json(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables in the nano world, on one page.")
    parser.add_argument("--out", type=Path, default=Path("build/paper-nano"))
    parser.add_argument("--page", type=Path, default=Path("docs/paper_nano.md"))
    parser.add_argument("--n", type=int, default=1008, help="images per policy")
    parser.add_argument("--per-prompt", type=int, default=4, help="images per prompt of GenEval")
    args = parser.parse_args()
    place, started = Workplace(make_dir(args.out), args.n, args.per_prompt), time.time()
    runs = {name: place.run(name) for name in (*C2I, *T2I)}
    c2i = {"base": place.fidelity("c2i-base", "nano-c2i")}
    c2i |= {name: place.fidelity(name, str(runs[name])) for name in C2I}
    swept = {scale: place.fidelity(CFG_MODEL, str(runs[CFG_MODEL]), scale) for scale in SAMPLING_SCALES}
    t2i = {"base": place.geneval("t2i-base", "nano-t2i")}
    t2i |= {name: place.geneval(name, str(runs[name])) for name in T2I}
    curve = place.entropy("t2i", runs["t2i"])
    figures = make_dir(args.page.parent)
    draw_figures(swept, {name: c2i[name] for name in C2I if "cfg" in name or name == "c2i"}, curve,
                 figures / "paper_nano.png")  # fmt: skip
    write_text(args.page, page(c2i, swept, t2i, curve, place))
    write_jsonl(place.root / "tables.jsonl", [{"c2i": c2i}, {"t2i": t2i}])
    print(f"{args.page} written after {(time.time() - started) / 60:.0f} minutes")


def page(
    c2i: dict[str, dict[str, Value]],
    swept: dict[float, dict[str, Value]],
    t2i: dict[str, dict[str, Value]],
    curve: list[dict[str, Any]],
    place: Workplace,
) -> str:
    """The page in Markdown."""
    parts = [
        "# The paper's tables in the nano world",
        "Made by `make paper-nano` from the recipes in `recipes/nano/paper/`: 60 updates of 48 images each, β = 0.1, "
        f"one run per row. {place.images:,} samples a policy ({place.per_prompt} per GenEval prompt) with the same "
        "seeds; ± standard errors of the samples, which leave out that another training seed would give another run. "
        "Beside each the paper's own numbers, of models a thousand times larger on other data: compare directions, "
        "not sizes. Fidelity is measured on the nano judge's features, GenEval on the nano detector.",
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
        _table({"LlamaGen (base)": t2i["base"], "AR-GRPO": t2i["t2i"]}, published.TABLE_3, _categories()),
        "## Table 7: reward designs, GenEval",
        _table({"base": t2i["base"], **_designs(t2i, "t2i")}, published.TABLE_7, _categories()),
        "## Figures 4 and 6",
        "![entropy and guidance](paper_nano.png)",
        "Left: entropy along samples of the GenEval prompts against the training step. Middle: trained under different "
        "guidance, sampled at 2. Right: the model trained at 7, sampled at different scales.",
        _table({f"trained at {_scale(name)}": c2i[name] for name in sorted(_by_cfg(c2i), key=_scale)}, {}, MEASURES),
        _table({f"trained at 7, sampled at {scale:g}": row for scale, row in swept.items()}, {}, MEASURES),
        "## What of the paper's findings shows here",
        *findings(c2i, swept, t2i, curve),
    ]
    return "\n\n".join(parts) + "\n"


def findings(
    c2i: dict[str, dict[str, Value]],
    swept: dict[float, dict[str, Value]],
    t2i: dict[str, dict[str, Value]],
    curve: list[dict[str, Any]],
) -> list[str]:
    """One bullet per finding of the paper, with the measured difference and whether it is clear of chance."""
    base, trained = c2i["base"], c2i["c2i"]
    guided = [row for row in curve if row["mode"] == "conditional"]
    last = guided[-1]
    lines = [
        _finding("Quality up: precision rises", trained, base, "precision", +1),
        _finding("Quality up: IS rises", trained, base, "inception_score", +1),
        _finding("Diversity down: recall falls", trained, base, "recall", -1),
        _finding("FID rises although quality does (table 2)", trained, base, "fid", +1),
        _finding("The KL term guards recall (with against without)", trained, c2i["c2i_no_kl"], "recall", +1),
        _finding("The KL term keeps FID lower (with against without)", trained, c2i["c2i_no_kl"], "fid", -1),
        _finding("Without realism IS is highest (C against D)", c2i["c2i_c"], trained, "inception_score", +1),
        _finding("Without quality FID is lowest (B against D)", c2i["c2i_b"], trained, "fid", -1),
        _finding("GenEval rises overall", t2i["t2i"], t2i["base"], "overall", +1),
        _finding(
            "All rewards beat no conditional one on GenEval (D against A)", t2i["t2i"], t2i["t2i_a"], "overall", +1
        ),
        _verdict("Entropy falls during training", last["change"], last["change_error"], -1),
        _finding("More guidance in sampling, more IS (10 against 1)", swept[10.0], swept[1.0], "inception_score", +1),
        _finding("... and more FID (10 against 2)", swept[10.0], swept[2.0], "fid", +1),
    ]
    return ["\n".join(lines)]


def _finding(claim: str, a: dict[str, Value], b: dict[str, Value], key: str, sign: int) -> str:
    """a - b as independent: the samples share seeds, so this errs on the side of no finding."""
    return _verdict(claim, a[key]["mean"] - b[key]["mean"], math.hypot(a[key]["error"], b[key]["error"]), sign)


def _verdict(claim: str, difference: float, error: float, sign: int) -> str:
    clear = abs(difference) > CLEAR * error
    word = "not clear" if not clear else "shows" if difference * sign > 0 else "does not repeat: the opposite shows"
    return f"- {claim}: **{word}** ({difference:+.3f} ± {error:.3f})"


def _designs(rows: dict[str, dict[str, Value]], task: str) -> dict[str, dict[str, Value]]:
    return {**{letter.upper(): rows[f"{task}_{letter}"] for letter in "abc"}, "D": rows[task]}


def _categories() -> dict[str, str]:
    return {name: name.replace("_", " ") for name in CATEGORIES}


def _by_cfg(rows: dict[str, dict[str, Value]]) -> list[str]:
    return [name for name in rows if name == "c2i" or "cfg" in name]


def _scale(name: str) -> int:
    return int(name.rpartition("_")[2]) if "cfg" in name else 2


def _table(rows: dict[str, dict[str, Value]], paper: dict[str, list[float]], columns: dict[str, str]) -> str:
    """Rows of measures, each followed by the paper's numbers where it has some (for its own columns, in order)."""
    lines = [f"| | {' | '.join(columns.values())} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row[key]) for key in columns)} |")
        if name in paper:
            numbers = [f"{value:g}" for value in paper[name]] + [""] * (len(columns) - len(paper[name]))
            lines.append(f"| *{name}, in the paper* | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _cell(value: Value) -> str:
    error = value["error"]
    return f"{value['mean']:.3f}" if error is None or math.isnan(error) else f"{value['mean']:.3f} ± {error:.3f}"


def draw_figures(
    swept: dict[float, dict[str, Value]],
    trained: dict[str, dict[str, Value]],
    curve: list[dict[str, Any]],
    path: Path,
) -> None:
    """Figure 4 and both halves of figure 6 as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from argrpo_cli.files import atomic_path

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for mode in ("conditional", "guided"):
        own = [row for row in curve if row["mode"] == mode]
        left.errorbar([row["step"] for row in own], [row["mean"] for row in own],
                      [row["standard_error"] for row in own], marker="o", capsize=3, label=mode)  # fmt: skip
    left.set_xlabel("training step")
    left.set_ylabel("entropy, nats per token")
    left.legend()
    names = sorted(trained, key=_scale)
    for axes, x, rows, label in (
        (middle, [_scale(name) for name in names], [trained[name] for name in names], "training guidance scale"),
        (right, list(swept), list(swept.values()), "sampling guidance scale"),
    ):
        second = axes.twinx()
        for own, key, color in ((axes, "fid", "tab:blue"), (second, "inception_score", "tab:orange")):
            own.errorbar(x, [row[key]["mean"] for row in rows], [row[key]["error"] for row in rows], color=color,
                         marker="o", capsize=3)  # fmt: skip
            own.set_ylabel(FIDELITY[key], color=color)
        axes.set_xlabel(label)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    main()
