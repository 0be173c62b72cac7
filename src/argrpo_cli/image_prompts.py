"""What images show: as the command line says, metadata.jsonl, a file of captions, or the names of folders and files.

find_items([Path("images/")])            # `images.open_images` with a condition for each
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from argrpo_cli.images import WNID, ImageSet, Item, file_item, open_images, read_metadata, recorded_sampling
from argrpo_cli.listing import METADATA, is_npz, listed, natural
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError, printable, shortened, some_names

SHOWN = 3  # pairs of image and caption that a remark shows
NO_PROMPT_WORDS = re.compile(
    "|batch|class|data|dsc|folder|frame|generated|images?|img|output|part|photo|pictures?|sample|set|split|test|train|"
    "untitled|val",
    re.IGNORECASE,
)


def find_items(
    sources: Sequence[Path], prompt: str | None = None, class_name: str | None = None, captions: Path | None = None
) -> ImageSet:
    """The images of one folder, of one .npz, or of image files, with what they show.

    That is what the command line says (a prompt for all, a class, or a file of captions), else metadata.jsonl of the
    folder (`file`, `prompt`, `class_id`) and of its sub-folders, else class folders (`n02099601/12.png`), else file
    names that are words (`golden_retriever-12.png`).

    Raises:
        UserError: something is not there or not readable, or two things say what the images show.
    """
    options = {"--prompt": prompt, "--class": class_name, "--prompts": captions}
    statements = {option: value for option, value in options.items() if value is not None}
    if len(statements) > 1:
        raise UserError(f"give {' or '.join(list(statements)[:2])}, not both")
    for option, value in statements.items():
        if not str(value).strip():
            raise UserError(f"{option} is empty; say what the images should show")
    first = sources[0]
    if len(sources) == 1 and (first.is_dir() or is_npz(first)):
        if (first / METADATA).exists():
            if statements:
                raise UserError(
                    f"{first / METADATA} says what the images show; leave out --prompt, --class and --prompts"
                )
            rows = read_metadata(first)
            if not rows:
                raise UserError(f"{first / METADATA} lists no images")
            others = [file for file in listed(first)[0] if file not in rows]
            remarks = (f"left out, as {first / METADATA} does not list them: {some_names(others)}",) if others else ()
            items = [_item_of_metadata(first, file, row) for file, row in rows.items()]
            return ImageSet(first, items, remarks=remarks)
        if not first.exists():
            raise UserError(f"there is no file {first}")
        if first.is_dir() and not statements:
            recorded_sampling(first)  # refuses an unfinished one
        images, folders = open_images(first), True
    else:
        for path in sources:
            if path.is_dir() or is_npz(path):
                raise UserError(f"{path} is not an image file; give one folder, one .npz, or image files")
            if not path.exists():
                what = "no folder" if len(sources) == 1 and not path.suffix else "there is no image"
                raise UserError(f"{what} {path}")
        items = [replace(file_item(path.parent, path.name), file=str(path)) for path in sources]
        images, folders = ImageSet(first.parent, items), False
    if captions is not None:
        return _captioned(images, captions)
    if not statements:
        return _named(images, folders)
    condition = Condition(prompt if class_name is None else class_prompt(class_name))
    return replace(images, items=[replace(item, condition=condition) for item in images.items])


def _item_of_metadata(folder: Path, file: str, row: Mapping[str, Any]) -> Item:
    extra = {key: row[key] for key in ("class_name", "seed", "policy") if key in row}
    condition = None if row["prompt"] is None else Condition(row["prompt"], row["class_id"])
    return file_item(folder, file, condition, **extra)


def _named(images: ImageSet, folders: bool) -> ImageSet:
    """The images with what the metadata.jsonl of sub-folders, or else the names of folders and files say of them.

    Args:
        folders: their folders count, as they lie within that of the set.
    """
    rows = _rows_below(images) if folders else {}
    items, texts = [], {}
    for item in images.items:
        if item.file in rows:
            items.append(_item_of_metadata(images.path, item.file, rows[item.file]))
            continue
        path = Path(item.file if folders else Path(item.file).name)
        condition = named_condition(path)
        items.append(replace(item, condition=condition))
        if condition:
            texts[path] = condition.prompt
    if not texts:
        return replace(images, items=items)
    names = "names of folders and files" if any(len(path.parts) > 1 for path in texts) else "file names"
    path, text = next(iter(texts.items()))
    return replace(images, items=items, note=f"prompts were read from the {names} ({path}: {text!r})")


def _rows_below(images: ImageSet) -> dict[str, dict[str, Any]]:
    """What the metadata.jsonl of sub-folders list, by the path within the set; UserError for an unfinished one."""
    rows = {}
    above = {folder for item in images.items for folder in Path(item.file).parents if folder.name}
    for folder in sorted(above):
        recorded_sampling(images.path / folder)
        if (images.path / folder / METADATA).exists():
            listing = read_metadata(images.path / folder)
            rows |= {(folder / file).as_posix(): row for file, row in listing.items()}
    return rows


def named_condition(path: Path) -> Condition | None:
    """What a picture shows by its class folder, `golden_retriever/1.png` or `n02099601/1.png`, or else by its name."""
    for part in (*path.parts[:-1], path.stem):
        if wnid := WNID.match(part):
            from argrpo_cli.policy.classes import class_names, class_wnids

            if wnid[0] in class_wnids():
                class_id = class_wnids().index(wnid[0])
                return Condition(class_prompt(class_names(len(class_wnids()))[class_id]), class_id)
        elif text := prompt_from_file_name(part):
            return Condition(text)
    return None


def prompt_from_file_name(stem: str) -> str | None:
    """What a file name says its image shows, or None when it is only a number or a camera's word.

    `a_photo_of_two_cats_007`: `a photo of two cats`; `003-dog-00012`: `a photo of a dog`; `IMG_0012`: None.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"^(\d+ )+|( ?\(?\d+\)?)+$", "", words).strip()
    if NO_PROMPT_WORDS.fullmatch(words) or not any(character.isalpha() for character in words):
        return None
    if printable(words) != words:  # bytes that are no UTF-8, control characters
        return None
    return words if len(words.split()) >= 4 else class_prompt(words)


def _captioned(images: ImageSet, path: Path) -> ImageSet:
    """The images with captions of a file, by the `file` of its rows; of one without, such as a .txt, in their order,
    with a remark.

    Raises:
        UserError: no captions, some rows that name a file and some that do not, two captions for one image, none for
            one of them, or another number of them.
    """
    from argrpo_cli.captions import CAPTION_SETS, file_rows, read_captions

    items, remarks = images.items, list(images.remarks)
    texts = read_captions(str(path), each=True)
    rows = [] if str(path) in CAPTION_SETS else file_rows(path.expanduser())
    files = [row.get("file") if isinstance(row, dict) else None for row in rows]
    captions: dict[str, str] = {}
    named = any(file is not None for file in files)
    for number, (file, text) in enumerate(zip(files, texts, strict=True), start=1) if named else ():
        if not isinstance(file, str) or not file:
            value = shortened(file)
            raise UserError(f"{path}, row {number}: 'file' = {value}; name the file in every row, or in none of them")
        if captions.setdefault(file, text) != text:
            raise UserError(f"{path}, row {number}: a second caption for {file}")
    if captions:
        lacking = [item.file for item in items if item.file not in captions]
        if lacking:
            raise UserError(f"{path} has no caption for {some_names(lacking)}")
        texts = [captions[item.file] for item in items]
        if others := captions.keys() - {item.file for item in items}:
            remarks.append(f"captions of {path} for no image of the set: {some_names(sorted(others, key=natural))}")
    elif len(texts) != len(items):
        raise UserError(f"{path} has {len(texts)} captions for {len(items)} images; give one for each, in order")
    else:
        pairs = [f"{item.file}: {text!r}" for item, text in zip(items, texts, strict=True)]
        shown = pairs if len(pairs) <= SHOWN else [*pairs[:SHOWN], "...", pairs[-1]]
        remarks.append(f"captions of {path} go to the images in this order: {', '.join(shown)}")
    items = [replace(item, condition=Condition(text)) for item, text in zip(items, texts, strict=True)]
    return replace(images, items=items, remarks=remarks)
