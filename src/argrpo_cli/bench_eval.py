"""What `argrpo eval imagenet` costs, stage by stage, and against torch-fidelity: `python -m argrpo_cli.bench_eval`.

- time and memory of precision and recall on random features. The full size (50,000 against 10,000) takes minutes on a
  few cores, so by default two smaller ones tell the exponent; `--full` measures it;
- images per second of sampling, of decoding and of Inception, for a bundled policy;
- a folder of pictures against another, from files to IS and FID: torch-fidelity's own command line `fidelity --isc
  --fid` and `argrpo eval imagenet`, one after the other, each as a program of its own, with the same random weights and
  batch size. argrpo also finds sFID, precision, recall and all standard errors in that time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from argrpo_cli.bench import measure
from argrpo_cli.devices import resolve_device
from argrpo_cli.evals.fidelity import precision_recall
from argrpo_cli.evals.inception import POOL_WIDTH, load_inception
from argrpo_cli.policy import load_policy

SMALL_SIZES, FULL_SIZE = ((2500, 500), (5000, 1000)), (50_000, 10_000)  # generated, reference
REFERENCE = 64  # pictures in the comparison's reference


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m argrpo_cli.bench_eval", description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="pictures in the comparison; 2,000 on a GPU")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--policy", default="nano-c2i")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--full", action="store_true", help="precision and recall at 50,000 against 10,000")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"{platform.machine()}, {device}, {threads}, torch {torch.__version__}", flush=True)
    manifolds([FULL_SIZE] if options.full else SMALL_SIZES, device)  # first, for its peak of memory
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = save_random_weights(folder / "inception.pth")
        stages(options.policy, weights, options.batch_size, options.repeats, device)
        compare(folder, weights, options.images, options.image_size, options.batch_size, device)


def stages(name: str, weights: Path, batch_size: int, repeats: int, device: str) -> None:
    """Images per second of each stage."""
    policy, inception = load_policy(name, device), load_inception(weights, device)
    conditions = policy.conditions([index % len(policy.class_names) for index in range(batch_size)])
    tokens = policy.sample(conditions, seeds=range(batch_size), batch_size=batch_size)
    images = policy.decode(tokens)
    jobs = {
        "sampling": lambda: policy.sample(conditions, seeds=range(batch_size), batch_size=batch_size),
        "decoding": lambda: policy.decode(tokens),
        "Inception": lambda: inception.features(images),
    }
    inception.features(images)
    print(f"{name}, batches of {batch_size}, median of {repeats}")
    for stage, seconds in measure(jobs, repeats).items():
        print(f"  {stage:12}{batch_size / seconds:8.1f} images/s", flush=True)


def compare(folder: Path, weights: Path, count: int, size: int, batch_size: int, device: str) -> None:
    """Both programs on the same pictures."""
    ours, theirs = (
        save_pictures(folder / "generated", count, size, 0),
        save_pictures(folder / "real", REFERENCE, size, 1),
    )
    print(f"{count} pictures of {size} px against {REFERENCE}, from files to figures")
    place = ["--gpu", "0"] if device.startswith("cuda") else ["--cpu"]
    published, seconds = _timed(
        "torch_fidelity.fidelity", "--isc", "--fid", "--json", "--silent", "--no-cache", "--isc-splits", "1",
        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights),
        "--batch-size", str(batch_size), *place, "--input1", str(ours), "--input2", str(theirs),
    )  # fmt: skip
    values = json.loads(published[published.index("{") :])
    _line("torch-fidelity", seconds, values["inception_score_mean"], values["frechet_inception_distance"])
    _, own = _timed(
        "argrpo_cli", "eval", "imagenet", "--images", str(ours), "--reference", str(theirs), "--inception",
        str(weights), "--batch-size", str(batch_size), "--device", device, "--out", str(folder / "out"),
    )  # fmt: skip
    found = next(iter(json.loads((folder / "out" / "summary.json").read_text())["policies"].values()))
    _line("argrpo", own, found["inception_score"]["value"], found["fid"]["value"])
    print(f"  {'ratio':16}{seconds / own:8.2f} x", flush=True)


def manifolds(sizes: tuple[tuple[int, int], ...] | list[tuple[int, int]], device: str) -> None:
    """Seconds and peak memory of precision and recall on random features."""
    print("precision and recall, random features of 2048 numbers")
    seconds = []
    for generated, reference in sizes:
        rows = [torch.randn(count, POOL_WIDTH, device=device) for count in (generated, reference)]
        start = time.perf_counter()
        precision_recall(*rows)
        seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _peak_memory()
        print(f"  {generated:6} x {reference:5}{seconds[-1]:9.1f} s, {peak / 2**30:.1f} GB at most", flush=True)
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
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")
    return folder


def save_random_weights(path: Path) -> Path:
    """Inception's architecture with random weights of He's scale, as torch-fidelity reads them."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    fetch = port.load_state_dict_from_url
    fill = port.FeatureExtractorInceptionV3.load_state_dict
    try:  # its constructor insists on a file
        port.load_state_dict_from_url = lambda *given, **named: {}
        port.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = port.FeatureExtractorInceptionV3("random", ["2048"])
    finally:
        port.load_state_dict_from_url = fetch
        port.FeatureExtractorInceptionV3.load_state_dict = fill
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), path)
    return path


def _timed(module: str, *arguments: str) -> tuple[str, float]:
    """Standard output and seconds of a module run as a program."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=os.environ)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stderr}")
    return done.stdout, seconds


def _line(name: str, seconds: float, score: float, distance: float) -> None:
    print(f"  {name:16}{seconds:8.1f} s   IS {score:.6f}   FID {distance:.5f}", flush=True)


def _peak_memory() -> int:
    """Of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
