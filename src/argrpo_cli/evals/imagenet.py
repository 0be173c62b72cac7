"""`argrpo eval imagenet`: IS, FID, sFID, precision and recall as ADM's evaluator and the AR-GRPO paper report them.

A policy's images are drawn, scaled and shown to Inception batch by batch and kept only if asked; a folder of pictures
or an .npz is read the same way. Everything lies in one folder, written as it comes, so that an interrupted evaluation
goes on where it stopped and ends with the same figures:

    settings.json                       what is measured; a folder is not used for two things
    NAME/features/0000256.safetensors   features of 256 images, removed at the end
    NAME/images/                        the pictures, where they are kept
    summary.json                        figures, warnings, protocol

Several processes (`torchrun -m argrpo_cli eval imagenet ...`) share the work. What was computed of the reference stays
in the user's cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from argrpo_cli import __version__, paper_numbers
from argrpo_cli.evals import imagenet_warnings as check
from argrpo_cli.evals.feature_store import HASHES, FeatureStore, extract
from argrpo_cli.evals.fidelity import NEIGHBOURS, SPLIT_SIZE, save_statistics
from argrpo_cli.evals.folders import check_claim, claim
from argrpo_cli.evals.imagenet_measures import Measure, measure_set, sorted_by_class
from argrpo_cli.evals.imagenet_reference import (
    ADM_NAME,
    Reference,
    ReferenceFile,
    content_hash,
    fetch_adm,
    open_reference,
    prepare_reference,
)
from argrpo_cli.evals.imagenet_sources import (
    ImagenetSettings,
    PolicySource,
    keeps_order,
    open_sources,
    recorded_sampling,
)
from argrpo_cli.evals.nano_sets import class_groups
from argrpo_cli.images import ImageSet
from argrpo_cli.networks.inception import Inception, load_inception
from argrpo_cli.system.files import read_json, user_cache, write_json
from argrpo_cli.system.processes import Team, join_team

SUMMARY = "summary.json"
ERRORS = (
    "of drawing the images, given the reference: a jackknife over 20 groups (IS, FID, sFID), the spread over generated "
    "images (precision); recall: the spread over reference images, given the generated ones; FID's and sFID's upward "
    "bias in few images is not part of them"
)


def run_imagenet(
    policies: Sequence[str],
    images: str | Path | None,
    out: Path,
    settings: ImagenetSettings = ImagenetSettings(),
    *,
    reference: str = ADM_NAME,
    inception: str | Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    keep_images: bool = False,
    keep_features: bool = False,
    statistics: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Measure one policy, or two of which the second is the baseline, or finished `images`.

    Args:
        reference: a path, or "adm-256", see `imagenet_reference.py`.
        inception: a file of weights; None fetches torch-fidelity's.
        batch_size: of drawing and of Inception; an unfinished `out` goes on with its own.
        statistics: a file to save the reference's statistics in.
        warn: is told where the evaluation departs from the published protocol, before the work where possible.

    Returns:
        What summary.json holds: `policies` {name: {measure: {value, error}}}, for two `difference`, `paper` (what it
        reports for such a policy), `warnings` and `protocol`. None in all of several processes but the first.

    Raises:
        UserError: no such policy, set or reference, one that does not fit, an `out` used for something else.
    """
    settings.check()
    team = join_team(device)
    team.lead(lambda: check_claim(out))
    sources = team.together(lambda: open_sources(policies, images, out, settings, keep_images, team.device))
    found = _open_reference(reference, team)
    network = team.together(lambda: load_inception(inception, team.device))
    identity = team.from_lead(lambda: _identity(sources, settings, found, network, keep_images))
    batch_size = team.from_lead(lambda: claim(out, _without_paths(identity), batch_size))
    stores = {name: FeatureStore(out / name / "features", one.count, batch_size) for name, one in sources.items()}
    store = None if found.images is None else FeatureStore(out / "reference", found.images.count, batch_size)
    early = _early_warnings(sources, settings, found, identity)
    finished = team.from_lead((out / SUMMARY).is_file)
    if team.index == 0:
        for text in read_json(out / SUMMARY)["warnings"] if finished else early:
            warn(text)
    ready = None
    if not finished or statistics is not None:
        cache = f"{found.sha256[:24]}-{network.fingerprint}.safetensors"
        ready = prepare_reference(found, network, store, user_cache() / "references" / cache, team)
    if statistics is not None:
        team.lead(lambda: save_statistics(statistics, ready.pool.statistics, ready.spatial.statistics))
    if not finished:
        for name, source in sources.items():
            extract(source, network, stores[name], team, f"drawing {name}" if policies else f"Inception on {name}")

        def finish() -> None:
            result = _result(sources, stores, ready, team.device, early, warn)
            result["protocol"] = _protocol(identity, sources, stores, found, network)
            write_json(out / SUMMARY, result)

        team.lead(finish)
    if team.index:
        return None
    for one in [*stores.values(), store]:
        if one is not None and not keep_features:
            one.remove()
    return read_json(out / SUMMARY)


def save_reference_statistics(
    reference: str, file: Path, inception: str | Path | None = None, batch_size: int = 64, device: str = "auto"
) -> bool:
    """Compute a reference's statistics and save them as ADM's files have them; True in the process that reports.

    Interrupted, it goes on where it was: features lie in a folder beside the file, until it is written.
    """
    team = join_team(device)
    found = _open_reference(reference, team)
    network = team.together(lambda: load_inception(inception, team.device))
    # Features of another network, or another division into batches, are none to go on with.
    folder = file.with_name(f"{file.name}-features-{found.sha256[:12]}-{network.fingerprint[:8]}-{batch_size}")
    store = None
    if found.images is not None and found.stored is None:
        store = FeatureStore(folder, found.images.count, batch_size)
    ready = prepare_reference(found, network, store, None, team)
    team.lead(lambda: save_statistics(file, ready.pool.statistics, ready.spatial.statistics))
    if store is not None:
        team.lead(store.remove)
    return team.index == 0


def _open_reference(given: str, team: Team) -> ReferenceFile:
    if given == ADM_NAME:
        team.lead(fetch_adm)
    return team.together(lambda: open_reference(given))


def _identity(
    sources: dict[str, PolicySource | ImageSet],
    settings: ImagenetSettings,
    found: ReferenceFile,
    network: Inception,
    keep_images: bool,
) -> dict[str, Any]:
    """What decides the figures."""
    drawn, own = None, {}
    for name, source in sources.items():
        if isinstance(source, PolicySource):
            drawn = {**asdict(settings), "keep_images": keep_images}
            own[name] = {"weights": source.policy.fingerprint(), "base": source.policy.base}
        else:
            own[name] = {"path": str(source.path), "sha256": content_hash(source.path, source)}
            if recorded := recorded_sampling(source):
                own[name]["sampling"] = recorded
    reference = found.protocol()
    return {"measured": own, "settings": drawn, "reference": reference, "inception": network.fingerprint}


def _without_paths(identity: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for an evaluation to go on: contents, wherever they lie."""
    measured = {name: {**own, "path": None} for name, own in identity["measured"].items()}
    return {**identity, "measured": measured, "reference": {**identity["reference"], "name": None}}


def _early_warnings(
    sources: dict[str, PolicySource | ImageSet],
    settings: ImagenetSettings,
    found: ReferenceFile,
    identity: dict[str, Any],
) -> list[str]:
    """What is known before the first image; each once."""
    texts: list[str] = []
    for name, source in sources.items():
        own = identity["measured"][name]
        if isinstance(source, PolicySource):
            texts += check.count_warnings(source.count, len(source.policy.class_names))
            texts += check.sampling_warnings(asdict(settings))
        else:
            texts += check.count_warnings(source.count, None)
            texts += check.sampling_warnings(own.get("sampling", {}))
        texts += check.size_warnings(source.size, found)
        texts += check.reference_warnings(found, own.get("sha256") == found.sha256)
    return list(dict.fromkeys(texts))


def _result(
    sources: dict[str, PolicySource | ImageSet],
    stores: dict[str, FeatureStore],
    reference: Reference,
    device: str,
    warnings: list[str],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Figures, differences, the paper's, and the warnings that only the images themselves can give."""
    measured: dict[str, dict[str, Measure]] = {}
    late: list[str] = []
    for name, source in sources.items():
        store = stores[name]
        class_ids = source.class_ids if isinstance(source, PolicySource) else None
        groups, keep_order = class_groups(store.count, class_ids), keeps_order(source)
        parts = reference.pool, reference.spatial, reference.pool_features
        measured[name] = measure_set(store, groups, *parts, keep_order, device)
        late += check.set_warnings(name, store.read(HASHES), reference.hashes, keep_order and sorted_by_class(store))
    for text in late:
        warn(text)
    result: dict[str, Any] = {
        "benchmark": "imagenet",
        "policies": {name: {key: one.summary() for key, one in own.items()} for name, own in measured.items()},
    }
    if len(measured) == 2:
        ours, baseline = measured.values()
        result["difference"] = {key: ours[key].minus(baseline[key]).summary() for key in ours}
    first = next(iter(sources.values()))
    base = first.policy.base if isinstance(first, PolicySource) else None
    if rows := paper_numbers.before_and_after(2, base or ""):
        result["paper"] = {"policy": base, **dict(zip(("base", "trained"), rows.values(), strict=True))}
    return {**result, "warnings": warnings + late}


def _protocol(
    identity: dict[str, Any],
    sources: dict[str, PolicySource | ImageSet],
    stores: dict[str, FeatureStore],
    found: ReferenceFile,
    network: Inception,
) -> dict[str, Any]:
    """Everything that a reader of the figures needs to repeat or to compare them."""
    sets = {}
    for name, source in sources.items():
        hashes = hashlib.sha256(stores[name].read(HASHES).numpy().tobytes()).hexdigest()
        sets[name] = {"images": source.count, "image_size": list(source.size), "images_sha256": hashes}
        if isinstance(source, PolicySource):
            own = source.settings
            sets[name]["seeds"] = [own.image_seed(0), own.image_seed(own.n - 1)]
        sets[name] |= identity["measured"][name]
        order = "as they come" if keeps_order(source) else "shuffled by a fixed seed"
        sets[name]["inception_score_order"] = f"{order}, splits of {SPLIT_SIZE}"
    return {
        "measured": sets,
        "settings": identity["settings"],
        "reference": found.protocol(),
        "inception": {"weights": network.fingerprint, "package": network.package, "resize": "TensorFlow 1, to 299"},
        "neighbours": NEIGHBOURS,
        "errors": ERRORS,
        "versions": {"argrpo": __version__, "torch": torch.__version__, "torch-fidelity": network.package.split()[-1]},
    }
