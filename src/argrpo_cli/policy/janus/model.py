"""Janus-Pro (arXiv:2501.17811) as transformers has it, with the passes that drawing and training take.

A prompt, ending in a token that begins an image, goes through the text embeddings; image tokens go through embeddings
and an MLP of their own (`generation_embeddings`, `generation_aligner`); a Llama reads both; `generation_head`, two
layers with a GELU between, makes logits over the codes. Because of the GELU guidance is on logits, not on states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, JanusConfig, JanusForConditionalGeneration, LlamaModel

from argrpo_cli.policy.llamagen.model import caption_attention_mask
from argrpo_cli.policy.protocol import Compare, Scored
from argrpo_cli.policy.tokens import guide, log_probs, score_states
from argrpo_cli.shapes import Sampling

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Encoded:
    """Prompts as token ids, left padded to one length.

    Attributes:
        ids: int64 [B, P], begin of sentence to begin of image.
        null: int64 [B, P], the same with padding for all between.
        mask: int64 [B, P], 1 on the prompt, null or not, and 0 on the padding before it.
    """

    ids: Tensor
    null: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> Encoded:
        return Encoded(self.ids[rows], self.null[rows], self.mask[rows])

    def halves(self, guided: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask of the prompts, followed by those of the null prompts if guided."""
        if not guided:
            return self.ids, self.mask
        return torch.cat([self.ids, self.null]), self.mask.repeat(2, 1)


def positions(mask: Tensor, length: int) -> Tensor:
    """Of left padded prompts with this mask [B, P] and what follows them, int64 [B, length]; padding has 0."""
    return (F.pad(mask, (0, length - mask.shape[1]), value=1).cumsum(1) - 1).clamp(min=0)


class JanusForImageGeneration(JanusForConditionalGeneration):
    """The published network; a folder of it opens as JanusForConditionalGeneration, too.

    Calling it scores images' tokens; `sample.sample_tokens` draws them.
    """

    _keep_in_fp32_modules_strict = {"vqmodel"}  # noqa: RUF012 (transformers' own convention); see `vq.py`

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        config.auto_map = {}  # TRL reads it of any custom model

    @property
    def length(self) -> int:
        """T, tokens of an image."""
        return self.config.vision_config.num_image_tokens

    @property
    def codes(self) -> int:
        """V, that a token chooses from."""
        return self.config.vq_config.num_embeddings

    def run(self, x: Tensor, mask: Tensor, places: Tensor, cache: Cache | None = None) -> Tensor:
        """The transformer on embeddings x [B, S, D]: states [B, S, D].

        Args:
            mask: bool [B, 1, S, keys], what may be attended to; the keys are those of the cache, and x's.
            places: int64 [B, S], positions.
        """
        more: dict[str, Any] = {CACHE: cache, "use_cache": cache is not None}
        return self.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=places, **more
        ).last_hidden_state

    def states(self, encoded: Encoded, tokens: Tensor, guidance: float = 1.0) -> Tensor:
        """Teacher-forced pass along images, or along their beginnings.

        Args:
            tokens: int64 [B, t], t <= T; the last one is predicted and not read.
            guidance: above 1 there are states after the null prompts, too.

        Returns:
            [B, t, 1 or 2, D], what each of the tokens is predicted from.
        """
        batch, length = tokens.shape
        if len(encoded) != batch or length > self.length:
            raise ValueError(
                f"tokens are {list(tokens.shape)}, for {len(encoded)} conditions and images of {self.length}"
            )
        ids, mask = encoded.halves(guidance > 1)
        prompts = self.get_input_embeddings()(ids)
        # Under autocast the MLP gives bfloat16; what the layers add to stays as wide as the embeddings are.
        read = self.prepare_embeddings_for_image_generation(tokens[:, :-1]).to(prompts.dtype)
        x = torch.cat([prompts, read.repeat(len(ids) // batch, 1, 1)], dim=1)
        hidden = self.run(x, caption_attention_mask(mask, x.shape[1]), positions(mask, x.shape[1]))
        return torch.stack(hidden[:, -length:].split(batch), dim=2)

    def guided_logits(self, states: Tensor, guidance: float) -> Tensor:
        """Logits float32 [..., V] of states [..., 1 or 2, D]: l_u + s (l_c - l_u) where there are two."""
        logits = self.model.generation_head(states).float()
        return guide(*logits.unbind(-2), guidance) if logits.shape[-2] > 1 else logits[..., 0, :]

    def forward(
        self,
        encoded: Encoded,
        tokens: Tensor,
        sampling: Sampling | None = None,
        entropy: bool = False,
        compare: Compare | None = None,
    ) -> Scored:
        """Log-probabilities of images' tokens int64 [B, T] by one teacher-forced pass; see `protocol.Policy.model`.

        Without `sampling` this is the conditional distribution.
        """
        sampling = sampling or Sampling(cfg_scale=1.0)
        states = self.states(encoded, tokens, sampling.cfg_scale).flatten(0, 1)
        distribution = partial(self._log_probs, sampling=sampling)
        return score_states(states, tokens, self.codes * states.shape[1], distribution, entropy, compare)

    def _log_probs(self, states: Tensor, sampling: Sampling) -> Tensor:
        """Float32 [N, V] of states [N, 1 or 2, D]."""
        return log_probs(self.guided_logits(states, sampling.cfg_scale), sampling.temperature)

    def distribution(self, encoded: Encoded, tokens: Tensor, sampling: Sampling) -> Callable[[slice], Tensor]:
        """See `protocol.Policy.model`: what is held are states."""
        states = self.states(encoded, tokens, sampling.cfg_scale).flatten(0, 1)
        return lambda at: self._log_probs(states[at], sampling)

    def logits(self, encoded: Encoded, tokens: Tensor, guidance: float = 1.0) -> Tensor:
        """Logits float32 [B, t, V] that each of the tokens [B, t] is drawn by, whole."""
        return self.guided_logits(self.states(encoded, tokens, guidance), guidance)


# TRL loads the reference of the KL term by this class, since transformers knows no architecture of our name.
AutoModelForCausalLM.register(JanusConfig, JanusForImageGeneration, exist_ok=True)
