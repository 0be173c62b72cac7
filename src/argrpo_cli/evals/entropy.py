"""Policy entropy: how undecided a policy is about the next image token (section 4.3 and figures 3 and 4 of the paper).

Teacher-forced: the tokens before come from real pictures, held-out scenes of the nano world, or samples of the policy
itself. Kept is the mean over the tokens of each image, and sums at each position: 50,000 images of 576 tokens are a
megabyte. Whatever was measured of a policy is kept, so that an interrupted measuring goes on and a policy that was
measured before costs nothing. So are the tokens of pictures, in the user's cache: every policy of one tokenizer and
size uses the same, and a changed picture is encoded anew.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from argrpo_cli import __version__, seeds
from argrpo_cli.captions import read_captions
from argrpo_cli.draw import draw_batch, score_tokens
from argrpo_cli.evals.imagenet_folder import conditions_of, open_labelled, some_of
from argrpo_cli.images import ImageSet, Item, file_item
from argrpo_cli.kept import Tensors, in_batches, kept
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import checkpoint_folders, glance
from argrpo_cli.shapes import Sampling, Shot
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, reason, user_cache
from argrpo_cli.system.processes import Team, resolve_device

if TYPE_CHECKING:
    from PIL import Image

    from argrpo_cli.policy.protocol import Policy

MODES = ("conditional", "guided")
NORMAL_95 = 1.959964  # half-width of a 95 % interval in standard errors
CHUNK = 256  # images that are kept together
ENCODE_PIXELS = 2**20  # encoded at a time, as many as `Policy.decode` decodes
READERS = min(8, os.cpu_count() or 1)  # threads; unpacking a JPEG is slower than encoding it on a GPU
PREPROCESSING = "centre crop"  # part of what tokens are known by: another preprocessing needs another name
CODES = "codes"
Tally = dict[str, Tensor]  # see `tally`


@dataclass(frozen=True)
class Subject:
    """A policy to measure: how to open it, what to call it, and its step when it is a checkpoint of a run."""

    path: str
    name: str
    step: int | None = None


def subjects_of_run(run: Path) -> list[Subject]:
    """The base policy of a run, its checkpoints in order, and the trained policy where the last checkpoint is older.

    Raises:
        UserError: no run directory, one without checkpoints and trained policy, or its base policy is gone.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is no run directory: it has no run.json")
    notes = read_json(run / "run.json")
    base = notes.get("base_policy")
    if not base or not Path(base).is_dir():
        raise UserError(f"the base policy of {run} is gone: {base}; measure its checkpoints with --policy")
    subjects = [Subject(base, "base", 0)]
    checkpoints = checkpoint_folders(run)
    subjects += [Subject(str(folder), f"step {step}", step) for step, folder in checkpoints.items()]
    finished = (notes.get("finished") or {}).get("step")
    if finished is not None and finished not in checkpoints and (run / "policy").is_dir():
        subjects.append(Subject(str(run / "policy"), f"step {finished}", finished))
    if len(subjects) < 2:
        raise UserError(f"{run} has no checkpoints yet; train longer, or lower logging.save_every")
    return subjects


@dataclass(frozen=True)
class Question:
    """What the entropy is measured on.

    Attributes:
        split: "val" for held-out images, teacher-forced; None for samples.
        prompts: a bundled set or a file of captions to sample; only where split is None.
        limit: at most so many scenes or prompts; so many of the pictures of `data`, every class equally often.
        seed: of the samples.
        data: folder of real pictures for the split; None for the nano world's scenes.
    """

    split: str | None = "val"
    prompts: str | None = None
    limit: int | None = None
    seed: int = 0
    data: str | None = None


@dataclass(frozen=True)
class Material:
    """All images of a question for one policy.

    Attributes:
        shots: the images, each with what decides its tokens in `file` and `seed`.
        tokens: gives those of a batch of `batch_size` in a row, int64 [B, T].
        batch_size: how many are kept together.
        shown: what they show, equal for two policies that are measured on the same images.
        identity: what decides the tokens beside that.
        about: where the images are from, for the results.
    """

    shots: list[Shot]
    tokens: Callable[[Sequence[Shot]], Tensor]
    batch_size: int
    shown: Sequence[Any]
    identity: list[Any]
    about: dict[str, Any] = field(default_factory=dict)


def measure(
    subjects: Sequence[Subject],
    question: Question,
    sampling: Sampling = Sampling(),
    batch_size: int = 64,
    team: Team | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """One row per policy and mode (conditional, guided), ready for JSON.

    Each row has `mean`, `standard_error` (over images; the tokens of one image are not independent), `low` and `high`
    (95 % interval), `by_position` and `by_position_error` (T numbers each, position 0 first). From the second policy on
    it has `change` and `change_error`, paired by picture, scene, or prompt and seed, against the policy in `against`:
    the first of the same `family` (parameters, pixels and kind of condition), or the first of all where it is new.

    Args:
        sampling: guidance of the guided mode, temperature, and how samples are drawn.
        team: the processes that share the work, with their devices; by default this one, on a GPU if there is one.
        folder: for what is measured; needed by a team of several.
        cache: folder for the tokens of pictures; by default the user's.

    Raises:
        UserError: no such policy, split, folder or prompt set; a policy that the images do not fit.
    """
    if sampling.temperature <= 0:
        raise UserError(f"--temperature {sampling.temperature:g}: without noise there is no entropy; give more than 0")
    team = team or Team(0, 1, resolve_device("auto"))
    team.together(lambda: [glance(one.path) for one in subjects])  # before the others are measured
    pictures = team.together(lambda: open_pictures(question))
    rows: list[dict[str, Any]] = []
    per_image: dict[tuple[str, str], Tensor] = {}  # by policy and mode
    families: dict[str, str] = {}  # to its first policy
    shown: Sequence[Any] = ()  # to the first policy
    with _own_or_temporary(folder, team) as own:
        for subject in subjects:
            policy = team.together(lambda subject=subject: load_policy(subject.path, team.device, sampling.dtype))
            material = gather(policy, subject.path, question, pictures, sampling, batch_size, cache, team)
            shown = shown or material.shown
            if material.shown != shown:
                raise UserError(
                    f"{subjects[0].path} and {subject.path} are measured on different scenes; measure them alone"
                )
            weights = policy.fingerprint()
            whole = _entropies(policy, subject.name, weights, material, sampling, batch_size, team, own)
            about = _about(policy, weights)
            against = families.setdefault(about["family"], subject.name)
            against = subjects[0].name if against == subject.name else against
            for index, mode in enumerate(MODES):
                row = {"policy": subject.name, "path": subject.path, "step": subject.step, "mode": mode}
                row |= {"split": question.split, "prompts": None, "asked": question.prompts, "data": question.data}
                row |= {**asdict(sampling), **statistics(whole, index)}
                means = per_image[subject.name, mode] = whole["per_image"][index]
                if subject != subjects[0]:
                    change = means - per_image[against, mode]
                    row |= {"against": against, "change": change.mean().item(), "change_error": _error(change)}
                rows.append(row | material.about | about)
    return rows


@contextmanager
def _own_or_temporary(folder: Path | None, team: Team) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    if team.count > 1:
        raise ValueError("a team of several processes needs a folder to share what it measures")
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _entropies(
    policy: Policy,
    name: str,
    weights: str,
    material: Material,
    sampling: Sampling,
    batch_size: int,
    team: Team,
    folder: Path,
) -> Tally:
    """The tally of all images; what the folder lacks is measured by the team."""

    def make(batch: Sequence[Shot]) -> Tally:
        tokens, parts = material.tokens(batch), []
        for start in range(0, len(batch), batch_size):
            part = slice(start, start + batch_size)
            conditions = [shot.condition for shot in batch[part]]
            modes = (replace(sampling, cfg_scale=1.0), sampling)
            pair = [score_tokens(policy, conditions, tokens[part], mode).entropy.cpu() for mode in modes]
            parts.append(tally(torch.stack(pair)))
        return merged(parts)

    def key(shot: Shot) -> list[Any]:
        return [shot.file, shot.seed, shot.condition.prompt, shot.condition.class_id]

    store = Tensors(folder, [__version__, weights, asdict(sampling), material.identity], key)
    kept(material.shots, make, store, batch_size=material.batch_size, label=f"entropy of {name}", team=team)
    return merged([store.read(batch) for batch in in_batches(material.shots, material.batch_size)])


def tally(entropy: Tensor) -> Tally:
    """What is kept of entropies [modes, B, T].

    Returns:
        float64 `per_image` [modes, B], the means over tokens; `sums` and `squares` [modes, T], over images.
    """
    values = entropy.double()
    return {"per_image": values.mean(2), "sums": values.sum(1), "squares": values.square().sum(1)}


def merged(parts: Sequence[Tally]) -> Tally:
    """One tally of several, the images in their order."""
    sums = {key: torch.stack([part[key] for part in parts]).sum(0) for key in ("sums", "squares")}
    return {"per_image": torch.cat([part["per_image"] for part in parts], 1), **sums}


def statistics(whole: Tally, mode: int) -> dict[str, Any]:
    """Numbers about the entropies of one mode."""
    per_image, sums, squares = (whole[key][mode] for key in ("per_image", "sums", "squares"))
    count = len(per_image)
    mean, error = per_image.mean().item(), _error(per_image)
    variance = (squares - sums.square() / count).clamp(min=0) / (count - 1)
    return {
        "images": count,
        "mean": mean,
        "standard_error": error,
        "low": mean - NORMAL_95 * error,
        "high": mean + NORMAL_95 * error,
        "by_position": (sums / count).tolist(),
        "by_position_error": (variance / count).sqrt().tolist(),
    }


def _error(values: Tensor) -> float:
    """Standard error of the mean of values [B]."""
    return (values.std() / len(values) ** 0.5).item()


def _about(policy: Policy, weights: str) -> dict[str, Any]:
    """What the results say about a policy and the programs."""
    parameters = sum(one.numel() for one in policy.model.parameters())
    card = policy.card
    return {
        "family": f"{_short(parameters)}, {card.image_size} px, {card.reads}",
        "parameters": parameters,
        "image_size": card.image_size,
        "base": card.base,
        "weights": weights,
        "versions": {"argrpo": __version__, "torch": torch.__version__},
    }


def _short(count: int) -> str:
    """111,234,567 as 111M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def open_pictures(question: Question) -> ImageSet | None:
    """The pictures of a question that asks for some, in the order they are measured in.

    Raises:
        UserError: no such folder, no labels, or a limit that is no number of images.
    """
    if question.limit is not None and question.limit < 2:
        raise UserError(f"--n {question.limit}: an interval needs 2 images or more")
    if question.split not in (None, "val"):
        raise UserError(f"no split {question.split!r}; there is val")
    if question.data is None:
        return None
    if question.split is None:
        raise UserError("--data are pictures to walk along, and --prompts asks for samples; give one of them")
    pictures = some_of(open_labelled(question.data), question.limit)
    if pictures.count < 2:
        raise UserError(f"{question.data} holds one picture, and an interval needs 2 or more")
    return pictures


def gather(
    policy: Policy,
    name: str,
    question: Question,
    pictures: ImageSet | None,
    sampling: Sampling,
    batch_size: int,
    cache: Path | None,
    team: Team,
) -> Material:
    """The images for a policy called `name`; pictures are tokenised here, samples drawn when their tokens are needed.

    Raises:
        UserError: the policy does not fit the question, or a picture cannot be read.
    """
    if pictures is not None:
        return _pictures(policy, pictures, cache, team)
    if question.split is not None:
        return team.together(lambda: _scenes(policy, name, question))
    return team.together(lambda: _samples(policy, name, question, sampling, batch_size))


def _pictures(policy: Policy, pictures: ImageSet, cache: Path | None, team: Team) -> Material:
    conditions = team.together(lambda: conditions_of(pictures, policy))
    codes = tokenise(pictures, policy, cache or user_cache() / "codes", team)
    shots = [
        Shot(condition, -1, f"{item.file} {item.stamp}")
        for condition, item in zip(conditions, pictures.items, strict=True)
    ]
    pairs = zip(in_batches(shots, CHUNK), in_batches(pictures.items, CHUNK), strict=True)
    batches = {own[0].file: items for own, items in pairs}
    tokenizer = policy.tokenizer_fingerprint()
    return Material(
        shots,
        lambda batch: codes.read(batches[batch[0].file])[CODES].long(),
        CHUNK,
        [item.file for item in pictures.items],
        ["pictures", PREPROCESSING, policy.card.image_size, tokenizer],
        {"labels": pictures.note, "preprocessing": PREPROCESSING, "tokenizer": tokenizer},
    )


def _scenes(policy: Policy, name: str, question: Question) -> Material:
    from argrpo_cli.nano.tokens import load_held_out, load_tokenizer

    if policy.tokenizer_fingerprint() != fingerprint([load_tokenizer()]):
        raise UserError(f"--split val of {name} needs --data: a folder of ImageNet's validation pictures")
    task = policy.card.reads
    tokens, conditions = (part[: question.limit] for part in load_held_out(task))
    shots = [Shot(condition, -1, str(index)) for index, condition in enumerate(conditions)]

    def of(batch: Sequence[Shot]) -> Tensor:
        return tokens[int(batch[0].file) :][: len(batch)]

    return Material(shots, of, CHUNK, conditions, ["scenes", task])


def _samples(policy: Policy, name: str, question: Question, sampling: Sampling, batch_size: int) -> Material:
    card = policy.card
    if card.reads == "classes":
        raise UserError(f"{name} draws classes and reads no prompts; measure it with --split val")
    # Of the official GenEval list, the part that a policy of few words can read.
    few_words = question.prompts == "geneval" and card.words is not None
    prompts = "geneval-nano" if few_words else question.prompts
    conditions = policy.conditions(read_captions(prompts))[: question.limit]
    if len(conditions) < 2:
        raise UserError(f"--prompts {question.prompts} holds one caption, and an interval needs 2 or more")
    seeds.check("entropy", question.seed, len(conditions), "--prompts")
    shots = [
        Shot(condition, seeds.of("entropy", question.seed, index), str(index))
        for index, condition in enumerate(conditions)
    ]
    about = {"prompts": prompts, "seed": question.seed}

    def draw(batch: Sequence[Shot]) -> Tensor:
        return draw_batch(policy, batch, sampling)[0]

    return Material(shots, draw, batch_size, conditions, ["samples"], about)


def tokenise(images: ImageSet, policy: Policy, cache: Path, team: Team) -> Tensors:
    """The tokens of pictures as `codes` [B, T] of each batch of `CHUNK`; those that are not kept yet are encoded.

    Raises:
        UserError: a picture that cannot be read, or a cache that cannot be written.
    """
    size, tokenizer = policy.card.image_size, policy.tokenizer_fingerprint()
    dtype = torch.int16 if policy.card.codes <= 2**15 else torch.int32
    at_once = max(1, ENCODE_PIXELS // size**2)

    def read(batch: Sequence[Item]) -> Tensor:
        with ThreadPoolExecutor(READERS) as readers:
            pixels = list(readers.map(lambda item: read_cropped(images.path / item.file, size), batch))
        if any(file_item(images.path, item.file).stamp != item.stamp for item in batch):
            raise UserError(f"pictures in {images.path} changed while they were read; give the command again")
        return torch.from_numpy(np.stack(pixels))

    @torch.inference_mode()
    def encode(batch: Sequence[Item], pixels: Tensor) -> dict[str, Tensor]:
        return {CODES: torch.cat([policy.tokenise(part).cpu() for part in pixels.split(at_once)]).to(dtype)}

    folder = cache / f"{tokenizer}-{size}"
    store = Tensors(folder, [PREPROCESSING, size, tokenizer], lambda item: [item.file, item.stamp])
    label = f"tokenising at {size} px"
    kept(images.items, encode, store, batch_size=CHUNK, label=label, team=team, prepare=read)
    return store


def read_cropped(path: Path, size: int) -> np.ndarray:
    """A picture as LlamaGen's tokenizer was evaluated on it, uint8 [3, size, size].

    RGB as Pillow converts it, then `centre_crop`. LlamaGen's `extract_codes_c2i.py` and `val_ddp.py` read through
    torchvision's ImageFolder: a turn noted in EXIF is not made, so that the few pictures that have one stay as trained
    on. Its policies are trained on ten crops of a picture 1.1 times as large; a validation set has one: the middle.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # of odd EXIF data, which ImageNet has
            cropped = np.asarray(centre_crop(opened.convert("RGB"), size))
    except OSError as error:  # Pillow's UnidentifiedImageError and truncated files are OSErrors without a number
        why = reason(error) if error.errno else "it is not an image, or a damaged one"
        raise UserError(f"cannot read the image {path}: {why}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: it is not an image, a damaged one, or far too large") from error
    return np.ascontiguousarray(cropped.transpose(2, 0, 1))


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
