"""The paper's tables and figures in the nano world, on one page: `make paper-nano`.

    python -m argrpo_cli.paper.nano [--out build/paper-nano] [--page docs/paper_nano.md] [--n 1008]

Trains the recipes of recipes/nano/paper/, measures every policy with the same seeds, and writes the page. Whatever is
finished is not done again, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from argrpo_cli.captions import read_captions
from argrpo_cli.evals.benchmark import run
from argrpo_cli.evals.entropy import Question, Subject, subjects_of_run
from argrpo_cli.evals.entropy import measure as measure_entropy
from argrpo_cli.evals.geneval import NANO_SETS, RESULTS, GenEval
from argrpo_cli.evals.nano import measure_policy
from argrpo_cli.geneval.nano_detector import load_detector
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.kept import claim
from argrpo_cli.nano.judge import load_judge
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.paper.page import Results, draw_figures, page
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import dump_recipe, load_recipe
from argrpo_cli.rewards import REWARDS, load_rewards
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, read_json, read_jsonl, save_tensors, write_json, write_text
from argrpo_cli.training import run_training

REPEATED, SEEDS = ("c2i", "t2i"), (0, 1, 2)  # trained three times, to see how far one training is from the next
C2I = ("c2i", "c2i_no_kl", "c2i_a", "c2i_b", "c2i_c", "c2i_cfg_1", "c2i_cfg_4", "c2i_cfg_7")
T2I = ("t2i", "t2i_a", "t2i_b", "t2i_c")
SAMPLING_SCALES = (1.0, 2.0, 4.0, 7.0, 10.0)  # figure 6, right; of the model trained at 7
CFG_MODEL = "c2i_cfg_7"
SEED = 0  # of all samples
LEAST_IMAGES, MOST_PER_PROMPT, BATCH_SIZE = 96, 64, 64


@dataclass(frozen=True)
class Workplace:
    """Where runs and results lie, and how many images are drawn."""

    root: Path
    images: int
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
            "networks": fingerprint([load_judge().recogniser.network, load_detector().network]),
            "rewards": {name: one["weights"] for name, one in rewards.identity().items()},
        }
        if self.images < LEAST_IMAGES:
            raise UserError(f"--n {self.images}: give {LEAST_IMAGES} or more")
        if not 1 <= self.per_prompt <= MOST_PER_PROMPT:
            raise UserError(f"--per-prompt {self.per_prompt}: give 1 to {MOST_PER_PROMPT}")
        claim(self.root, identity, BATCH_SIZE, "results of other settings, recipes or networks")

    def run(self, name: str, seed: int = 0) -> str:
        """The trained policy of a recipe under a training seed; trains it, or what is left of it."""
        out = self.root / "runs" / (f"{name}-seed{seed}" if seed else name)
        if not (out / "policy" / "policy.json").is_file():
            resume = (out / "recipe.yaml").is_file()
            recipe = load_recipe(f"nano/paper/{name}").model_copy(update={"seed": seed})
            run_training(recipe, out, resume=resume)
        return str(out)

    def fidelity(self, policy: str, cfg_scale: float = 2.0) -> dict[str, Any]:
        """The measures of `argrpo eval nano` as values over units."""
        opened = load_policy(policy)
        path = self.root / "results" / f"{opened.fingerprint()[:16]}-cfg{cfg_scale:g}.safetensors"
        if not path.is_file():
            folder = path.with_suffix(".drawn")
            measures = measure_policy(opened, self.images, Sampling(cfg_scale=cfg_scale), SEED, folder)
            save_tensors(path, {key: one.strata[0] for key, one in measures.items()})
            shutil.rmtree(folder)
        return load_file(path)

    def geneval(self, policy: str) -> list[tuple[Any, float]]:
        """Prompt and verdict of every image, official and added prompts together."""
        out = self.root / "geneval" / load_policy(policy).fingerprint()[:16]
        run(GenEval(sets=NANO_SETS), [policy], out, n=self.per_prompt, seed=SEED)
        prompts = {one.index: one for name in NANO_SETS for one in prompt_set(name)}
        (table,) = out.glob(f"*/{RESULTS}")
        return [(prompts[row["index"]], float(row["correct"])) for row in read_jsonl(table)]

    def entropy(self, subjects: list[Subject], question: Question) -> list[dict[str, Any]]:
        """Rows of `argrpo entropy` for some policies, of which the first is the base."""
        last = load_policy(subjects[-1].path).fingerprint()[:16]
        path = self.root / "results" / f"entropy-{question.split or question.prompts}-{last}.json"
        if not path.is_file():
            write_json(path, {"rows": measure_entropy(subjects, question)})
        return read_json(path)["rows"]


def repeat_the_paper(place: Workplace, say: Callable[[str], None] = print) -> Results:
    """Train and measure everything."""
    place.claim()
    runs: dict[str, list[str]] = {}
    for name in (*C2I, *T2I):
        say(f"training {name}")
        runs[name] = [place.run(name, seed) for seed in (SEEDS if name in REPEATED else SEEDS[:1])]
    say("measuring")
    (swept,) = runs[CFG_MODEL]
    trained = [Subject(run, f"seed {seed}") for seed, run in zip(SEEDS, runs["c2i"], strict=True)]
    return Results(
        {"base": [place.fidelity("nano-c2i")], **{name: [place.fidelity(run) for run in runs[name]] for name in C2I}},
        {scale: place.fidelity(swept, scale) for scale in SAMPLING_SCALES},
        {"base": [place.geneval("nano-t2i")], **{name: [place.geneval(run) for run in runs[name]] for name in T2I}},
        place.entropy([Subject("nano-c2i", "base"), *trained], Question("val", None, seed=SEED)),
        place.entropy(subjects_of_run(Path(runs["t2i"][0])), Question(None, "geneval", seed=SEED)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables in the nano world, on one page.")
    parser.add_argument("--out", type=Path, default=Path("build/paper-nano"))
    parser.add_argument("--page", type=Path, default=Path("docs/paper_nano.md"))
    parser.add_argument("--n", type=int, default=1008, help="images per policy")
    parser.add_argument("--per-prompt", type=int, default=4, help="images per prompt of GenEval")
    args = parser.parse_args()
    started = time.time()
    try:
        figures = make_dir(args.page.parent)
        results = repeat_the_paper(Workplace(args.out, args.n, args.per_prompt))
        draw_figures(results, figures / "paper_nano.png")
        write_text(args.page, page(results, args.n, args.per_prompt))
    except UserError as error:
        print(f"paper-nano: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.page} written after {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
