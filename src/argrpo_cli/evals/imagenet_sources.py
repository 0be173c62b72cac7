"""What `argrpo eval imagenet` measures: a policy whose images are drawn when they are needed, or finished pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from argrpo_cli.evals.feature_store import Span
from argrpo_cli.evals.fidelity import NEIGHBOURS
from argrpo_cli.evals.folders import policy_folders
from argrpo_cli.evals.imagenet_warnings import IMAGES, SAMPLING
from argrpo_cli.images import ImageSet, open_images
from argrpo_cli.images import recorded_sampling as recorded_in
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.sample import LARGEST, NPZ, file_name
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png

EVAL_SIZE = 256  # pixels a side, to which larger images of a policy are scaled, as LlamaGen does
FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 2_000_000_000, 100_000, 10_000  # other commands draw others
LEAST = NEIGHBOURS + 2  # images: precision and recall need one less, the jackknife leaves some out
WRITERS = 8  # threads that pack pictures


@dataclass(frozen=True)
class ImagenetSettings:
    """What decides a policy's images: classes in turn, each image with noise of its own."""

    n: int = IMAGES
    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    resize: int | None = None  # pixels a side before Inception; None: 256 for larger images, others as drawn

    def check(self) -> None:
        """Raise UserError for a number out of range."""
        if not LEAST <= self.n <= SEED_STRIDE:
            raise UserError(f"--n {self.n}: give {LEAST} to {SEED_STRIDE} images")
        if not 0 <= self.seed < MOST_SEEDS:
            raise UserError(f"--seed {self.seed}: give 0 to {MOST_SEEDS - 1}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: must be above 0, at most 1")
        if self.resize is not None and not 1 <= self.resize <= LARGEST:
            raise UserError(f"--resize {self.resize}: must be 1 to {LARGEST}")

    def image_seed(self, index: int) -> int:
        return FIRST_SEED + self.seed * SEED_STRIDE + index


@dataclass(frozen=True)
class PolicySource:
    """A policy's images by number, drawn when they are asked for; `pictures` is a folder to keep them in."""

    policy: Policy
    settings: ImagenetSettings
    pictures: Path | None

    @property
    def count(self) -> int:
        return self.settings.n

    @property
    def class_ids(self) -> Tensor:
        """int64 [n]."""
        return torch.arange(self.count) % len(self.policy.class_names)

    @property
    def size(self) -> tuple[int, int]:
        side = self.settings.resize or min(EVAL_SIZE, self.policy.image_size)
        return side, side

    def batches(self, batch_size: int, spans: Sequence[Span]) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W]; pictures that are kept are written before their batch is handed out."""
        classes, asked = self.class_ids.tolist(), asdict(self.settings)
        for first, last in spans:
            for start in range(first, last, batch_size):
                numbers = range(start, min(start + batch_size, last))
                tokens = self.policy.sample(
                    self.policy.conditions([classes[index] for index in numbers]),
                    **{key: asked[key] for key in SAMPLING},
                    seeds=[self.settings.image_seed(index) for index in numbers],
                    batch_size=batch_size,
                )
                images = self.policy.decode(tokens, self.size[0])
                if self.pictures is not None:
                    self._keep(images, numbers, classes)
                yield images

    def _keep(self, images: Tensor, numbers: range, classes: list[int]) -> None:
        def write(index: int) -> None:
            pixels = Image.fromarray(arrays[index - numbers[0]])
            name = self.policy.class_names[classes[index]]
            save_png(self.pictures / file_name(classes[index], name, self.settings.image_seed(index)), pixels)

        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(WRITERS) as writers:
            list(writers.map(write, numbers))


def open_sources(
    policies: Sequence[str],
    images: str | Path | None,
    out: Path,
    settings: ImagenetSettings,
    keep_images: bool,
    device: str,
) -> dict[str, PolicySource | ImageSet]:
    """What is measured, by the name of its folder in `out`.

    Raises:
        UserError: nothing there, a policy of captions, the same policy twice, too few images.
    """
    names = policy_folders(policies if images is None else [Path(images).resolve().stem])
    if images is not None:
        found = open_images(images)
        if found.count < LEAST:
            raise UserError(f"{images} holds {found.count} images; the measures and their errors need {LEAST}")
        return {names[0]: found}
    opened = {}
    for name, path in zip(names, policies, strict=True):
        policy = load_policy(path, device, settings.dtype)
        if policy.text_encoder is not None:
            raise UserError(
                f"{path} draws captions, and ImageNet's measures ask for classes; give one such as c2i-b-256"
            )
        pictures = out / name / "images" if keep_images else None
        opened[name] = PolicySource(policy, settings, pictures)
    return opened


def recorded_sampling(images: ImageSet) -> dict[str, Any] | None:
    """How `argrpo sample` drew a folder, or the .npz in it; None for images of another origin."""
    folder = images.path.parent if images.is_array else images.path
    return None if images.is_array and images.path.name != NPZ else recorded_in(folder)


def keeps_order(source: PolicySource | ImageSet) -> bool:
    """An .npz is measured as it comes, as by ADM's evaluator."""
    return isinstance(source, ImageSet) and source.is_array
