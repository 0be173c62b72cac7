"""Janus-Pro as it is published: repositories of the hub in transformers' format, and folders of that format.

The first format of the authors (`deepseek-ai/Janus-Pro-1B`, model type multi_modality) is another one, which
transformers' conversion script turns into this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from argrpo_cli.networks.weights import outline
from argrpo_cli.policy.folder import janus_sampling, part_of, read_card
from argrpo_cli.policy.janus.model import Encoded, JanusForImageGeneration
from argrpo_cli.policy.janus.policy import Janus
from argrpo_cli.policy.janus.vq import vq_config
from argrpo_cli.policy.llamagen.config import VQConfig
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.outline import Outline
from argrpo_cli.policy.published import published_entry
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile, fetch_folder, read_json

FILES = ("*.json", "*.jinja", "*.safetensors")
FIRST_FORMAT = "multi_modality"
PROMPT = 64  # tokens of a prompt in the plan of a run; most are shorter
BYTES = 2  # of a number in the published files, bfloat16
# The published geometries (config.json of deepseek-ai/Janus-Pro-1B and -7B), as far as they are not the library's.
TEXT = {
    "janus-pro-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "janus-pro-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
    },
}


def open_published(
    name_or_path: str | Path, device: str = "cpu", dtype: str = "float32", text_device: str = ""
) -> Janus:
    """A published Janus-Pro: a name, fetched into Hugging Face's cache, or a folder of transformers' format.

    Raises:
        UserError: not there, not fetched, or files of something else.
    """
    entry = published_entry(name_or_path)
    folder = Path(name_or_path) if entry is None else fetch_folder(entry.repo, FILES, entry.revision)
    size = _read_config(folder).vision_config.image_size
    card = {"image_size": size, "base": str(name_or_path), "sampling": janus_sampling(folder)}
    policy = Janus.open(folder, card, device, dtype)
    # What training needs as a folder (the reference of the KL term) is one that opens as our model.
    policy.model.config._name_or_path = policy._config._name_or_path = ""
    policy.name = str(name_or_path)
    return policy


def _read_config(folder: Path) -> JanusConfig:
    if read_json(folder / "config.json").get("model_type") == FIRST_FORMAT:
        raise UserError(
            f"{folder} holds a Janus in its authors' first format; convert it with transformers' "
            f"convert_janus_weights_to_hf.py --local_dir {folder} --output_dir OUT, and give OUT"
        )
    return outline(JanusForImageGeneration, folder).config


@dataclass(frozen=True)
class JanusOutline(Outline):
    """The words of its prompts are not here."""

    @property
    def reads(self) -> bool:
        return False

    @property
    def layers(self) -> int:
        return self.policy.model.config.text_config.num_hidden_layers

    @property
    def tokenizer_bytes(self) -> int:
        """None of its own where it is the model's."""
        return super().tokenizer_bytes if self.policy.tokenizer_name else 0

    def blank(self, images: int) -> tuple[Encoded, Tensor]:
        ids = torch.zeros(images, PROMPT, dtype=torch.long)
        tokens = torch.zeros(images, self.policy.card.tokens, dtype=torch.long)
        return Encoded(ids, ids, torch.ones_like(ids)), tokens

    def drawing_bytes(self, images: int, *, guided: bool, recorded: bool, number: int) -> int:
        config = self.policy.model.config.text_config
        rows, length = 2 * images if guided else images, PROMPT + self.policy.card.tokens
        return 2 * config.num_hidden_layers * rows * config.num_key_value_heads * config.head_dim * length * number


def outline_published(name_or_path: str | Path) -> JanusOutline:
    """What `open_published` would open, without its weights; nothing is fetched.

    Raises:
        UserError: config.json is none of a Janus.
    """
    entry = published_entry(name_or_path)
    if entry is None:
        return _outline(_read_config(Path(name_or_path)), str(name_or_path))
    config = published_config(str(name_or_path).partition("@")[0])
    outline = _outline(config, str(name_or_path))
    # The larger one lies in parts, whose list stands for them.
    several = ".index.json" if config.text_config.hidden_size > 2048 else ""
    size = BYTES * sum(one.numel() for one in outline.policy.model.state_dict().values())
    return JanusOutline(outline.policy, 0, (HubFile(entry.repo, f"model.safetensors{several}", size),))


def outline_folder(folder: Path) -> JanusOutline:
    """The same of a policy folder: its config.json and policy.json are read."""
    card = read_card(folder)
    name = card.get("tokenizer")
    vq = None if name is None else outline(VQModel, part_of(folder, "image tokenizer", name)).config
    config = _read_config(folder)
    return _outline(config, str(folder), name, vq)


def published_config(name: str) -> JanusConfig:
    """The geometry of a published name."""
    text = LlamaConfig(vocab_size=102400, max_position_embeddings=16384, **TEXT[name])
    width = text.hidden_size
    return JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(projection_dim=width),
        vq_config=JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width),
    )


def _outline(config: JanusConfig, base: str, name: str | None = None, vq: VQConfig | None = None) -> JanusOutline:
    with torch.device("meta"):
        model = JanusForImageGeneration(config)
        tokenizer = VQModel(vq_config(config.vq_config) if vq is None else vq)
    policy = Janus(model, None, tokenizer, name, config.vision_config.image_size, base)
    return JanusOutline(policy, 0, ())
