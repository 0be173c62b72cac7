"""The section of a recipe for GRPO: the objective, what is drawn for it, and what moves with it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from argrpo_cli.recipe.sections import Count, NonNegative, OptimSection, Positive, Probability, Section

# What the controllers of the entropy bonus were published with: LOO-FID's code, ReasonGen-R1's of image tokens.
ENTROPY_PRESETS = {
    "loo_fid": {"entropy_weight": 2.2e-3, "entropy_weight_max": 4e-3},
    "reasongen": {"entropy_step": 5e-5, "entropy_weight_max": 5e-3},
}


class TokenSection(Section):
    """Which tokens of an image its advantage goes to: A_it = w_it A_i, with weights that the rollout fixes.
    docs/methods.md has the equations and where they are from."""

    # gcpo: the first 10% of an image's tokens, the 10% with the largest spatial gradient of entropy and the 10% least
    # similar across the group. stage: less where images of the group with an advantage of the other sign have similar
    # codes, and more of the KL term there. guidance: by the rank of KL(pi(.|c) || pi(.|no condition)), so that 40% of
    # the tokens have 80% of the weight. eg: nothing on the 20% of lowest entropy, whose share is a bonus of the 50% of
    # highest.
    method: Literal["all", "gcpo", "stage", "guidance", "eg"] = "all"
    # c of gcpo's dynamic weight, published 0.5: w_it times the mean of exp(clip(log pi / pi_ref, -c, c)) over tokens up
    # to t; 0 leaves it out.
    confidence: NonNegative = 0.0


class GrpoSection(OptimSection):
    """The optimisation (sections 3.2 and 3.4)."""

    logprob: Literal["conditional", "guided"] = "conditional"  # whose log-probability is trained
    group_size: Annotated[int, Field(ge=2)] = 8  # images per condition whose rewards are compared
    beta: NonNegative = 0.1  # weight of the KL estimator of eq. 6; 0 needs no reference model
    # Where beta goes: after a share x of the updates it is beta_end + (beta - beta_end) f(x), f linear: 1 - x, or
    # cosine: (1 + cos pi x) / 2, the same for all updates of a batch; null: it stays.
    beta_end: NonNegative | None = None
    beta_schedule: Literal["linear", "cosine"] = "linear"
    # d of the KL term's reference: after every reference_every updates it is d reference + (1 - d) policy. 1: it stays
    # the base; between (LOO-FID: 0.999) a running mean of the policy; 0: the policy takes its place every so often.
    reference_decay: Probability = 1.0
    reference_every: Count = 1
    # Clip range of the ratio, below 1. sapo and vespo clip nothing, cispo only above.
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: Positive | None = None  # and above it; null takes the number of epsilon, but for sapo and vespo
    updates_per_batch: Count = 1  # 1 is on-policy
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "grpo"  # as TRL has them
    importance: Literal["token", "sequence"] = "token"  # the ratio of each token, or of the whole image (GSPO)
    tokens: TokenSection = TokenSection()
    # Of a policy that draws scale by scale (VAR): a token in a scale of n_k tokens counts n_k^-a in the loss and in the
    # ratio of a whole image. 0: all tokens alike; 1: all scales alike (per-action normalisation, arXiv 2601.02256).
    scale_balance: Probability = 0.0
    # What advantages r - mean(r of the group) are divided by: the deviation of r in the group, in the batch, or over
    # the updates so far: s^2 = sum_i d^(n - i) v_i / sum_i d^(n - i), v_i the mean square of r - mean(r) in batch i of
    # n, d = 0.9.
    scale_rewards: Literal["group", "batch", "global", "none"] = "group"
    # Of several rewards. First the sum r = sum_k w_k r_k; or first each in its group, z_k = (r_k - mean r_k) / std r_k,
    # and A = (Z - mean Z) / std Z over the batch of Z = sum_k w_k z_k (GDPO), or with scale_rewards: none A = Z (arXiv
    # 2603.23086). There w_k has to weigh deviations: set the factors of the terms to 1.
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    # Dynamic sampling (DAPO): groups whose images all score alike are replaced by groups of further conditions, until
    # n x batch_size images have been drawn for the update; 0 is off.
    dynamic_sampling: NonNegative = 0.0
    # How often a condition is drawn, by how much its images differ: p_c = f w_c / sum w + (1 - f) w_c s_c / sum w s,
    # s_c the running deviation of the total reward in its groups (half the latest, half before), w_c its weight and f
    # this floor; null: by weight alone.
    spread_floor: Probability | None = None
    # Entropy bonus w: the loss less w times the mean entropy H, in nats per token; and what moves w, of which
    # docs/methods.md has the equations. skywork (OR1's, TRL's), once there is a target: up by entropy_step after an
    # update at or below it, down after one above it, after which no bonus is given at all; the first update of a run
    # has none, and metrics.jsonl has the weight for the next one. loo_fid: w e^(3 (0.78 - H / ln V)) outside of a dead
    # band of 0.015, after a warm-up and before a decay. reasongen: w = sinh(psi), psi by Adam on w (H - target); w may
    # be negative.
    entropy_controller: Literal["skywork", "loo_fid", "reasongen"] = "skywork"
    entropy_weight: NonNegative = 0.0  # at the beginning; of loo_fid its base, where nothing is said 2.2e-3
    # Nats per token. null, of skywork: the weight stays as it is; of loo_fid 0.78 ln V, of reasongen 0.72 ln V (7 nats
    # of 16,384 codes).
    entropy_target: Positive | None = None
    entropy_step: Positive = 0.005  # of reasongen Adam's rate, where nothing is said 5e-5
    entropy_weight_max: Positive = 1.0  # |w| goes no higher; where nothing is said 4e-3 of loo_fid, 5e-3 of reasongen
    condition_dropout: Probability = 0.0  # how often a condition is replaced by the null condition
    allow_filtered_sampling: bool = False  # accept top_k or top_p although the trained distribution has neither

    @property
    def refers(self) -> bool:
        """Whether there is a KL term at any time."""
        return bool(self.beta or self.beta_end)

    def beta_at(self, step: int) -> float:
        """The weight of the KL term in the batch after so many updates; at the last batch it is `beta_end`."""
        if self.beta_end is None:
            return self.beta
        share = min(1.0, step / max(1, self.steps - self.updates_per_batch))
        left = 1 - share if self.beta_schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.beta_end + (self.beta - self.beta_end) * left

    @model_validator(mode="after")
    def _controller_is_as_published(self) -> GrpoSection:
        """What is not said of it; from here on it is in the recipe."""
        for key, value in ENTROPY_PRESETS.get(self.entropy_controller, {}).items():
            if key not in self.model_fields_set:
                setattr(self, key, value)
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> GrpoSection:
        if self.reference_decay < 1 and not self.refers:
            raise ValueError(
                f"reference_decay {self.reference_decay:g} moves the reference of a KL term, and beta is 0; set beta "
                "too, or leave it out"
            )
        if self.reference_every > 1 and self.reference_decay == 1:
            raise ValueError(
                f"reference_every {self.reference_every} has no part in reference_decay 1, with which the reference "
                "stays; set reference_decay: 0 to put the policy in its place"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups_and_batches(self) -> GrpoSection:
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}; "
                f"use for instance {max(1, round(self.batch_size / self.group_size)) * self.group_size}"
            )
        if self.steps % self.updates_per_batch:
            raise ValueError(
                f"steps {self.steps} would end in the middle of a batch of updates_per_batch {self.updates_per_batch}; "
                f"use {-(-self.steps // self.updates_per_batch) * self.updates_per_batch}"
            )
        return self

    @model_validator(mode="after")
    def _selection_fits(self) -> GrpoSection:
        if 0 < self.dynamic_sampling <= 1:
            raise ValueError(
                f"dynamic_sampling {self.dynamic_sampling:g} leaves no image for other groups; use more than 1, or 0"
            )
        if self.aggregation == "normalize_then_sum" and self.scale_rewards not in ("group", "none"):
            raise ValueError(
                f"scale_rewards {self.scale_rewards} has no part in aggregation: normalize_then_sum; leave it out, or "
                "set none to leave the sum of normalised rewards as it is"
            )
        return self

    @model_validator(mode="after")
    def _tokens_fit(self) -> GrpoSection:
        tokens = self.tokens
        if tokens.method != "all" and self.importance == "sequence":
            raise ValueError(
                f"tokens.method {tokens.method} weighs tokens, and importance: sequence has one ratio for all of an "
                "image; set importance: token"
            )
        if tokens.confidence and (tokens.method != "gcpo" or not self.beta or self.beta_end == 0):
            raise ValueError(
                f"tokens.confidence {tokens.confidence:g} is of tokens.method: gcpo, and compares with the reference, "
                "which is there as long as beta is above 0; set both, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _loss_and_ratio_fit(self) -> GrpoSection:
        if self.loss == "luspo" and self.importance != "sequence":
            raise ValueError("loss luspo is one of whole sequences; set importance: sequence")
        if self.loss in ("sapo", "vespo") and self.epsilon_high is not None:
            raise ValueError(f"epsilon_high has no part in loss {self.loss}, which clips nothing; leave it out")
        if self.loss == "vespo" and self.importance != "token":
            raise ValueError("loss vespo has a sequence weight of its own; set importance: token")
        if self.epsilon_high is None and self.loss not in ("sapo", "vespo"):
            self.epsilon_high = self.epsilon
        return self
