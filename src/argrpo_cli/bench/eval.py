"""What `argrpo eval imagenet` costs, stage by stage, and against torch-fidelity: `python -m argrpo_cli.bench eval`.

- time and memory of precision and recall on random features. The full size (50,000 against 10,000) takes minutes on a
  few cores, so by default two smaller ones tell the exponent; `--full` measures it;
- images per second of sampling, of decoding and of Inception, for a bundled policy;
- a folder of pictures against another, from files to IS and FID: torch-fidelity's own command line `fidelity --isc
  --fid` and `argrpo eval imagenet`, one after the other, each as a program of its own, with the same random weights and
  batch size, at a fifth of the pictures and at all of them. What the difference of the two costs is free of all that
  happens once (imports, the distance itself). argrpo also finds sFID, precision, recall and all standard errors in that
  time. It is a failure when IS or FID differ.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

from argrpo_cli.bench import measure, parse
from argrpo_cli.evals.fidelity import precision_recall
from argrpo_cli.networks.inception import POOL_WIDTH, load_inception
from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Result, Sampling
from argrpo_cli.system.processes import peak_memory

SMALL_SIZES, FULL_SIZE = ((2500, 500), (5000, 1000)), (50_000, 10_000)  # generated, reference
REFERENCE = 64  # pictures in the comparison's reference
IMAGES_CPU, IMAGES_GPU, PART = 200, 2000, 5  # pictures in the comparison, and the share of them that is tried first
CLASS_SPREAD = 5.0  # of the last layer's weights, which gives an inception score of about 3
TOLERANCE = 1e-4  # relative, of IS and FID


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    more = [
        ("--images", {"type": int, "help": f"in the comparison  [default: {IMAGES_CPU}, on a GPU {IMAGES_GPU}]"}),
        ("--full", {"action": "store_true", "help": "precision and recall at 50,000 against 10,000"}),
    ]
    options = parse("eval", __doc__, arguments, more, image_size=256, batch_size=64, policy="nano-c2i", repeats=3)
    device = options.device
    images = options.images or (IMAGES_GPU if device.startswith("cuda") else IMAGES_CPU)
    manifolds([FULL_SIZE] if options.full else SMALL_SIZES, device)  # first, for its peak of memory
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = save_random_weights(folder / "inception.pth")
        stages(options.policy, weights, options.batch_size, options.repeats, device)
        compare(folder, weights, images, options.image_size, options.batch_size, device)


def stages(name: str, weights: Path, batch_size: int, repeats: int, device: str) -> None:
    """Images per second of each stage."""
    policy, inception = load_policy(name, device), load_inception(weights, device)
    names, sampling, seeds = policy.card.names, Sampling(), range(batch_size)
    encoded = policy.encode(policy.conditions([index % len(names) for index in range(batch_size)]))
    tokens = policy.sample(encoded, sampling, seeds).tokens
    images = policy.decode(tokens)
    jobs = {
        "sampling": lambda: policy.sample(encoded, sampling, seeds),
        "decoding": lambda: policy.decode(tokens),
        "Inception": lambda: inception.features(images),
    }
    inception.features(images)
    print(f"{name}, batches of {batch_size}, median of {repeats}")
    for stage, seconds in measure(jobs, repeats).items():
        print(f"  {stage:12}{batch_size / seconds:8.1f} images/s", flush=True)


def compare(folder: Path, weights: Path, count: int, size: int, batch_size: int, device: str) -> None:
    """Both programs on the same pictures, a fifth of them and all; SystemExit where their figures differ."""
    theirs = save_pictures(folder / "real", REFERENCE, size, 1)
    times = []
    for number in sorted({max(2 * PART, count // PART), count}):
        ours, out = save_pictures(folder / f"generated-{number}", number, size, 0), folder / f"out-{number}"
        print(f"{number} pictures of {size} px against {REFERENCE}, from files to figures", flush=True)
        printed, published = _timed(
            "torch_fidelity.fidelity", "--isc", "--fid", "--json", "--silent", "--no-cache", "--isc-splits", "1",
            "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights),
            "--batch-size", str(batch_size), *(["--gpu", "0"] if device.startswith("cuda") else ["--cpu"]),
            "--input1", str(ours), "--input2", str(theirs),
        )  # fmt: skip
        values = json.loads(printed[printed.index("{") :])
        _, own = _timed(
            "argrpo_cli", "eval", "imagenet", "--images", str(ours), "--reference", str(theirs), "--inception",
            str(weights), "--batch-size", str(batch_size), "--device", device, "--out", str(out), cache=out,
        )  # fmt: skip
        (row,) = Result.load(out / "summary.json").rows.values()
        figures = {
            "torch-fidelity": (values["inception_score_mean"], values["frechet_inception_distance"]),
            "argrpo": (row["inception_score"].value, row["fid"].value),
        }
        for (name, (score, distance)), seconds in zip(figures.items(), (published, own), strict=True):
            print(f"  {name:16}{seconds:8.1f} s   IS {score:.6f}   FID {distance:.5f}")
        print(f"  {'ratio':16}{published / own:8.2f} x", flush=True)
        for reported, mine in zip(*figures.values(), strict=True):
            if not math.isclose(mine, reported, rel_tol=TOLERANCE):
                raise SystemExit(f"the figures differ: {mine} here, {reported} by torch-fidelity")
        times.append((number, published, own))
    if len(times) > 1:
        (few, *before), (all_of_them, *after) = times
        each = [(late - early) / (all_of_them - few) for early, late in zip(before, after, strict=True)]
        print(f"  one more picture: {each[0]:.4f} s and {each[1]:.4f} s, {each[0] / each[1]:.2f} x")


def manifolds(sizes: Sequence[tuple[int, int]], device: str) -> None:
    """Seconds and peak memory of precision and recall on random features."""
    print("precision and recall, random features of 2048 numbers")
    seconds = []
    for generated, reference in sizes:
        rows = [torch.randn(count, POOL_WIDTH, device=device) for count in (generated, reference)]
        start = time.perf_counter()
        precision_recall(*rows)
        seconds.append(time.perf_counter() - start)
        peak = peak_memory(device) / 2**30
        print(f"  {generated:6} x {reference:5}{seconds[-1]:9.1f} s, {peak:.1f} GB at most", flush=True)
    if len(sizes) > 1:
        growth = sizes[1][0] / sizes[0][0]
        exponent = math.log(seconds[1] / seconds[0]) / math.log(growth)
        expected = seconds[1] * (FULL_SIZE[0] / sizes[1][0]) ** 2
        full = f"{FULL_SIZE[0]} x {FULL_SIZE[1]}"
        print(f"  exponent {exponent:.2f}; with 2 it would be {expected / 60:.0f} minutes at {full}")


def save_pictures(folder: Path, count: int, size: int, seed: int) -> Path:
    """Soft random patterns, which pack like photographs rather than like noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        _pattern(rng, size).save(folder / f"{index:05d}.png")
    return folder


def _pattern(rng: np.random.Generator, size: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def save_random_weights(path: Path) -> Path:
    """Inception's architecture with random weights of He's scale, as torch-fidelity reads them.

    The last layer looks away from what all patterns of `save_pictures` have in common: or every picture would be of the
    same class, and the inception score 1 whatever is computed.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as port

    extractor = port.FeatureExtractorInceptionV3
    with patch.object(port, "load_state_dict_from_url"), patch.object(extractor, "load_state_dict"):
        network = extractor("random", ["2048"])  # its constructor insists on a file
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(network.fc.weight, std=CLASS_SPREAD)
    torch.save(network.state_dict(), path)
    rng = np.random.default_rng(2)
    some = torch.from_numpy(np.stack([np.asarray(_pattern(rng, 256)) for _ in range(8)])).permute(0, 3, 1, 2)
    common = nn.functional.normalize(load_inception(path, "cpu").features(some).pool.mean(0), dim=0)
    with torch.no_grad():
        network.fc.weight -= torch.outer(network.fc.weight @ common, common)
    torch.save(network.state_dict(), path)
    return path


def _timed(module: str, *arguments: str, cache: Path | None = None) -> tuple[str, float]:
    """Standard output and seconds of a module run as a program, with a user's cache of its own."""
    kept = {} if cache is None else {"XDG_CACHE_HOME": f"{cache}-cache"}
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", **kept}  # both in float32 proper
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stderr}")
    return done.stdout, seconds
