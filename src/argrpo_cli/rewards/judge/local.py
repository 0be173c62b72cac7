"""A judge in this process: any image-text-to-text model of transformers, asked in batches.

Prompts differ in length, so batches are padded on the left: the last position of every row is where its reply begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from argrpo_cli.networks.weights import load_pretrained, quiet_transformers
from argrpo_cli.rewards.judge.questions import FORCED_PREFIX, UnusableReply, check_model
from argrpo_cli.rewards.judge.server import MAX_TOKENS, RESAMPLING, Answer
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import fetch

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]  # no pickles

_LOADED: weakref.WeakValueDictionary[tuple[str, str], LocalJudge] = weakref.WeakValueDictionary()


class LocalJudge:
    """A vision-language model and its processor, which must have a chat template."""

    def __init__(self, model: Any, processor: Any, max_tokens: int = MAX_TOKENS):
        self.model, self.processor, self.max_tokens = model, processor, max_tokens
        self.processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def ask(
        self,
        images: Sequence[Image],
        prompts: Sequence[tuple[str, str]],
        read: Callable[[str], float],
        attempts: int = 3,
    ) -> list[Answer]:
        """Ask about every image and read the replies, in the order of the images.

        Args:
            prompts: the texts before and after each image.
            read: from a reply to its score, or UnusableReply.
            attempts: replies for one image at most; the first is greedy, further ones are sampled with the settings
                of the published server path, since a greedy one would be the same again.
        """
        answers = [Answer(float("nan"))] * len(images)
        unscored = list(range(len(images)))
        for attempt in range(attempts):
            if not unscored:
                break
            replies = self.generate([images[i] for i in unscored], [prompts[i] for i in unscored], sample=attempt)
            for i, reply in zip(unscored, replies, strict=True):
                try:
                    answers[i] = Answer(read(reply))
                except UnusableReply as error:
                    answers[i] = Answer(float("nan"), f"{error} (attempt {attempt + 1} of {attempts})")
            unscored = [i for i in unscored if answers[i].reason]
        return answers

    @torch.inference_mode()
    def generate(self, images: Sequence[Image], prompts: Sequence[tuple[str, str]], sample: int = 0) -> list[str]:
        """One reply for each image: greedy where `sample` is 0, else drawn with `sample` as the seed."""
        inputs = self._inputs(images, [self._chat(prompt) for prompt in prompts])
        # Whatever the model's own generation settings are, such as Qwen's repetition penalty and near-0 temperature.
        settings = {"do_sample": bool(sample), **(RESAMPLING if sample else dict.fromkeys(RESAMPLING))}
        device, tokenizer = self.model.device, self.processor.tokenizer
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(sample)
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, pad_token_id=padding, **settings)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    @torch.inference_mode()
    def probability_of_one(self, images: Sequence[Image], prompts: Sequence[tuple[str, str]]) -> Tensor:
        """P("1") against P("0") as the digit of the reply, in one forward pass: float32 [B] in [0, 1]."""
        texts = [self._chat(prompt) + FORCED_PREFIX for prompt in prompts]
        inputs = self._inputs(images, [text + "0" for text in texts])
        zero = inputs["input_ids"][:, -1]
        with_one = self._inputs(images[:1], [texts[0] + "1"])["input_ids"][0]
        one = with_one[-1]
        first = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
        if not (zero == zero[0]).all() or one == zero[0] or first[:-1].tolist() != with_one[:-1].tolist():
            raise UserError(
                "judge: reading 'logit' needs a model in whose tokenizer the digits 0 and 1 are tokens of their own; "
                "use the reading 'generate'"
            )
        length = inputs["input_ids"].shape[1]
        inputs = {
            name: value[:, :-1] if value.ndim == 2 and value.shape == (len(images), length) else value
            for name, value in inputs.items()
        }
        logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return (logits[:, one] - logits[:, zero[0]]).sigmoid()

    @torch.inference_mode()
    def next_token(self, images: Sequence[Image], prompts: Sequence[tuple[str, str]]) -> Tensor:
        """The probability of each token as the first of the reply, in one forward pass: float32 [B, V]."""
        inputs = self._inputs(images, [self._chat(prompt) for prompt in prompts])
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().softmax(-1)

    def _chat(self, prompt: tuple[str, str]) -> str:
        before, after = prompt
        content: list[dict[str, str]] = [{"type": "text", "text": before}] if before else []
        content += [{"type": "image"}, {"type": "text", "text": after}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _inputs(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.processor(
            images=[[image] for image in images], text=list(texts), padding=True, return_tensors="pt"
        )
        return dict(inputs.to(self.model.device, self.model.dtype))  # numbers that are whole stay so


def load_local(name: str, device: str) -> LocalJudge:
    """The model of this hub name or folder, in bfloat16 on a GPU and float32 on a CPU; judges share what is loaded.

    Raises:
        UserError: there is no such model, it cannot be fetched, is of a kind that is not known, or not complete.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    key = (name, str(torch.device(device)))
    if (loaded := _LOADED.get(key)) is not None:
        return loaded
    folder = model_folder(name)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = load_pretrained(AutoModelForImageTextToText, folder, dtype, use_safetensors=True)
    except Exception as error:  # of a damaged folder the library makes nearly anything
        raise UserError(
            f"judge: cannot load the model {name!r}: {first_line(error)}; give the hub name or the folder of an "
            "image-text-to-text model of transformers"
        ) from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "tokenizer"):
        raise UserError(f"judge: the model {name!r} has no chat template; give one that is trained to chat")
    _LOADED[key] = judge = LocalJudge(model.to(device).eval().requires_grad_(False), processor)
    return judge


def model_folder(name: str) -> Path:
    """A model's folder: `name` itself, or that of the hub's cache, to which the model is fetched first."""
    from huggingface_hub import snapshot_download

    check_model(name)
    if Path(name).is_dir():
        return Path(name)
    fetch(name, "config.json")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"judge: cannot fetch the model {name!r}: {first_line(error)}") from error
