"""The policies that others have published, by name: where each lies, and what its file does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

C2I_REPO, T2I_REPO = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
JANUS_OWNER, JANUS_SIZES = "deepseek-community", ("1B", "7B")  # the weights of deepseek-ai in transformers' format
JANUS_CFG_SCALE = 5.0  # of its authors' script
VAR_REPO, VAR_CCA = "FoundationVision/var", "ChenDRAG/CCA_VAR"
VAR_SAMPLING = {"top_k": 900, "top_p": 0.96}  # as published for FID; guidance is then 2.5, the published cfg 1.5
CCA_REPO, CCA_FOLDER = "ChenDRAG/CCA_LlamaGen", "CCA_LlamaGen_Guidance_Free"
TOKENIZERS = {  # name to repository and file
    "vq-ds16-c2i": (C2I_REPO, "vq_ds16_c2i.pt"),
    "vq-ds8-c2i": (C2I_REPO, "vq_ds8_c2i.pt"),
    "vq-ds16-t2i": (T2I_REPO, "vq_ds16_t2i.pt"),
    "vq-var": (VAR_REPO, "vae_ch160v4096z32.pth"),
}


@dataclass(frozen=True)
class PublishedPolicy:
    """Where a policy lies on the hub, and what its file does not say."""

    repo: str
    file: str  # empty where it is the whole repository
    image_size: int
    tokenizer: str  # empty where it is part of the model
    sampling: Mapping[str, Any] = field(default_factory=dict)  # see `own_sampling`
    reads: str = "classes"  # of ImageNet, or "captions"
    family: str = "llamagen"
    revision: str | None = None  # of a whole repository: a commit, branch or tag; None is the newest


POLICIES = {
    **{
        f"c2i-{size.lower()}-{pixels}": PublishedPolicy(C2I_REPO, f"c2i_{size}_{pixels}.pt", pixels, "vq-ds16-c2i")
        for size, pixels in (("B", 256), ("B", 384), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))
    },
    "t2i-xl-256": PublishedPolicy(T2I_REPO, "t2i_XL_stage1_256.pt", 256, "vq-ds16-t2i", reads="captions"),
    "t2i-xl-512": PublishedPolicy(T2I_REPO, "t2i_XL_stage2_512.pt", 512, "vq-ds16-t2i", reads="captions"),
    # As GCPO trained it (arXiv 2509.22485), in the layout of transformers' Llama.
    "t2i-xl-256-gcpo": PublishedPolicy("zghhui/LlamaGen-T2I-GCPO", "", 256, "vq-ds16-t2i", reads="captions"),
    # LlamaGen after an epoch of condition contrastive alignment (arXiv 2410.09347), to be drawn from without guidance.
    **{
        f"c2i-{size.lower()}-384-cca": PublishedPolicy(
            CCA_REPO, f"{CCA_FOLDER}/c2i_{size}_384_CCA_0005000.pt", 384, "vq-ds16-c2i", {"cfg_scale": 1.0}
        )
        for size in ("B", "L", "XL", "XXL", "3B")
    },
    **{
        f"janus-pro-{size.lower()}": PublishedPolicy(
            f"{JANUS_OWNER}/Janus-Pro-{size}",
            "",
            384,
            "",
            {"cfg_scale": JANUS_CFG_SCALE},
            reads="captions",
            family="janus",
        )
        for size in JANUS_SIZES
    },
    **{
        f"var-d{depth}": PublishedPolicy(
            VAR_REPO, f"var_d{depth}.pth", 256, "vq-var", {"cfg_scale": 2.5, **VAR_SAMPLING}, family="var"
        )
        for depth in (16, 20, 24, 30)
    },
    "var-d36-512": PublishedPolicy(
        VAR_REPO, "var_d36.pth", 512, "vq-var", {"cfg_scale": 2.5, **VAR_SAMPLING}, family="var"
    ),
    **{
        f"var-d{depth}-cca": PublishedPolicy(
            VAR_CCA,
            f"CCA_VAR_Guidance_Free/VAR_d{depth}_CCA.pth",
            256,
            "vq-var",
            {"cfg_scale": 1.0, **VAR_SAMPLING},
            family="var",
        )
        for depth in (16, 20, 24, 30)
    },
}


def published_entry(name: str | Path) -> PublishedPolicy | None:
    """What `POLICIES` has under a name; where that is a whole repository `name@revision` is one of its revisions."""
    name, at, revision = str(name).partition("@")
    entry = POLICIES.get(name)
    if not at or entry is None:
        return entry
    return replace(entry, revision=revision) if revision and not entry.file else None


def file_sampling(file: Path) -> dict[str, Any]:
    """How the policy in a published file is meant to be sampled, by the file's name; {} where nothing is said."""
    return next((dict(one.sampling) for one in POLICIES.values() if Path(one.file).name == file.name), {})
