"""No two benchmarks draw the same noise, whatever --seed each is given."""

from __future__ import annotations

from itertools import pairwise

from argrpo_cli.evals import drawbench_images, entropy_material, geneval, imagenet_sources


def test_the_seeds_of_the_benchmarks_are_apart():
    modules = (drawbench_images, entropy_material, geneval, imagenet_sources)
    spans = sorted((m.FIRST_SEED, m.FIRST_SEED + m.MOST_SEEDS * m.SEED_STRIDE) for m in modules)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)) and spans[-1][1] <= 2**32
