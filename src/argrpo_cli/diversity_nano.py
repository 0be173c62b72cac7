"""Methods that keep diversity, side by side in the nano world, on one page: `make diversity`.

    python -m argrpo_cli.diversity_nano [--out build/diversity] [--page docs/diversity.md] [--n 720]

Guidance is distilled into nano-c2i once. From there each recipe of recipes/nano/methods/ trains under three seeds, and
every policy is drawn with the same classes and seeds, without guidance and with. Whatever is finished is not done
again, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo_cli.evals.nano import TOTAL, within_class_std
from argrpo_cli.kept import claim
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.nano.scenes import CLASS_NAMES
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import checkpoint_folders
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.shapes import Value
from argrpo_cli.study import BATCH_SIZE, SEED, Study, Units, markdown, mean_row, paired
from argrpo_cli.system.errors import UserError, exit_code
from argrpo_cli.system.files import fill_template, make_dir, save_figure, write_text

if TYPE_CHECKING:
    from argrpo_cli.recipe import Recipe

START, PLAIN = "nano/c2i_distil", "grpo"
METHODS = {  # recipe to what stands in the table
    PLAIN: "GRPO",
    "ema": "running mean of the weights",
    "kl": "KL term",
    "kl_decay": "KL term that fades",
    "reference": "KL term to a reference that follows",
    "entropy": "entropy bonus after LOO-FID",
    "gcpo": "GCPO's tokens",
    "stage": "STAGE",
    "guidance": "guidance-contrastive tokens",
    "eg": "EG-GRPO",
    "sequence": "ratio of images, two updates a batch",
    "twice": "two updates a batch",
    "loo_fid": "leave-one-out FID",
    "loo_fid_light": "leave-one-out FID, a quarter of its weight",
    "clusters": "cluster bonus",
    "stage_entropy": "STAGE's entropy reward",
}
PIXEL, CCA = "pixel", "cca"  # which draw no images: for as long as plain GRPO takes, or the distillation
SCENES = {PIXEL: "VA-pi", CCA: "CCA instead of the distillation"}
SEEDS = (0, 1, 2)
GUIDED = 2.0
SLOWER = 1.1  # times the seconds of plain GRPO, from which on equal time is another policy than equal images
GAIN = "gain"
MEASURES = {
    GAIN: "reward gain, sd",
    "match": "match, dB",
    "fid_corrected": "FID less its bias",  # which is larger for a policy of more variety
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "vendi": "Vendi",
    "entropy": "entropy",
}
COMPARED = (GAIN, "fid_corrected", "recall", "coverage", "vendi", "entropy")  # with plain GRPO, in words
CLEAR = 3.0  # standard errors from which a difference is called one: some seventy are looked at
ENOUGH = 0.9  # of plain GRPO's gain


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        base, start: of nano-c2i under guidance, and of its distillation without and with it.
        methods: of each method its runs, drawn without guidance and with.
        timed: what those that take longer than plain GRPO were after its seconds, and what draws no images; all without
            guidance.
        seconds: a method's training as a multiple of plain GRPO's, see `cost`.
    """

    base: Units
    start: tuple[Units, Units]
    methods: dict[str, tuple[list[Units], list[Units]]]
    timed: dict[str, list[Units]]
    seconds: dict[str, float]


def recipe_of(name: str, start: str, seed: int, seconds: float | None = None) -> Recipe:
    """A recipe of the folder, from the policy `start`, and for so many seconds of training."""
    limit = [] if seconds is None else [f"{name}.time_limit_minutes={seconds / 60}"]  # their sections have their names
    return load_recipe(f"nano/methods/{name}", [f"policy.checkpoint={start}", f"seed={seed}", *limit])


def take(study: Study, names: Sequence[str]) -> None:
    """Take the folder for these recipes and networks; UserError where it holds results of others."""
    recipes = {name: dump_recipe(recipe_of(name, "start", 0)) for name in (*names, *SCENES)}
    identity = {
        "images": study.images,
        "seed": SEED,
        "recipes": recipes | {START: dump_recipe(load_recipe(START))},
        "base": load_policy("nano-c2i").fingerprint(),
        "judge": fingerprint([load_judge().recogniser]),
    }
    claim(study.root, identity, BATCH_SIZE, "results of other settings, recipes or networks")


def compare(study: Study, names: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = SEEDS) -> Results:
    """Train and measure everything, a seed of all methods before the next."""
    take(study, names)
    distilled = Path(study.trained(load_recipe(START), "start"))
    start = str(distilled / "policy")
    runs: dict[str, list[Path]] = {name: [] for name in (*names, *SCENES)}
    for seed in seeds:
        for name in runs:
            print(f"training {name}, seed {seed}", flush=True)
            recipe = recipe_of(name, start, seed)
            if name in SCENES:
                like = distilled if name == CCA else runs[PLAIN][-1]
                recipe = recipe_of(name, "nano-c2i" if name == CCA else start, seed, _seconds(like)[-1])
            runs[name].append(Path(study.trained(recipe, f"{name}-seed{seed}")))
    print("measuring", flush=True)
    costs = {name: cost(runs[name], batch_of(name)) for name in names}
    seconds = {name: one / costs[PLAIN] for name, one in costs.items()}
    timed = {
        name: [study.fidelity(within(run, 1 / seconds[name], batch_of(name)), 1.0) for run in runs[name]]
        for name in names
        if seconds[name] > SLOWER
    }
    timed |= {name: [study.fidelity(str(run / "policy"), 1.0) for run in runs[name]] for name in SCENES}
    return Results(
        study.fidelity("nano-c2i", GUIDED),
        (study.fidelity(start, 1.0), study.fidelity(start, GUIDED)),
        {
            name: tuple([study.fidelity(str(run / "policy"), scale) for run in runs[name]] for scale in (1.0, GUIDED))
            for name in names
        },
        timed,
        seconds,
    )


def batch_of(name: str) -> int:
    """Updates of each batch of images."""
    return recipe_of(name, "start", 0).grpo.updates_per_batch


def cost(runs: Sequence[Path], updates_per_batch: int) -> float:
    """Seconds that a batch of images takes, drawing and updates: the least of all batches of all runs, since what else
    the machine does only adds to it."""
    ends = [_seconds(run)[updates_per_batch - 1 :: updates_per_batch] for run in runs]
    return min(end - begin for one in ends for begin, end in itertools.pairwise([0.0, *one]))


def within(run: Path, share: float, updates_per_batch: int = 1) -> str:
    """The last checkpoint of a run within that share of its updates, at the end of a batch.

    Raises:
        UserError: it had none by then.
    """
    folders, last = checkpoint_folders(run), share * len(_seconds(run))
    steps = [step for step in folders if step <= last and step % updates_per_batch == 0]
    if not steps:
        raise UserError(f"{run} has no checkpoint of its first {last:.0f} updates; lower logging.save_every")
    return str(folders[max(steps)])


def _seconds(run: Path) -> list[float]:
    """Training time after each update."""
    return [record["seconds_total"] for record in RunDirectory(run).metrics()]


# --- what is made of it


def with_gain(units: Units, start: Units) -> Units:
    """The measures, and the total reward as standard deviations of one class above that of `start`, image by image."""
    classes = torch.arange(len(start[TOTAL])) % len(CLASS_NAMES)  # as `eval nano` deals them out
    return {**units, GAIN: (units[TOTAL] - start[TOTAL]).double() / within_class_std(start[TOTAL].double(), classes)}


def over_runs(values: Sequence[float], drawn: Value) -> Value:
    """A mean over runs, whose error joins that of drawing the samples, the same for all, with that of training."""
    trained = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Value(drawn.value, math.hypot(drawn.error, trained), drawn.count)


def row(runs: Sequence[Units]) -> dict[str, Value]:
    """The measures of a policy, means over its runs."""
    drawn = mean_row(runs, MEASURES)
    return {key: over_runs([units[key].double().mean().item() for units in runs], drawn[key]) for key in MEASURES}


def minus(runs: Sequence[Units], others: Sequence[Units], key: str) -> Value:
    """Difference of two means over runs with the same seeds; of one `other`, such as the start, to each of the runs."""
    pairs = list(zip(runs, others if len(others) == len(runs) else list(others) * len(runs), strict=True))
    return over_runs(
        [paired([one], [other], key).value for one, other in pairs], paired(*map(list, zip(*pairs, strict=True)), key)
    )


def keeps(runs: Sequence[Units], plain: Sequence[Units], start: Units) -> bool:
    """Whether a method gains `ENOUGH` of plain GRPO's reward with recall and entropy no further below the start's than
    one standard error."""
    enough = minus(runs, [start], GAIN).value >= ENOUGH * minus(plain, [start], GAIN).value
    falls = [minus(runs, [start], key) for key in ("recall", "entropy")]
    return enough and all(one.value >= -one.error for one in falls)


def page(results: Results, images: int, recipe: Recipe) -> str:
    """The page in Markdown."""
    start, guided = results.start
    runs = {name: [with_gain(one, start) for one in own] for name, (own, _) in results.methods.items()}
    others = {name: [with_gain(one, guided) for one in own] for name, (_, own) in results.methods.items()}
    timed = {name: [with_gain(one, start) for one in own] for name, own in results.timed.items()}
    base = {"nano-c2i, guided": row([with_gain(results.base, start)])}
    unguided = base | {"distilled": row([with_gain(start, start)])}
    plain = runs[PLAIN]
    sentences = {
        name: [
            (MEASURES[key], difference)
            for key in COMPARED
            if abs((difference := minus(runs[name], plain, key)).value) > CLEAR * difference.error
        ]
        for name in runs
        if name != PLAIN
    }
    start_row = [with_gain(start, start)]
    return fill_template(
        Path(__file__).parent / "paper" / "diversity.md.j2",
        recipe=recipe,
        images=images,
        seeds=len(plain),
        methods=METHODS,
        unguided=unguided | {METHODS[name]: row(own) for name, own in runs.items()},
        timed=unguided | {(METHODS | SCENES)[name]: row(own) for name, own in {PLAIN: plain, **timed}.items()},
        guided={"distilled": row([with_gain(guided, guided)])}
        | {METHODS[name]: row(own) for name, own in others.items()},
        seconds=results.seconds,
        table=partial(markdown, columns=MEASURES, paper={}),
        sentences=sentences,
        changes={
            name: {key: minus(own, start_row, key) for key in (GAIN, "recall", "entropy")} for name, own in runs.items()
        },
        keepers=[METHODS[name] for name, own in runs.items() if keeps(own, plain, start_row[0])],
        clear=CLEAR,
        enough=ENOUGH,
    )


def draw_front(results: Results, path: Path) -> None:
    """Gain against recall, both with errors: what reward costs in diversity by each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, start = figure.subplots(), results.start[0]
    points: Mapping[str, Sequence[Units]] = {"distilled": [start]} | {
        METHODS[name]: own for name, (own, _) in results.methods.items()
    }
    cycle = [f"C{index}" for index in range(10)]
    for index, (label, own) in enumerate(points.items()):
        values = row([with_gain(one, start) for one in own])
        gain, recall = values[GAIN], values["recall"]
        axes.errorbar(
            gain.value,
            100 * recall.value,
            xerr=gain.error,
            yerr=100 * recall.error,
            marker="os^Dv"[index // len(cycle)],
            color="black" if label == "distilled" else cycle[index % len(cycle)],
            capsize=3,
            linestyle="none",
            label=label,
        )
    axes.set_xlabel("gain of the total reward, standard deviations within a class")
    axes.set_ylabel("recall, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(path, figure, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods that keep diversity, side by side in the nano world.")
    parser.add_argument("--out", type=Path, default=Path("build/diversity"))
    parser.add_argument("--page", type=Path, default=Path("docs/diversity.md"))
    parser.add_argument("--n", type=int, default=720, help="images per policy")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, 10), help="trainings of each method")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="these methods, beside plain GRPO")
    args = parser.parse_args()
    started = time.time()
    with exit_code("diversity"):
        least = 2 * len(CLASS_NAMES)
        if args.n < least:
            raise UserError(f"--n {args.n}: give {least} or more, two of each class")
        names = [name for name in METHODS if args.only is None or name in (PLAIN, *args.only)]
        figures = make_dir(args.page.parent)
        results = compare(Study(args.out, args.n), names, range(args.seeds))
        draw_front(results, figures / "diversity.png")
        write_text(args.page, page(results, args.n, load_recipe(f"nano/methods/{PLAIN}")))
    print(f"{args.page} written after {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
