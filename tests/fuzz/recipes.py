"""Recipes: refused in one line, or read as what a dump of them reads back."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from argrpo_cli.recipe import dump_recipe, find_recipe, list_recipes, load_recipe, parse_yaml
from tests.fuzz.mutate import HOSTILE, YAML_TEXTS, Damage, as_yaml, damaged, damaged_text, damaged_tree

BASES = ("nano/c2i", "nano/t2i_distil", "plus/c2i_l384", "c2i_b256_a")
EVERYTHING = """\
description: a: b
seed: 7
out: runs/mine
start: {method: distil, distil: {steps: 10, cfg_scale: [1.5, 3]}}
policy: {checkpoint: nano-c2i, dtype: auto, device: cpu, trainable: [layers.4., lm_head], text_device: same}
conditions: {classes: [dog, 3], weights: {dog: 2, "3": 0.5}, deduplicate: false}
sampling: {cfg_scale: 1.5, temperature: 0.9}
rewards:
  lambda_realism: 0.5
  terms:
    - {name: nano-clip, factor: 2, weight: 0.5}
    - {name: judge-quality, weight: 0, options: {backend: server, url: "http://localhost:1/v1", model: m, timeout: 3}}
    - {name: clip, options: {model: ViT-L-14-quickgelu, x: [a, null, 1.5]}}
grpo: {group_size: 4, batch_size: 16, epsilon_high: 0.3, loss: cispo, betas: [0.9, 0.99], warmup_steps: 2}
real: {path: "x/*.tar", limit: 5, captions: null}
cca: {lmbda: 8, condition_dropout: 0, steps: 3, betas: [0, 0.5]}
pixel: {noise: 0, samples: 2, perceptual: nano, mse_weight: 0}
guards: {ratio: {limit: 0.01}, kl: {action: ignore}, not_a_number: skip}
logging: {keep_steps: [3, 5], trackers: [tensorboard, wandb], project: "no"}
published: [{table: table 2, step: 0, measures: [FID], base: [3.1]}]
""".replace("a: b", '"a: b\\u2028c"')
KEYS = (
    "seed", "name", "description", "out", "beta", "grpo", "grpo.beta", "grpo.steps", "rewards.terms.0.weight",
    "rewards.terms.9", "start",
    "rewards.terms.0", "policy.lora", "policy.lora.rank", "conditions.classes", "conditions.weights.dog",
    "rewards.terms.0.options.model",
    "start.distil.steps", "logging.keep_steps.0", "published", "extends", "guards.kl.limit", "sampling",
    "conditions.dataset.name", "method", "real.path", "cca.lmbda", "pixel.samples", "", ".",
)  # fmt: skip


def seeds(folder: Path) -> list[str]:
    """Recipes as text: bundled ones, one that says much, and one with every key."""
    paths = [find_recipe(name) for name in BASES]
    texts = [
        re.sub("(?m)^(extends|start): (?=.+yaml)", rf"\1: {path.parent}/", path.read_text("utf-8")) for path in paths
    ]
    (folder / "everything.yaml").write_text(EVERYTHING, encoding="utf-8")
    return [*texts, EVERYTHING, EVERYTHING, dump_recipe(load_recipe(folder / "everything.yaml"))]


def case(seeds: list[str], rng: Damage, folder: Path) -> str:
    """A recipe that is accepted is the same after a dump, and so is its dump."""
    path = folder / f"{rng.choice(('mine', 'mine', 'no', '012', '1_0', 'null', '1e-5', '2024-01-01'))}.yaml"
    overrides: list[str] = []
    if not rng.none and rng.random() < 0.25:
        value = rng.choice(YAML_TEXTS) if rng.random() < 0.5 else str(rng.choice(HOSTILE))
        overrides = [f"{rng.choice(KEYS)}={value}"]
        path = find_recipe(rng.choice(list_recipes()))
    else:
        path.write_bytes(mutant(rng.choice(seeds), rng))
    recipe = load_recipe(path, overrides)
    again = folder / "again.yaml"
    text = dump_recipe(recipe)
    again.write_text(text, encoding="utf-8")
    back = load_recipe(again)
    assert back == recipe, "reads back as another recipe"
    assert dump_recipe(back) == text, "dumps otherwise when read back"
    assert parse_yaml(text, "") == yaml.safe_load(text), "our reader and that of other programs differ"
    return recipe.name


def mutant(text: str, rng: Damage) -> bytes:
    """A recipe with other values in it, other words in its text, or other bytes."""
    way = rng.random()
    if way < 0.45:
        tree = damaged_tree(yaml.safe_load(text), rng)
        return as_yaml(tree).encode("utf-8", "surrogatepass")
    if way < 0.9:
        return damaged_text(text, rng, YAML_TEXTS).encode("utf-8", "surrogatepass")
    return damaged(text.encode(), rng)
