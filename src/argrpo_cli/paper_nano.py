"""The paper's tables and figures in the nano world, on one page: `make paper-nano`.

    python -m argrpo_cli.paper_nano [--out build/paper-nano] [--page docs/paper_nano.md] [--n 1008]

Trains the recipes of recipes/nano/paper/, measures every policy with the same seeds, and writes the page: tables beside
the paper's numbers, figures, and which findings show. Whatever is finished is not done again, so an interrupted call
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from argrpo_cli import paper_numbers
from argrpo_cli.captions import SHARED, read_captions
from argrpo_cli.evals.benchmark import run
from argrpo_cli.evals.entropy import measure as measure_entropy
from argrpo_cli.evals.entropy_results import NamedPolicy, Question, subjects_of_run
from argrpo_cli.evals.geneval import NANO_SETS, RESULTS, TOTALS, GenEval, shares
from argrpo_cli.geneval.nano_detector import load_detector
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.kept import claim
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.rewards import REWARDS, load_rewards
from argrpo_cli.shapes import Sampling, Value
from argrpo_cli.study import BATCH_SIZE, SEED, Study, Units, corrected, markdown, mean_row, paired
from argrpo_cli.system.errors import UserError, exit_code
from argrpo_cli.system.files import (
    fill_template,
    make_dir,
    read_json,
    read_jsonl,
    save_figure,
    write_json,
    write_text,
)
from argrpo_cli.system.processes import join_team

Verdicts = Sequence[tuple[Any, float]]  # prompt and 1 or 0 for each image

REPEATED, SEEDS = ("c2i", "t2i"), (0, 1, 2)  # trained three times, to see how far one training is from the next
C2I = ("c2i", "c2i_no_kl", "c2i_a", "c2i_b", "c2i_c", "c2i_cfg_1", "c2i_cfg_4", "c2i_cfg_7")
T2I = ("t2i", "t2i_a", "t2i_b", "t2i_c")
SAMPLING_SCALES = (1.0, 2.0, 4.0, 7.0, 10.0)  # figure 6, right; of the model trained at 7
TRAINED_SCALES = {1: "c2i_cfg_1", 2: "c2i", 4: "c2i_cfg_4", 7: "c2i_cfg_7"}  # figure 6, middle; sampled at 2
LEAST_IMAGES, MOST_PER_PROMPT = 96, 64
IS = "inception_score"
FIDELITY = {IS: "IS", "fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall"}
MEASURES = {**FIDELITY, "match": "match, dB", "recognised": "recognised", "entropy": "entropy"}
TAGS = tuple(paper_numbers.before_and_after(3)[paper_numbers.AFTER])[:-1]  # GenEval's categories in the paper's order
CLEAR = 3.0  # standard errors from which a difference is called one


@dataclass(frozen=True)
class PaperStudy(Study):
    """Where runs and results lie, and how many images are drawn."""

    per_prompt: int

    def claim(self) -> None:
        """Take the folder for these settings, recipes and networks.

        Raises:
            UserError: it holds results of others.
        """
        recipes = "".join(dump_recipe(load_recipe(f"nano/paper/{name}")) for name in (*C2I, *T2I))
        rewards = load_rewards([name for name in REWARDS if name.startswith("nano-") and name != "nano-geneval"])
        identity = {
            "images": self.images,
            "per_prompt": self.per_prompt,
            "seed": SEED,
            "recipes": hashlib.sha256(recipes.encode()).hexdigest(),
            "captions": hashlib.sha256("\n".join(read_captions("nano")).encode()).hexdigest(),
            "policies": [load_policy(name).fingerprint() for name in ("nano-c2i", "nano-t2i")],
            "networks": fingerprint([load_judge().recogniser, load_detector().network]),
            "rewards": {name: one["weights"] for name, one in rewards.identity().items()},
        }
        if self.images < LEAST_IMAGES:
            raise UserError(f"--n {self.images}: give {LEAST_IMAGES} or more")
        if not 1 <= self.per_prompt <= MOST_PER_PROMPT:
            raise UserError(f"--per-prompt {self.per_prompt}: give 1 to {MOST_PER_PROMPT}")
        claim(self.root, identity, BATCH_SIZE, "results of other settings, recipes or networks")

    def run(self, name: str, seed: int = 0) -> str:
        """The trained policy of a recipe under a training seed; trains it, or what is left of it."""
        recipe = load_recipe(f"nano/paper/{name}").model_copy(update={"seed": seed})
        return self.trained(recipe, f"{name}-seed{seed}" if seed else name)

    def geneval(self, policy: str) -> list[tuple[Any, float]]:
        """Prompt and verdict of every image, official and added prompts together."""
        out = self.root / "geneval" / load_policy(policy).fingerprint()[:16]
        run(GenEval(sets=NANO_SETS), [policy], out, n=self.per_prompt, seed=SEED)
        prompts = {one.index: one for name in NANO_SETS for one in prompt_set(name)}
        (table,) = out.glob(f"*/{RESULTS}")
        return [(prompts[row["index"]], float(row["correct"])) for row in read_jsonl(table)]

    def entropy(self, subjects: list[NamedPolicy], question: Question) -> list[dict[str, Any]]:
        """Rows of `argrpo entropy` for some policies, of which the first is the base."""
        last = load_policy(subjects[-1].path).fingerprint()[:16]
        path = self.root / "results" / f"entropy-{question.prompts or 'val'}-{last}.json"
        if not path.is_file():
            folder = path.with_suffix(".measured")
            rows = measure_entropy(subjects, question, asdict(Sampling()), 64, join_team("auto"), folder)
            write_json(path, {"rows": rows})
            shutil.rmtree(folder)
        return read_json(path)["rows"]


def repeat_the_paper(place: PaperStudy) -> Results:
    """Train and measure everything."""
    place.claim()
    runs: dict[str, list[str]] = {}
    for name in (*C2I, *T2I):
        print(f"training {name}")
        runs[name] = [place.run(name, seed) for seed in (SEEDS if name in REPEATED else SEEDS[:1])]
    print("measuring")
    (swept,) = runs[TRAINED_SCALES[7]]
    trained = [NamedPolicy(run, f"seed {seed}") for seed, run in zip(SEEDS, runs["c2i"], strict=True)]
    return Results(
        {"base": [place.fidelity("nano-c2i")], **{name: [place.fidelity(run) for run in runs[name]] for name in C2I}},
        {scale: place.fidelity(swept, scale) for scale in SAMPLING_SCALES},
        {"base": [place.geneval("nano-t2i")], **{name: [place.geneval(run) for run in runs[name]] for name in T2I}},
        place.entropy([NamedPolicy("nano-c2i", "base"), *trained], Question(seed=SEED)),
        place.entropy(subjects_of_run(Path(runs["t2i"][0])), Question("geneval", seed=SEED)),
    )


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
    c2i = {name: mean_row(runs, MEASURES) for name, runs in results.c2i.items()}
    swept = {scale: mean_row([units], MEASURES) for scale, units in results.swept.items()}
    fidelity = paper_numbers.before_and_after(2, "c2i-b-256")
    without = paper_numbers.table(5)["c2i_b256_no_kl"]["trained"]
    return fill_template(
        Path(__file__).parent / "paper" / "nano.md.j2",
        grpo=load_recipe("nano/paper/c2i").grpo,
        trainings=len(results.c2i["c2i"]),
        images=images,
        per_prompt=per_prompt,
        c2i=c2i,
        t2i={name: _categories(_mean_verdicts(runs)) for name, runs in results.t2i.items()},
        trained_at={f"trained at {scale}": c2i[name] for scale, name in TRAINED_SCALES.items()},
        sampled_at={f"trained at 7, sampled at {scale:g}": row for scale, row in swept.items()},
        measures=MEASURES,
        categories={name: name.replace("_", " ") for name in (*TAGS, "overall")},
        of_paper=fidelity,
        with_kl=dict(zip(("base", "with KL"), fidelity.values(), strict=True)) | {"without KL": without},
        of_geneval=paper_numbers.before_and_after(3),
        ablations={number: paper_numbers.ablation(number) for number in (6, 7)},
        table=markdown,
        clear=CLEAR,
        results=results,
        last_steps=[row for row in results.curve if row["step"]][-2:],
        tags=TAGS,
        held_out=[tag for tag in TAGS if tag not in SHARED],
        **comparisons(results),
    )


def comparisons(results: Results) -> dict[str, Callable[..., str]]:
    """What says of a claim of the paper with which difference it shows here, and whether that is clear of chance, by
    the kind of what is measured."""

    def of_training(means: Sequence[float], *pairs: tuple[str, list[Any]]) -> float:
        """Error that training adds to a difference, from the means of a measure over trainings of the full recipe; a
        base policy is given and adds none."""
        return statistics.stdev(means) * math.sqrt(sum(1 / len(runs) for name, runs in pairs if name != "base"))

    def fidelity(claim: str, one: str, other: str, key: str, sign: int) -> str:
        runs = results.c2i[one], results.c2i[other]
        means = [corrected(units, key).mean().item() for units in results.c2i["c2i"]]
        error = of_training(means, (one, runs[0]), (other, runs[1]))
        return _verdict(claim, paired(*runs, key), error, sign)

    def scale(claim: str, one: float, other: float, key: str, sign: int) -> str:  # one training is behind both
        return _verdict(claim, paired([results.swept[one]], [results.swept[other]], key), 0.0, sign)

    def geneval(claim: str, one: str, other: str, tags: Sequence[str], sign: int = +1) -> str:
        runs = results.t2i[one], results.t2i[other]

        def overall(verdicts: Verdicts) -> Value:
            return _categories([row for row in verdicts if row[0].tag in tags])["overall"]

        error = of_training([overall(run).value for run in results.t2i["t2i"]], (one, runs[0]), (other, runs[1]))
        pairs = zip(*map(_mean_verdicts, runs), strict=True)
        return _verdict(claim, overall([(prompt, x - y) for (prompt, x), (_, y) in pairs]), error, sign)

    def entropy(claim: str, rows: Sequence[dict[str, Any]], sign: int) -> str:
        """The mean change over some policies; its errors over images, and over trainings."""
        rows = [row for row in rows if row["mode"] == "conditional" and "change" in row]
        changes = [row["change"] for row in rows]
        error = statistics.stdev(changes) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
        change = Value(statistics.fmean(changes), max(row["change_error"] for row in rows))
        return _verdict(claim, change, error, sign)

    return {"fidelity": fidelity, "scale": scale, "geneval": geneval, "entropy": entropy}


def draw_figures(results: Results, path: Path) -> None:
    """Figure 4 and both halves of figure 6 as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for mode in ("conditional", "guided"):
        own = [row for row in results.curve if row["mode"] == mode]
        means, errors = [row["mean"] for row in own], [row["standard_error"] for row in own]
        left.errorbar([row["step"] for row in own], means, errors, marker="o", capsize=3, label=mode)
    left.set_xlabel("training step")
    left.set_ylabel("entropy, nats per token")
    left.legend()
    trained = {scale: results.c2i[name] for scale, name in TRAINED_SCALES.items()}
    swept = {scale: [units] for scale, units in results.swept.items()}
    for axes, rows, label in (
        (middle, trained, "training guidance scale"),
        (right, swept, "sampling guidance scale"),
    ):
        second = axes.twinx()
        for own, key, color in ((axes, "fid", "tab:blue"), (second, IS, "tab:orange")):
            values = [mean_row(runs, MEASURES)[key] for runs in rows.values()]
            means, errors = [one.value for one in values], [one.error for one in values]
            own.errorbar(list(rows), means, errors, color=color, marker="o", capsize=3)
            own.set_ylabel(FIDELITY[key], color=color)
        axes.set_xlabel(label)
    save_figure(path, figure, dpi=100)


def _mean_verdicts(runs: list[Verdicts]) -> Verdicts:
    """The same images of several runs as one: prompt and share of the runs that are right."""
    return [(rows[0][0], sum(correct for _, correct in rows) / len(rows)) for rows in zip(*runs, strict=True)]


def _categories(verdicts: Verdicts) -> dict[str, Value]:
    return {tag: one.summary() for tag, one in shares(verdicts).items() if tag not in TOTALS}


def _verdict(claim: str, difference: Value, of_training: float, sign: int) -> str:
    mean, error = difference.value, math.hypot(difference.error, of_training)
    word = "shows" if mean * sign > 0 else "does not repeat: the opposite shows"
    return f"{claim}: **{word if abs(mean) > CLEAR * error else 'not clear'}** ({mean:+.3f} ± {error:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables in the nano world, on one page.")
    parser.add_argument("--out", type=Path, default=Path("build/paper-nano"))
    parser.add_argument("--page", type=Path, default=Path("docs/paper_nano.md"))
    parser.add_argument("--n", type=int, default=1008, help="images per policy")
    parser.add_argument("--per-prompt", type=int, default=4, help="images per prompt of GenEval")
    args = parser.parse_args()
    started = time.time()
    with exit_code("paper-nano"):
        figures = make_dir(args.page.parent)
        results = repeat_the_paper(PaperStudy(args.out, args.n, args.per_prompt))
        draw_figures(results, figures / "paper_nano.png")
        write_text(args.page, page(results, args.n, args.per_prompt))
    print(f"{args.page} written after {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
