"""Pictures as an image tokenizer sees them: cropped as LlamaGen crops them, encoded once, and the codes kept.

    store = tokenise(images, policy, user_cache() / "codes", team)
    store.column(in_batches(images.items, CHUNK), CODES)  # [N, T]

Every policy of one tokenizer and size uses the same codes, and a changed picture is encoded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from argrpo_cli.images import ImageSet, Item, Read, file_item, read_ahead
from argrpo_cli.kept import Tensors, kept
from argrpo_cli.pictures import read_image
from argrpo_cli.system.errors import BadPicture, UserError
from argrpo_cli.system.processes import Team

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.policy.protocol import Policy

CHUNK = 256  # images that are kept together
ENCODE_PIXELS = 2**20  # encoded at a time, as many as `Policy.decode` decodes
PREPROCESSING = "centre crop, on white"  # part of what tokens are known by: another preprocessing needs another name
CODES = "codes"
Cropped = Callable[[Item, int], Read]


def tokenise(
    images: ImageSet,
    policy: Policy,
    cache: Path,
    team: Team,
    cropped: Cropped | None = None,
) -> Tensors:
    """The tokens of pictures as `codes` [B, T] of each batch of `CHUNK`; those that are not kept yet are encoded.

    Args:
        cropped: see `read_crops`.

    Raises:
        UserError: a picture that cannot be read, or a cache that cannot be written.
    """
    size, tokenizer = policy.card.image_size, policy.tokenizer_fingerprint()
    dtype = torch.int16 if policy.card.codes <= 2**15 else torch.int32
    at_once = max(1, ENCODE_PIXELS // size**2)

    def read(batch: Sequence[Item]) -> Tensor:
        pixels = read_crops(images, batch, size, cropped)
        if cropped is None and any(file_item(images.path, item.file).stamp != item.stamp for item in batch):
            raise UserError(f"pictures in {images.path} changed while they were read; give the command again")
        return pixels

    @torch.inference_mode()
    def encode(batch: Sequence[Item], pixels: Tensor) -> dict[str, Tensor]:
        return {CODES: torch.cat([policy.tokenise(part).cpu() for part in pixels.split(at_once)]).to(dtype)}

    folder = cache / f"{tokenizer}-{size}"
    store = Tensors(folder, [PREPROCESSING, size, tokenizer], lambda item: [item.file, item.stamp])
    label = f"tokenising at {size} px"
    kept(images.items, encode, store, batch_size=CHUNK, label=label, team=team, prepare=read)
    return store


def read_crops(images: ImageSet, items: Sequence[Item], size: int, cropped: Cropped | None = None) -> Tensor:
    """Some pictures of a set, uint8 [B, 3, size, size]; BadPicture for the first that cannot be read.

    Args:
        cropped: gives how a picture is read at so many pixels a side; by default `read_cropped` of a file of the set.
    """
    cropped = cropped or (lambda item, size: partial(read_cropped, images.path / item.file, size))
    pixels = list(read_ahead([replace(item, read=cropped(item, size)) for item in items]))
    if bad := next((one for one in pixels if isinstance(one, BadPicture)), None):
        raise bad
    return torch.from_numpy(np.stack(pixels))


def read_cropped(
    path: Path, size: int, most: int | None = None, read: Callable[..., np.ndarray | None] = read_image
) -> np.ndarray | None:
    """A picture as LlamaGen's tokenizer was evaluated on it, uint8 [3, size, size].

    RGB as everywhere, then `centre_crop`. LlamaGen's `extract_codes_c2i.py` and `val_ddp.py` read through torchvision's
    ImageFolder: a turn noted in EXIF is not made, so that the few pictures that have one stay as trained on. Its
    policies are trained on ten crops of a picture 1.1 times as large; a validation set has one: the middle.

    Args:
        most: see `read_image`.
        read: reads the picture in its place.

    Raises:
        BadPicture: it cannot be read.
    """
    from PIL import Image

    pixels = read(path, most, upright=False)
    if pixels is None:
        return None
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.ascontiguousarray(np.asarray(centre_crop(image, size)).transpose(2, 0, 1))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB picture, scaled to `size` pixels: ADM's `center_crop_arr`, as LlamaGen uses it.

    Halved with a box filter while the shorter side is at least twice `size`, then bicubic to a shorter side of `size`,
    then cropped; of an odd rest the pixel more is cut off right and below.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
