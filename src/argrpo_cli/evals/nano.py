"""`argrpo eval nano`: how good are a policy's samples in the nano world, alone or against a baseline with paired seeds.

A policy of captions is asked for "a photo of a dog" where one of classes is asked for the class dog.

Every measure is a list of values over units that two policies share (samples, classes, or groups of
samples), so each has a mean and a standard error, and for two policies a paired difference with its own:

    match         dB of the best rendering of the class, per object pixel (`nano/matching.py`); the judge's first word
    match_at_size match less what real scenes of that class and size reach: larger objects match better by themselves
    size          side of that rendering in pixels
    mirrored      share of samples that this rendering mirrors
    recognised    share of samples whose class the judge's classifier names
    inception_score, fid, sfid
                  of all samples together, on the judge's features against its reference scenes (`nano_sets.py`)
    precision     share of samples inside the reference scenes' manifold, k = 3 (as ADM, on the judge's features)
    recall        share of reference scenes inside the samples' manifold
    diversity     mean feature distance between two samples of one class
    entropy       nats per token of the policy over its own samples, conditional and as guided
    the rewards   raw, and their total as the recipe weights it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argrpo_cli import __version__
from argrpo_cli.evals.nano_sets import Values, class_groups, manifold_values, real_set_values, set_values
from argrpo_cli.nano import scenes
from argrpo_cli.nano.judge import FITTED, Judge, diversity, load_judge
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.policy.llamagen.entropy import token_entropy
from argrpo_cli.policy.llamagen.vq import VQModel, from_uint8, to_uint8
from argrpo_cli.rewards import RewardSet, check_reward, load_rewards
from argrpo_cli.rewards.shaping import reward_weights
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.devices import resolve_device
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.progress import progress

FIRST_SEED = 1_000_000  # away from the seeds that training, its grids and users' first samples take
SEED_STRIDE = 100_000
SEED_LIMIT = 50_000_000  # from here on nano-critic's training samples
UNSEEN_SCENES = 480
MATCH, MATCH_AT_SIZE, SIZE, MIRRORED = "match", "match_at_size", "size", "mirrored"
RECOGNISED, DIVERSITY = "recognised", "diversity"
ENTROPY, GUIDED_ENTROPY, TOTAL = "entropy", "entropy_guided", "total_reward"


@dataclass(frozen=True)
class Sampling:
    """What is drawn: n samples, classes in turn, each with noise of its own."""

    n: int = 2016
    cfg_scale: float = 2.0
    temperature: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for too few samples or a seed that reaches training's."""
        classes = len(scenes.CLASS_NAMES)
        if self.n < 2 * classes:
            raise UserError(f"{self.n} samples are too few: give at least {2 * classes}, two for each class")
        if self.n > SEED_STRIDE:
            raise UserError(f"{self.n} samples are too many: give at most {SEED_STRIDE}")
        if self.seed < 0 or FIRST_SEED + self.seed * SEED_STRIDE + self.n >= SEED_LIMIT:
            most = (SEED_LIMIT - FIRST_SEED - self.n - 1) // SEED_STRIDE
            raise UserError(f"seed {self.seed} is out of range: with {self.n} samples, give 0 to {most}")

    @property
    def class_ids(self) -> Tensor:
        """int64 [n]."""
        return torch.arange(self.n) % len(scenes.CLASS_NAMES)

    @property
    def image_seeds(self) -> list[int]:
        """The seed of each sample, the same for every policy."""
        return [FIRST_SEED + self.seed * SEED_STRIDE + i for i in range(self.n)]


@dataclass(frozen=True)
class Bench:
    """What every policy of a comparison is measured with.

    Attributes:
        weights: name of a reward to its weight in the total.
        device: of the rewards, which are loaded when they are first asked.
    """

    judge: Judge
    weights: dict[str, float]
    batch_size: int = 64
    device: str = "cpu"

    @cached_property
    def rewards(self) -> RewardSet:
        return load_rewards(list(self.weights), self.device)

    def policy_values(self, policy: Policy, sampling: Sampling, name: str) -> Values:
        """Every measure of a policy's samples; `name` is for the progress bar."""
        ids = sampling.class_ids.tolist()
        captions = [class_prompt(scenes.CLASS_NAMES[i]) for i in ids]
        conditions = policy.conditions(ids if policy.text_encoder is None else captions)
        seeds, scale, temperature = sampling.image_seeds, sampling.cfg_scale, sampling.temperature
        tokens, entropy, guided = [], [], []
        with progress(f"sampling {name}", sampling.n) as advance:
            for start in range(0, sampling.n, self.batch_size):
                part = slice(start, start + self.batch_size)
                asked = conditions[part]
                drawn = policy.sample(
                    asked, cfg_scale=scale, temperature=temperature, seeds=seeds[part], batch_size=self.batch_size
                )
                tokens.append(drawn)
                entropy.append(token_entropy(policy, drawn, asked, None, temperature).mean(1))
                guided.append(token_entropy(policy, drawn, asked, scale, temperature).mean(1))
                advance(len(drawn))
        values = self.picture_values(policy.decode(torch.cat(tokens)), sampling.class_ids)
        return values | {ENTROPY: torch.cat(entropy), GUIDED_ENTROPY: torch.cat(guided)}

    def picture_values(self, images: Tensor, class_ids: Tensor | None) -> Values:
        """Every measure of uint8 images [B, 3, 64, 64]; without their classes, int64 [B], what needs none."""
        features = self.judge.recogniser.features(images.cpu())
        groups = class_groups(len(images), class_ids)
        values = set_values(images, features, self.judge, groups) | manifold_values(features, self.judge, groups)
        if class_ids is None:
            return values
        values |= self._class_values(images, features, class_ids)
        several = (class_ids.bincount() > 1)[class_ids]  # a class needs two pictures to differ
        return values | ({DIVERSITY: diversity(features[several], class_ids[several])} if several.any() else {})

    def real_values(self, with_classes: bool = True) -> Values:
        """What real scenes score, as if they were samples."""
        judge, chosen = self.judge, unseen_scenes()
        values = real_set_values(judge, chosen)
        if not with_classes:
            return values
        images, features, class_ids = judge.reference_images, judge.reference_features, judge.reference_classes
        return self._class_values(images[chosen], features[chosen], class_ids[chosen]) | values

    def _class_values(self, images: Tensor, features: Tensor, class_ids: Tensor) -> Values:
        """What can be said of each picture whose class is known."""
        conditions = [Condition(class_prompt(scenes.CLASS_NAMES[i]), i) for i in class_ids.tolist()]
        raw = {name: scores.cpu() for name, scores in self.rewards.score(images, conditions, self.batch_size).items()}
        recognised = self.judge.recogniser.classes(features)
        found = self.judge.match(images, class_ids)
        return {
            MATCH: found.db,
            MATCH_AT_SIZE: found.db - self.judge.expected_db(class_ids, found.size),
            SIZE: found.size.float(),
            MIRRORED: found.mirror.float(),
            RECOGNISED: (recognised == class_ids).float(),
            **raw,
            TOTAL: sum(scores * self.weights[name] for name, scores in raw.items()),
        }


def open_bench(weights: dict[str, float] | None = None, batch_size: int = 64, device: str = "cpu") -> Bench:
    """The bundled judge and rewards; the weights are those of the recipe nano/c2i unless given."""
    weights = weights or recipe_weights()
    return Bench(load_judge(), weights, batch_size, device)


def evaluate(
    policies: Sequence[str],
    sampling: Sampling = Sampling(),
    batch_size: int = 64,
    device: str = "auto",
    weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Measure one policy, or two with the same classes and seeds.

    Args:
        policies: names or paths for `load_policy`; with two, the second is the baseline.
        weights: name of a reward to its weight in the total; default: those of the recipe nano/c2i.

    Returns:
        A dictionary of plain numbers, ready for JSON: `policies` {name: {measure: {mean, error}}}, `difference`
        {measure: {mean, error}} (first minus second; for two), `real` (what real scenes score), `within_class_std`
        {reward: number} of each reward and the total, of the last policy (the baseline), `tokenizer`, `settings`,
        `weights` {name: hash} and `versions`.

    Raises:
        UserError: no such policy, a policy of another world, too few samples, a seed that reaches training's.
    """
    names = _distinct(policies)
    sampling.check()
    device = resolve_device(device)
    loaded = {name: open_nano_policy(path, device) for name, path in zip(names, policies, strict=True)}
    bench = open_bench(weights, batch_size, device)
    measured = {name: bench.policy_values(policy, sampling, name) for name, policy in loaded.items()}
    last = measured[names[-1]]
    result: dict[str, Any] = {
        "policies": {name: summary(values) for name, values in measured.items()},
        "real": summary(bench.real_values()),
        "within_class_std": {key: within_class_std(last[key], sampling.class_ids) for key in [*bench.weights, TOTAL]},
        "reward_weights": bench.weights,
        "tokenizer": measure_tokenizer(bench.judge.tokenizer, bench.judge.reference_tokens, sampling.seed),
        "settings": asdict(sampling),
        "weights": {name: policy.fingerprint() for name, policy in loaded.items()},
        "versions": {"argrpo": __version__, "torch": torch.__version__},
    }
    if len(names) == 2:
        first = measured[names[0]]
        result["difference"] = summary({key: first[key] - last[key] for key in first})
    return result


def open_nano_policy(path: str, device: str = "cpu") -> Policy:
    """A policy that draws the nano world's objects, by class or by caption.

    Raises:
        UserError: no such policy, or it draws something else.
    """
    policy = load_policy(path, device)
    if policy.text_encoder is None:
        fits = tuple(policy.class_names) == scenes.CLASS_NAMES
    else:
        fits = {word for name in scenes.CLASS_NAMES for word in name.split()} <= set(policy.text_encoder.words or ())
    if not fits or policy.image_size != scenes.IMAGE_SIZE:
        raise UserError(f"policy {path} does not draw the nano world's objects, so its judges cannot measure it")
    return policy


def recipe_weights() -> dict[str, float]:
    """The weights that the recipe nano/c2i gives the nano rewards."""
    from argrpo_cli.recipe import load_recipe

    section = load_recipe("nano/c2i", []).rewards
    return reward_weights(section, {term.name: check_reward(term.name).family for term in section.terms})


def _distinct(policies: Sequence[str]) -> list[str]:
    if not 1 <= len(policies) <= 2:
        raise UserError(f"{len(policies)} policies; give one, or one and a baseline")
    names = [str(policy) for policy in policies]
    return names if len(set(names)) == len(names) else [names[0], f"{names[1]} (again)"]


def unseen_scenes() -> slice:
    """The reference scenes that stand for real ones: not those that the judge's expectation is fitted to."""
    return slice(FITTED, FITTED + UNSEEN_SCENES)


def within_class_std(reward: Tensor, class_ids: Tensor) -> float:
    """Standard deviation of a reward among samples of one class, averaged over the classes: what GRPO normalises by
    (equation 3), with groups as large as the sample allows."""
    return torch.stack([reward[class_ids == one].std() for one in class_ids.unique()]).mean().item()


@torch.inference_mode()
def measure_tokenizer(vq: VQModel, reference_tokens: Tensor, seed: int) -> dict[str, Any]:
    """PSNR in dB of reconstructions of fresh scenes (None without the emoji font) and share of the codes in use."""
    used = len(reference_tokens.unique()) / vq.config.codebook_size
    try:
        scenes.find_font()
    except UserError as error:
        return {"psnr": None, "codebook_used": used, "note": str(error)}
    rng = np.random.default_rng(seed + 70_000)
    originals = torch.from_numpy(scenes.class_batch(rng, UNSEEN_SCENES, balanced=True)[0])
    again = torch.cat([to_uint8(vq(from_uint8(chunk))) for chunk in originals.split(96)])
    mse = (again.float() - originals.float()).square().flatten(1).mean(1)
    psnr = 10 * torch.log10(255**2 / mse)
    return {"psnr": psnr.mean().item(), "codebook_used": used, "note": ""}


def summary(values: Values) -> dict[str, dict[str, float]]:
    return {
        key: {"mean": v.mean().item(), "error": (v.std() / len(v) ** 0.5).item() if len(v) > 1 else float("nan")}
        for key, v in values.items()
    }
