"""What each reward needs before it can score: files of the hub, packages, memory. Nothing is loaded to say so.

The files repeat the constants of the rewards' own modules, which the tests hold against each other; a file's size is
the network's parameters times the bytes of each in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.hub import HubFile

GB = 10**9
CLIP_B32, CLIP_L14, CLIP_H14 = 151_277_313, 427_616_513, 986_109_441  # parameters, of open_clip's networks
MANIQA, MASK2FORMER, BLIP = 135_747_530, 68_741_083, 446_206_689  # of pyiqa's, transformers' and ImageReward's
QWEN = 3_754_622_976  # Qwen2.5-VL-3B-Instruct, by its model card's index
AT_A_TIME = {  # bytes while a batch is scored, where it is more than a little
    "maniqa": 4 * GB,  # 20 crops of 0.2 GB (rewards/maniqa.py)
    "judge": 2 * GB,  # keys and values of 64 chats: 36 layers x 512 numbers x 2 bytes for each of some 700 tokens
}


class Needs(NamedTuple):
    """Of one reward network.

    Attributes:
        files: of the hub.
        packages: names to import, each with what pip installs for it.
        weights: bytes of the network on the device; None where nobody knows before it is loaded.
        working: bytes more while it scores.
        network: what is loaded, so that rewards which share a network are counted once.
        server: whether another machine scores; then all of the above is nothing.
        missing: what the recipe has to say and does not.
    """

    files: tuple[HubFile, ...] = ()
    packages: Mapping[str, str] = {}
    weights: int | None = 0
    working: int = 0
    network: str = ""
    server: bool = False
    missing: str = ""


OPEN_CLIP_FILE = "open_clip_model.safetensors"
CLIP_FILES = {  # and parameters
    "ViT-B-32": (HubFile("timm/vit_base_patch32_clip_224.openai", OPEN_CLIP_FILE, 4 * CLIP_B32), CLIP_B32),
    "ViT-L-14": (HubFile("timm/vit_large_patch14_clip_224.openai", OPEN_CLIP_FILE, 4 * CLIP_L14), CLIP_L14),
}
HPSV2_FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
QWEN_NAME = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN_SHARDS = {"model-00001-of-00002.safetensors": 3_980_000_000, "model-00002-of-00002.safetensors": 3_530_000_000}


def needs_of(name: str, options: Mapping[str, Any], device: str = "cpu") -> Needs:
    """What the reward `name` of the package needs with these options; nothing for a bundled one.

    Args:
        device: where it is to run; a judge takes half the memory on a GPU.

    Raises:
        UserError: an option that decides what is fetched has a value that there is not.
    """
    width = 4 if options.get("dtype", "float32") == "float32" else 2
    local = options.get("weights") is not None
    if name == "clip":
        return _clip(options, width)
    if name == "hpsv2":
        _known(name, "version", str(options.get("version", "2.1")), HPSV2_FILES)
        file = HubFile("xswu/HPSv2", HPSV2_FILES[str(options.get("version", "2.1"))], 2 * CLIP_H14)
        return Needs(() if local else (file,), weights=width * CLIP_H14, network=f"ViT-H-14 of {file.repo}")
    if name == "maniqa":
        file = HubFile("chaofengc/IQA-PyTorch-Weights", "ckpt_koniq10k.pt", 4 * MANIQA)
        return Needs(
            () if local else (file,), {"pyiqa": "pyiqa"}, width * MANIQA, AT_A_TIME["maniqa"], "MANIQA of pyiqa"
        )
    if name == "aesthetic":
        head = HubFile("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth", 4 * 925_425)
        clip, parameters = CLIP_FILES["ViT-L-14"]
        files = (*(() if local else (head,)), *(() if options.get("clip_weights") is not None else (clip,)))
        return Needs(files, weights=width * parameters, network="ViT-L-14 and the aesthetic predictor")
    if name == "imagereward":
        vocabulary = HubFile("google-bert/bert-base-uncased", "vocab.txt", 231_508)
        files = () if local else (HubFile("THUDM/ImageReward", "ImageReward.pt", 4 * BLIP),)
        files += () if options.get("vocabulary") is not None else (vocabulary,)
        return Needs(files, weights=4 * BLIP, network="BLIP of ImageReward")
    if name == "pickscore":
        file = HubFile("yuvalkirstain/PickScore_v1", "model.safetensors", 4 * CLIP_H14)
        return Needs(() if local else (file,), weights=width * CLIP_H14, network=f"ViT-H-14 of {file.repo}")
    if name == "geneval":
        return _geneval(options)
    if name == "ocr":
        return Needs((), {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime"}, 0, network="PP-OCR of rapidocr, CPU")
    if name.startswith("judge-"):
        return _judge(options, device)
    if name in ("deqa", "unified-reward"):
        missing = "" if options.get("url") else "the option url, that of an OpenAI-compatible server that has the model"
        return Needs(server=True, network=f"a server at {options.get('url', '?')}", missing=missing)
    return Needs()


def _known(name: str, option: str, value: str, allowed: Collection[str]) -> None:
    """What the reward itself would say when it is loaded."""
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UserError(f"reward {name}: {option} {value!r} is unknown; there are {', '.join(allowed)}{hint}")


def _clip(options: Mapping[str, Any], width: int) -> Needs:
    model, weights = options.get("model", "ViT-B-32-quickgelu"), options.get("weights")
    known = model.replace("/", "-").removesuffix("-quickgelu")
    if known in CLIP_FILES and options.get("pretrained", "openai") == "openai":
        file, parameters = CLIP_FILES[known]
        return Needs(() if weights is not None else (file,), weights=width * parameters, network=known)
    repo = model.removeprefix("hf-hub:")
    if weights is not None or "/" not in repo:
        return Needs(weights=None, network=model)
    file = OPEN_CLIP_FILE if repo != model else "model.safetensors"
    return Needs((HubFile(repo, file),), weights=None, network=model)


def _geneval(options: Mapping[str, Any]) -> Needs:
    _known("geneval", "detector", options.get("detector", "mask2former"), ("mask2former", "nano"))
    if options.get("detector") == "nano":
        return Needs()
    repo = "facebook/mask2former-swin-small-coco-instance"
    detector = (HubFile(repo, "config.json"), HubFile(repo, "model.safetensors", 4 * MASK2FORMER))
    clip, parameters = CLIP_FILES["ViT-L-14"]
    files = (
        *(() if options.get("weights") is not None else detector),
        *(() if options.get("clip_weights") is not None else (clip,)),
    )
    return Needs(files, weights=4 * (MASK2FORMER + parameters), network="Mask2Former Swin-S and ViT-L-14")


def _judge(options: Mapping[str, Any], device: str) -> Needs:
    model = options.get("model", QWEN_NAME)
    _known("judge", "backend", options.get("backend", "local"), ("local", "server"))
    if options.get("backend", "local") == "server":
        missing = "" if options.get("url") else "the option url, that of an OpenAI-compatible server that has the model"
        return Needs(server=True, network=f"{model} at {options.get('url', '?')}", missing=missing)
    files = (HubFile(model, "config.json"),) if "/" in model else ()
    if model != QWEN_NAME:
        return Needs(files, weights=None, working=AT_A_TIME["judge"], network=model)
    files += tuple(HubFile(model, file, size) for file, size in QWEN_SHARDS.items())
    return Needs(files, {}, (4 if device == "cpu" else 2) * QWEN, AT_A_TIME["judge"], model)
