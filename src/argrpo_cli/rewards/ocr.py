"""ocr, a task reward: does a picture show the text that its prompt quotes?

    Ocr().score(images, [Condition('a shop sign that says "Fresh Bread"')])      # 1 where just that is read

The score is one minus the normalised edit distance between the text quoted in the prompt, t, and the text read, r:

    1 - d(t, r) / max(|t|, |r|)    in [0, 1], with Levenshtein's distance d

both in comparable form (`comparable`: case and white space do not count). It is 1 for exactly this text, 0 where
nothing is read, and text that was not asked for lowers it. After the OCR reward of Flow-GRPO (J. Liu et al. 2025,
arXiv:2505.05470, section 4.1; flow_grpo/ocr.py), which drops case and spaces too, but takes the first pair of straight
double quotes alone, divides by |t| and cuts off at 0, and in its code forgives any surplus text once t occurs in r.

The reader is rapidocr with the PP-OCR weights that its wheel carries: nothing is fetched. It runs on the CPU whatever
the device of the other rewards. Its text detector takes one picture at a time and needs most of the time, so pictures
are shared out to threads, one network thread each; a picture's score does not depend on those beside it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from argrpo_cli.rewards.base import Reward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# A single quote opens after, and closes before, anything but a letter or digit: don't, dogs and the 90s are left alone.
QUOTED = re.compile(
    r'"(?P<straight>[^"]*)"'
    r"|[“„](?P<double>[^“”„]*)[“”]"
    r"|«(?P<angle>[^«»]*)»"
    r"|(?<!\w)['‘](?P<single>(?:[^\"“”„«»'‘’]|(?<=\w)['’](?=\w))*)['’](?!\w)"
)
STRAIGHT = str.maketrans("‘’‚“”„–—", "'''\"\"\"--")  # the reader does not tell them apart


def quoted_texts(prompt: str) -> list[str]:
    """The texts a prompt quotes, in order: in "...", “...”, „...“ or «...», or in '...' or ‘...’ of whole words.

    Apostrophes inside words quote nothing, quotes inside quotes belong to the outer ones, and quotes around nothing
    are left out.
    """
    texts = (next(text for text in match.groups() if text is not None) for match in QUOTED.finditer(prompt))
    return [text.strip() for text in texts if comparable(text)]


def quoted(prompt: str) -> str:
    """All texts that a prompt quotes, in one; UserError where it quotes none."""
    texts = quoted_texts(prompt)
    if not texts:
        raise UserError(f"ocr: no text is quoted in the prompt {prompt!r}; one it reads is 'a sign that says \"Open\"'")
    return " ".join(texts)


def comparable(text: str) -> str:
    """A text as it is compared: Unicode's NFKC, straight quotes and hyphens, case folded, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).translate(STRAIGHT).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the least number of characters to put in, take out or replace to make `b` of `a`."""
    above = list(range(len(b) + 1))
    for row, left in enumerate(a, start=1):
        line = [row]
        for column, right in enumerate(b, start=1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (left != right)))
        above = line
    return above[-1]


def text_similarity(text: str, read: str) -> float:
    """1 - edit distance / length of the longer text, in comparable form; 0 where nothing was read."""
    text, read = comparable(text), comparable(read)
    longer = max(len(text), len(read))
    return 1 - edit_distance(text, read) / longer if read else 0.0


def reading_order(boxes: np.ndarray) -> list[int]:
    """Places of boxes (four corners each, [N, 4, 2]) in the order of reading: lines downwards, each from left to right.

    From the top down, a box belongs to the line above it when its middle lies within half the height, its own or that
    of the line's first box, whichever is less, of that box's middle.
    """
    low, high = boxes[:, :, 1].min(1), boxes[:, :, 1].max(1)
    middle, height, left = (low + high) / 2, high - low, boxes[:, :, 0].min(1)
    lines: list[list[int]] = []
    for place in np.argsort(middle, kind="stable").tolist():
        first = lines[-1][0] if lines else None
        if first is not None and middle[place] - middle[first] < min(height[place], height[first]) / 2:
            lines[-1].append(place)
        else:
            lines.append([place])
    return [place for line in lines for place in sorted(line, key=lambda place: left[place])]


def load_reader() -> Any:
    """rapidocr on the model files of its own package, one thread per network.

    Every reading counts, however uncertain, as in Flow-GRPO; upside-down text is not turned.

    Raises:
        UserError: rapidocr or onnxruntime is not installed, or the model files are missing or damaged.
    """
    for package in Ocr.packages:
        if find_spec(package) is None:
            raise UserError(f"the reward ocr needs {package}; pip install rapidocr onnxruntime")
    import rapidocr

    folder = Path(rapidocr.__file__).parent / "models"
    files = {part: sorted(folder.glob(f"*_{part.lower()}_*.onnx")) for part in ("Det", "Rec")}
    for part, paths in files.items():
        if len(paths) != 1:
            count = f"{len(paths)} files" if paths else "no file"
            raise UserError(f"{count} *_{part.lower()}_*.onnx in {folder}, expected one; pip install -U rapidocr")
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    models = {f"{part}.model_path": str(paths[0]) for part, paths in files.items()}
    options = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0}
    reader = rapidocr.RapidOCR(params={**options, **threads, **models})
    try:
        reader(_specimen())  # it opens its files when it first needs them
    except Exception as error:  # onnxruntime's own errors have no common class
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        mend = "pip install --force-reinstall rapidocr"
        raise UserError(f"the model files in {folder} cannot be used ({why}); {mend}") from error
    return reader


class Ocr(Reward):
    """How well a picture shows the text that its prompt quotes, in [0, 1]; several quoted texts count as one, in order.

    Args:
        device: where the scores go; the reading is done on the CPU.
        threads: pictures read at the same time; by default as many as torch uses.
    """

    name, low, high = "ocr", 0.0, 1.0
    packages: ClassVar = {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime"}  # which bring the weights
    network_name = "PP-OCR of rapidocr, CPU"

    def __init__(self, device: str = "cpu", *, threads: Annotated[int | None, Ge(1)] = None):
        import torch

        self.device, self.threads = device, threads or torch.get_num_threads()
        self.reader = load_reader()

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a prompt that quotes no text."""
        for condition in conditions:
            quoted(condition.prompt)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        import torch

        pairs = zip([quoted(one.prompt) for one in conditions], self.read(images), strict=True)
        scores = [text_similarity(text, " ".join(lines)) for text, lines in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    def read(self, images: Tensor) -> list[list[str]]:
        """The pieces of text in each of the images, uint8 [B, 3, H, W], in the order of reading."""
        pictures = images.permute(0, 2, 3, 1).flip(-1).contiguous().cpu().numpy()  # BGR, as OpenCV has it
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read, pictures))

    def _read(self, picture: np.ndarray) -> list[str]:
        result = self.reader(picture)
        if result.boxes is None or not result.txts:
            return []
        return [result.txts[place] for place in reading_order(np.asarray(result.boxes))]


def _specimen() -> np.ndarray:
    """A picture with a word in it, uint8 [64, 160, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (160, 64), "white")
    ImageDraw.Draw(picture).text((16, 12), "Open", font=ImageFont.load_default(size=32), fill="black")
    return np.array(picture)
