"""Policies as names and folders: what can be known of one before torch is loaded, and where its files lie.

A policy folder holds what `save_pretrained` writes and `policy.json`; a run directory holds several of them. With
`"sampling": {"cfg_scale": 1.0}` in its policy.json a policy says how it is meant to be sampled, as one with guidance in
its weights does: commands that draw take it where they are not told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from typing_extensions import TypedDict

from argrpo_cli.policy.classes import class_id, class_names
from argrpo_cli.policy.published import JANUS_CFG_SCALE, POLICIES, TOKENIZERS, published_entry
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError, did_you_mean, offer
from argrpo_cli.system.files import WEIGHTS, check_fetched, fetch_folder, read_json, write_json
from argrpo_cli.system.hub import repo_of
from argrpo_cli.system.processes import WARNING, say

CARD = "policy.json"
LARGEST = 8192  # pixels a side of what a policy draws, or is scaled to
ADAPTER_OF = "adapter_of"  # in the policy.json of a folder with adapters alone
MANIFEST = "checksums.json"  # of a checkpoint, see runs/checkpoints.py
CHECKPOINTS, CHECKPOINT_PREFIX = "checkpoints", "step_"  # of a run directory: checkpoints/step_000020
BUNDLED_POLICIES = ("nano-c2i", "nano-t2i", "nano-janus", "nano-var")
BUNDLED_PARTS = ("nano-vq", "nano-t5")  # tokenizers and text encoders
OWN_MODELS = ("llamagen", "var")  # the same of ours
MODEL_TYPES = {"janus": "janus", "multi_modality": "janus"}  # of config.json, to the family that opens the folder
ON_THE_HUB = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")  # files of a policy folder there
WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt")
TEXT_ENCODER = "google/flan-t5-xl"
NAMED_PARTS = (*BUNDLED_PARTS, *TOKENIZERS, TEXT_ENCODER)  # which are not copied into every checkpoint


class PolicyCard(TypedDict, total=False):
    """A policy.json; `read_card` says what must be in it."""

    family: str
    tokenizer: str
    text_encoder: str
    right_padded: bool
    classes: list[str]
    image_size: Annotated[int, Interval(ge=1, le=LARGEST)]
    base: str
    adapter_of: str


class Generation(TypedDict, total=False):
    """What is read of a Janus's generation_config.json."""

    guidance_scale: Annotated[float, Interval(ge=0, le=1e9)] | None


@dataclass(frozen=True)
class Glance:
    """What a policy draws, as its name or folder says: "classes" or "captions", the names of its classes, and how it
    is meant to be sampled."""

    name: str
    reads: str
    names: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def check(self, classes: Sequence[str | int]) -> None:
        """Raise UserError for a class that there is not."""
        for request in classes if self.reads == "classes" else ():
            class_id(request, self.names)


def here(name_or_path: str | Path) -> str | Path:
    """The folder of a policy that lies on the hub as `user/name` or `user/name@revision`, fetched unless it is in the
    cache; anything else as it is.

    Raises:
        UserError: it cannot be fetched.
    """
    named = None if published_entry(name_or_path) else repo_of(name_or_path)
    if named is None:
        return name_or_path
    try:
        return fetch_folder(named[0], ON_THE_HUB, named[1])
    except UserError as error:
        raise UserError(f"no policy {str(name_or_path)!r}: no folder here, and on the hub: {error}") from error


def glance(name_or_path: str | Path) -> Glance | None:
    """What is known of a policy before anything is loaded; None for weights that say it only when they are read.

    Raises:
        UserError: nothing there, or no policy folder.
    """
    name_or_path = here(name_or_path)
    if entry := published_entry(name_or_path):
        names = class_names(1000) if entry.reads == "classes" else ()
        return Glance(str(name_or_path), entry.reads, names, entry.sampling)
    if is_published(name_or_path):
        if published_family(name_or_path) == "janus":
            return Glance(str(name_or_path), "captions", sampling=janus_sampling(Path(name_or_path)))
        return None
    folder = find_policy(name_or_path)
    card = read_json(folder / CARD, PolicyCard)
    own = own_sampling(folder, card)
    if ADAPTER_OF in card:
        seen = glance(base_of(folder, card))
        return replace(seen, sampling=own) if seen is not None and own else seen
    card = read_card(folder)
    return Glance(str(name_or_path), "captions" if _reads_captions(card) else "classes", card.get("classes", ()), own)


def unfinished(name_or_path: str | Path) -> str:
    """`step 60 of 130` where this is a run that is not at its end, and stands for its newest checkpoint; else ""."""
    run = Path(name_or_path)
    if (run / CARD).is_file() or not (run / "run.json").is_file():
        return ""
    notes, folder = read_json(run / "run.json"), find_policy(run)
    if notes.get("finished") or folder.parent.name != CHECKPOINTS:
        return ""
    recipe = notes.get("recipe") or {}
    steps = (recipe.get(recipe.get("method", "grpo")) or {}).get("steps")
    return f"step {int(folder.name.removeprefix(CHECKPOINT_PREFIX))}" + (f" of {steps}" if steps else "")


def say_unfinished(name_or_path: str | Path) -> None:
    """A line on the terminal where a policy is that of an unfinished run."""
    if where := unfinished(name_or_path):
        say(f"{WARNING}{name_or_path} is a run that is not finished: this is its policy at {where}")


def check_weights_at_hand(name_or_path: str | Path) -> None:
    """UserError, before torch is loaded, for a published policy that is neither in the cache nor can be fetched."""
    if entry := published_entry(name_or_path):
        check_fetched(entry.repo, entry.file, entry.revision)


def find_policy(name_or_path: str | Path) -> Path:
    """The policy folder behind a name, a policy folder or a run directory; UserError if there is none."""
    if str(name_or_path) in BUNDLED_POLICIES:
        if not (WEIGHTS / str(name_or_path)).is_dir():
            train = f"python -m argrpo_cli.nano.make.build --only {name_or_path} --install"
            raise UserError(f"the weights of {name_or_path} are not in this version; `{train}` trains them")
        return WEIGHTS / str(name_or_path)
    path = Path(here(name_or_path))
    if not str(name_or_path).strip():
        raise UserError("the name of the policy is empty; name one, such as nano-c2i")
    if path.suffix in WEIGHT_FILES and not path.exists():
        raise UserError(f"no checkpoint file {path}")
    if not path.exists():
        near = offer(name_or_path, (*BUNDLED_POLICIES, *POLICIES), "policies")
        raise UserError(f"no policy {str(name_or_path)!r}: neither a folder nor a known name{near}")
    if (path / CARD).is_file():
        return path
    checkpoints = [folder for folder in checkpoint_folders(path).values() if (folder / CARD).is_file()]
    whole = [folder for folder in checkpoints if _files_have_their_sizes(folder)]
    if whole or checkpoints:
        return (whole or checkpoints)[-1]
    if (path / "policy" / CARD).is_file():
        return path / "policy"
    raise UserError(
        f"{path} is no policy: it has no {CARD}, no {CHECKPOINTS}/{CHECKPOINT_PREFIX}* and no policy/ folder with one"
    )


def is_published(name_or_path: str | Path) -> bool:
    """Whether this is a published name, a file of weights or an AR-GRPO folder, and not a policy folder or a run."""
    path = Path(name_or_path)
    if published_entry(name_or_path) or (path.suffix in WEIGHT_FILES and path.is_file()):
        return True
    return (path / "config.json").is_file() and not (path / CARD).is_file() and bool(weight_files(path))


def published_family(name_or_path: str | Path) -> str:
    """The family of what `is_published`: by its name or that of its file, or as config.json says; else LlamaGen's."""
    path = Path(name_or_path)  # a file that was downloaded by hand has its published name
    entry = published_entry(name_or_path) or next(
        (one for one in POLICIES.values() if one.file and Path(one.file).name == path.name), None
    )
    if entry is None and path.is_dir():
        config = read_json(path / "config.json")
        if config.get("model_type") in OWN_MODELS and "architectures" in config:
            raise UserError(
                f"{path} holds a network alone, as `model.save_pretrained` writes it: {CARD} and with it the image "
                f"tokenizer are missing; save the whole policy with `policy.save(folder)`, or write {path / CARD} as "
                '{"tokenizer": "nano-vq", "classes": ["dog", ...], "image_size": 64} (docs/extend.md)'
            )
        return MODEL_TYPES.get(str(config.get("model_type")), "llamagen")
    return "llamagen" if entry is None else entry.family


def janus_sampling(folder: Path) -> dict[str, Any]:
    """How a folder of a Janus of transformers is sampled: as its generation_config.json says, else as published."""
    file = folder / "generation_config.json"
    scale = read_json(file, Generation).get("guidance_scale") if file.is_file() else None
    return {"cfg_scale": float(scale or JANUS_CFG_SCALE)}


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, of one kind."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _files_have_their_sizes(checkpoint: Path) -> bool:
    """Whether the files that a checkpoint lists are there in full; resuming a run compares their contents, too."""
    if not (checkpoint / MANIFEST).is_file():
        return True  # of an earlier version
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """The checkpoints of a run directory by step, oldest first."""
    folders = (run / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*")
    steps = ((path.name.removeprefix(CHECKPOINT_PREFIX), path) for path in folders)
    return dict(sorted((int(step), path) for step, path in steps if step.isdecimal()))


def read_card(folder: Path, **keys: type) -> dict[str, Any]:
    """The policy.json of a policy folder, `sampling` in it; UserError when it is missing, lacks something, or is wrong.

    Args:
        keys: what a family needs in it, with its type, beside what all do.
    """
    card = read_json(folder / CARD, PolicyCard)
    keys |= {"text_encoder": str} if "text_encoder" in card else {} if _reads_captions(card) else {"classes": list}
    for key, kind in {**keys, "image_size": int}.items():
        if not isinstance(card.get(key), kind):
            raise UserError(f"{folder / CARD}: {key!r} is {card.get(key)!r}, expected a {kind.__name__}")
    return card | {"sampling": own_sampling(folder, card)}


def _reads_captions(card: Mapping[str, Any]) -> bool:
    """Through a text encoder beside the model, or by itself, as its policy.json says."""
    return "text_encoder" in card or card.get("reads") == "captions"


def own_sampling(folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """How a policy.json says that its policy is meant to be sampled; {} where it does not.

    Raises:
        UserError: a key that there is not, or a value of another type or out of range.
    """
    own, place = card.get("sampling", {}), f"{folder / CARD}: sampling"
    if not isinstance(own, dict):
        raise UserError(f'{place} is {own!r}; give a mapping such as {{"cfg_scale": 1.0}}')
    kinds = {one.name: type(one.default) for one in fields(Sampling) if one.name != "dtype"}
    for key, value in own.items():
        if key not in kinds:
            raise UserError(f"{place}: unknown key {key!r}; there are {', '.join(kinds)}{did_you_mean(key, kinds)}")
        if type(value) not in (int, kinds[key]):
            raise UserError(f"{place}.{key} is {value!r}, expected {'an int' if kinds[key] is int else 'a float'}")
    own = {key: kinds[key](value) for key, value in own.items()}
    Sampling(**own).check(f"{place}.")
    return own


def sampling_entry(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy.json has of it: nothing where there is nothing to say."""
    return {"sampling": dict(sampling)} if sampling else {}


def choose_sampling(
    policy: str,
    own: Mapping[str, Any],
    options: Mapping[str, Any],
    default: Sampling = Sampling(),
    tell: Callable[[str], None] = say,
) -> Sampling:
    """How a policy is sampled: by the options that are given, else as it says itself, else by default.

    The terminal is told once what the policy decides, and warned of guidance on top of what is in the weights.

    Args:
        policy: its name.
        own: `Card.sampling`.
        options: of `Sampling`, those that the user gave.
        tell: takes the lines for the terminal.
    """
    chosen = replace(default, **{**own, **options}).check()
    decided = [key for key in own if key not in options]
    if decided:
        tell(f"sampled as {policy} says: {chosen.words(decided)}")
    if warning := guidance_warning(policy, own, chosen.cfg_scale):
        tell(f"{WARNING}{warning}")
    return chosen


def guidance_warning(policy: str, own: Mapping[str, Any], cfg_scale: float) -> str:
    """What to say where a policy is guided that says itself it is to be sampled without; else ""."""
    meant = own.get("cfg_scale", cfg_scale)
    if cfg_scale <= meant or meant > 1:
        return ""
    return (
        f"guidance {cfg_scale:g}, and {policy} is meant to be sampled at {meant:g}: guidance is in its weights "
        "already, and measured, more of it makes such a policy worse"
    )


def mark_adapter(folder: Path, base: str, sampling: Mapping[str, Any]) -> None:
    """Make a folder with PEFT's files (adapter_config.json, adapter_model.safetensors) a policy folder.

    Its policy.json says {"adapter_of": base}, where base is whatever `load_policy` opens: a name, or a path (a relative
    one counts from the folder); and how the policy with the adapter is sampled.
    """
    write_json(folder / CARD, {ADAPTER_OF: base, **sampling_entry(sampling)})


def base_of(folder: Path, card: dict[str, object]) -> str:
    """What the card of an adapter folder names as its base, as `load_policy` takes it."""
    base = card[ADAPTER_OF]
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}: {ADAPTER_OF} of its policy.json is {base!r}; it must name a policy")
    place = folder / base if (folder / base).exists() else Path(base)
    inner, seen, below = place, {folder.resolve()}, base
    while inner.exists() and not is_published(inner) and below:
        inner = find_policy(inner)
        if inner.resolve() in seen:
            raise UserError(f"{folder}: {ADAPTER_OF} of its policy.json is {base!r}, which leads back to itself")
        seen.add(inner.resolve())
        below = read_json(inner / CARD, PolicyCard).get(ADAPTER_OF, "")
        inner = inner / below
    return str(place) if place.exists() else base


def part_of(folder: Path, what: str, name: str | None) -> Path:
    """The folder of a policy's image tokenizer or text encoder."""
    if name is None:
        raise UserError(f"{folder / CARD} names no {what}")
    part = (WEIGHTS if name in BUNDLED_PARTS else folder) / name
    if not part.is_dir():
        raise UserError(f"the {what} of {folder} is missing: no folder {part}")
    return part
