"""`argrpo eval imagenet`: torch-fidelity's own figures, resuming, sharing, references of every kind, warnings."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo_cli.cli.app import run
from argrpo_cli.evals import imagenet_reference
from argrpo_cli.evals.benchmark import run as run_benchmark
from argrpo_cli.evals.fidelity import Gaussian
from argrpo_cli.evals.imagenet import ImageNet, eval_size, protocol_warnings, save_reference_statistics
from argrpo_cli.evals.imagenet_reference import Features, ReferenceFile
from argrpo_cli.images import ImageSet, Item
from argrpo_cli.shapes import Condition, Result, Sampling, Shot
from argrpo_cli.system import files
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.processes import ALONE
from tests.evals.inception_weights import save_random_inception
from tests.evals.stub_inception import POOL_WIDTH, StubInception, install
from tests.together import together
from tests.training.tiny import CLASSES, IMAGE_SIZE, save_tiny_policy

N, BATCH = 22, 4


def save_pictures(folder: Path, count: int, seed: int, size: int = IMAGE_SIZE) -> Path:
    """Noise on one colour each, so that they differ as pictures do."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    colours, noise = rng.integers(0, 200, (count, 1, 1, 3)), rng.integers(0, 56, (count, size, size, 3))
    pixels = (colours + noise).astype(np.uint8)
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny"))


@pytest.fixture
def reference(tmp_path):
    return str(save_pictures(tmp_path / "reference", 12, seed=1))


@pytest.fixture
def stub(monkeypatch):
    """Inception replaced by a quick network of fewer numbers, and shards of two batches."""
    network = StubInception()
    install(network, monkeypatch.setattr)
    return network


def evaluate(policies, reference, out, sampling=None, n=N, seed=0, warn=lambda text: None, batch=BATCH, **options):
    """Of one policy or several."""
    policies = [policies] if isinstance(policies, str) else policies
    drawing = {"sampling": sampling, "n": n, "seed": seed, "batch_size": batch, "device": "cpu"}
    return run_benchmark(ImageNet(reference=reference, **options), policies, out, warn=warn, **drawing)


def measure(pictures, reference, out, batch=BATCH, warn=print, **options):
    """Of finished pictures."""
    benchmark = ImageNet(reference=str(reference), **options)
    return run_benchmark(benchmark, [], out, images=pictures, batch_size=batch, device="cpu", warn=warn)


def first(result) -> dict[str, float]:
    """Of the first row, the values."""
    return {key: one.value for key, one in next(iter(result.rows.values())).items()}


def test_figures_are_torch_fidelitys_own(tmp_path):
    """IS, FID, precision and recall of the same pictures by the same weights, two ways."""
    from torch_fidelity import calculate_metrics

    weights = save_random_inception(tmp_path / "inception.pth")
    ours, theirs = save_pictures(tmp_path / "ours", 8, 1, 48), save_pictures(tmp_path / "theirs", 6, 2, 48)
    expected = calculate_metrics(
        input1=str(ours), input2=str(theirs), isc=True, fid=True, prc=True, isc_splits=1, cuda=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    found = first(measure(ours, theirs, tmp_path / "out", batch=5, inception=weights))
    assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    for key in ("precision", "recall"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6)
    assert expected["inception_score_mean"] > 1.05 and expected["frechet_inception_distance"] > 0.01, "not trivial"


def test_an_interrupted_evaluation_loses_no_batch_and_ends_with_the_same_figures(stub, policy, reference, tmp_path):
    evaluate(policy, reference, tmp_path / "whole")
    out, features, measured = tmp_path / "out", stub.features, []

    def interrupted(images):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(len(images))
        return features(images)

    stub.features = interrupted
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, reference, out)
    stub.features = features
    kept = sorted(out.rglob("*.safetensors"))
    assert len(kept) == 3 and not (out / "summary.json").exists()
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # torn, as by a power cut
    (kept[0].parent / ".tmp-1-0000016.safetensors").write_bytes(b"half")
    stub.batches.clear()
    again = evaluate(policy, reference, out, batch=7)
    assert stub.batches == [4, 4, 4, 2], "what was there, but for the torn batch, is not drawn again"
    summaries = [(folder / "summary.json").read_text() for folder in (out, tmp_path / "whole")]
    assert summaries[0] == summaries[1]
    stub.batches.clear()
    assert evaluate(policy, reference, out) == again == Result.load(tmp_path / "whole" / "summary.json")
    assert stub.batches == [], "asked again, it answers at once"
    assert sorted(path.name for path in out.iterdir()) == ["settings.json", "summary.json"]


def test_two_processes_find_what_one_does(stub, policy, reference, tmp_path):
    alone = evaluate(policy, reference, tmp_path / "alone" / "out")
    asked = ["eval", "imagenet", "--policy", policy, "--total", str(N), "--reference", reference, "--device", "cpu"]
    done = together([*asked, "--batch-size", str(BATCH), "--out", str(tmp_path / "out")], tmp_path / "printed")
    assert done.codes == [0, 0], done.err
    shared = Result.load(tmp_path / "out" / "summary.json")
    assert shared.protocol["measured"] == alone.protocol["measured"], "the same images"
    assert first(shared) == pytest.approx(first(alone), rel=1e-6)
    assert done.out.count("figures, warnings and protocol") == 1, "one of them reports"


def test_images_are_in_memory_a_few_batches_at_a_time(stub, tmp_path):
    alive, most = weakref.WeakSet(), []

    def read(batch):
        images = torch.zeros(len(batch), 3, 8, 8, dtype=torch.uint8)
        alive.add(images)
        most.append(len(alive))
        return images

    items = [Shot(Condition(""), index, f"{index}.png") for index in range(200)]
    features = Features(tmp_path, items, stub, BATCH)
    features.extract(read, "test", ALONE, ahead=True)
    assert len(most) == 50 and max(most) <= 3
    assert features.all("pool").shape == (200, POOL_WIDTH)


def test_a_baseline_draws_the_same_noise_and_the_difference_is_paired(stub, policy, reference, tmp_path):
    copy = save_tiny_policy(tmp_path / "copy")
    result = evaluate([policy, str(copy)], reference, tmp_path / "out")
    assert list(result.difference) == ["inception_score", "fid", "sfid", "precision", "recall"]
    for one in result.difference.values():
        assert one.value == 0 and one.error == pytest.approx(0, abs=1e-9), "the same weights"
    with pytest.raises(UserError, match="are the same policy"):
        evaluate([policy, policy], reference, tmp_path / "other")


def test_kept_pictures_measured_as_a_folder_have_the_same_distances(stub, policy, reference, tmp_path):
    drawn = evaluate(policy, reference, tmp_path / "out", keep_images=True)
    pictures = next((tmp_path / "out").glob("*/images"))
    assert len(list(pictures.iterdir())) == N
    again = first(measure(pictures, reference, tmp_path / "again"))
    for key in ("fid", "sfid", "precision", "recall"):
        assert again[key] == pytest.approx(first(drawn)[key], rel=1e-5)


def test_every_image_has_a_seed_and_classes_come_in_turn(stub, policy, reference, tmp_path):
    result = evaluate(policy, reference, tmp_path / "out", keep_images=True, n=8, seed=3)
    names = sorted(path.name for path in next((tmp_path / "out").glob("*/images")).iterdir())
    assert [int(name[:3]) for name in names] == [c for c in range(CLASSES) for _ in range(8 // CLASSES)]
    assert len({name[-14:] for name in names}) == 8
    assert next(iter(result.protocol["measured"].values()))["seeds"] == [2_000_300_000, 2_000_300_007]


@pytest.mark.parametrize(
    ("drawn", "asked", "seen"), [(384, None, 256), (256, None, 256), (64, None, 64), (384, 96, 96)]
)
def test_larger_images_reach_inception_in_256_pixels(drawn, asked, seen):
    """As LlamaGen scales those of its models for 384."""
    assert eval_size(drawn, asked) == seen


def test_the_protocol_is_in_the_result(stub, policy, reference, tmp_path):
    protocol = evaluate(policy, reference, tmp_path / "out").protocol
    assert protocol["sampling"] == asdict(Sampling()) | {"seed": 0} and protocol["images"] == N
    assert protocol["reference"]["images"] == 12 and len(protocol["reference"]["sha256"]) == 64
    assert protocol["inception"]["weights"] == StubInception.fingerprint
    assert set(protocol["versions"]) == {"argrpo", "python", "torch", "torch-fidelity"}
    own = next(iter(protocol["measured"].values()))
    assert {"weights", "base", "images_sha256", "image_size", "seeds", "inception_score_order"} <= set(own)


class TestReferences:
    def test_saved_statistics_give_the_same_fid_and_no_precision(self, stub, policy, reference, tmp_path):
        full = evaluate(policy, reference, tmp_path / "full")
        save_reference_statistics(reference, tmp_path / "saved.npz", batch_size=BATCH, device="cpu")
        assert {path.name for path in tmp_path.glob("saved*")} == {"saved.npz"}
        told: list[str] = []
        result = evaluate(policy, str(tmp_path / "saved.npz"), tmp_path / "out", warn=told.append)
        assert set(first(result)) == {"inception_score", "fid", "sfid"}
        for key in ("fid", "sfid"):
            assert first(result)[key] == pytest.approx(first(full)[key], rel=1e-5)
        assert any("precision and recall are not measured" in text for text in told)

    def test_of_images_and_statistics_distances_take_the_statistics(self, stub, policy, reference, tmp_path):
        other = save_pictures(tmp_path / "other", 9, seed=5)
        save_reference_statistics(str(other), tmp_path / "other.npz", device="cpu")
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(reference).iterdir())])
        np.savez(tmp_path / "adm.npz", arr_0=pixels, **np.load(tmp_path / "other.npz"))
        both, of_images, of_other = (
            first(evaluate(policy, str(given), tmp_path / f"out-{index}"))
            for index, given in enumerate((tmp_path / "adm.npz", reference, other))
        )
        for key, like in (("fid", of_other), ("sfid", of_other), ("precision", of_images), ("recall", of_images)):
            assert both[key] == pytest.approx(like[key], rel=1e-5), key
        assert of_images["fid"] != pytest.approx(of_other["fid"], rel=1e-3)

    def test_what_inception_made_of_it_is_kept_beside_the_folder(self, stub, policy, reference, tmp_path):
        evaluate(policy, reference, tmp_path / "one")
        stub.batches.clear()
        evaluate(policy, reference, tmp_path / "two")
        assert sum(stub.batches) == N
        kept = next((files.user_cache() / "references").iterdir())
        kept.write_bytes(kept.read_bytes()[:1000])
        stub.batches.clear()
        evaluate(policy, reference, tmp_path / "three")
        assert sum(stub.batches) == N + 12, "a damaged one is made again"

    def test_a_cache_that_cannot_be_written_stops_nothing(self, stub, policy, reference, tmp_path, monkeypatch):
        kept = evaluate(policy, reference, tmp_path / "one")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        again = evaluate(policy, reference, tmp_path / "two")
        assert first(again) == pytest.approx(first(kept), rel=1e-6)

    def test_a_reference_at_another_path_is_the_same(self, stub, policy, reference, tmp_path, monkeypatch):
        evaluate(policy, reference, tmp_path / "out")
        result = Result.load(tmp_path / "out" / "summary.json")
        monkeypatch.chdir(tmp_path)
        stub.batches.clear()
        assert evaluate(policy, "reference", tmp_path / "out") == result and not stub.batches

    @pytest.mark.parametrize(
        ("arrays", "complaint"),
        [
            ({"mu": np.zeros(64)}, "expected arr_0"),
            ({"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "5 numbers"),
            ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "needs at least 4"),
        ],
    )
    def test_what_is_none_is_refused_before_anything_is_drawn(self, stub, policy, tmp_path, arrays, complaint):
        np.savez(tmp_path / "odd.npz", **arrays)
        with pytest.raises(UserError, match=complaint):
            evaluate(policy, str(tmp_path / "odd.npz"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_adms_is_fetched_once_and_whole(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "served.npz").write_bytes(b"x" * 3000)
        url = (tmp_path / "served.npz").as_uri()
        fetched = imagenet_reference.fetch_adm(url)
        assert fetched.read_bytes() == b"x" * 3000
        (tmp_path / "served.npz").unlink()
        assert imagenet_reference.fetch_adm(url) == fetched
        fetched.unlink()
        with pytest.raises(UserError, match=r"cannot fetch file:.*give the file with --reference"):
            imagenet_reference.fetch_adm(url)
        assert list(fetched.parent.iterdir()) == []


class TestWarnings:
    def told(self, policy, reference, out, **options) -> str:
        texts: list[str] = []
        result = evaluate(policy, reference, out, warn=texts.append, **options)
        assert result.warnings == texts
        return "\n".join(texts)

    def test_every_departure_from_the_published_protocol_is_told(self, stub, policy, reference, tmp_path):
        text = self.told(policy, reference, tmp_path / "out", sampling={"cfg_scale": 4.0, "top_k": 5})
        for part in (
            f"{N} images; published figures are of 50,000", f"draws {CLASSES} classes", "not the same number of each",
            "8x8 pixels reach Inception", "--cfg-scale 4; the paper's table 2 has 2", "--top-k 5", "is not ADM's batch",
        ):  # fmt: skip
            assert part in text, part
        assert "--temperature" not in text

    def test_resized_images_are_told_apart_from_the_references(self, stub, policy, reference, tmp_path):
        plain, stub.features = stub.features, lambda images: plain(images[..., ::2, ::2])
        text = self.told(policy, reference, tmp_path / "out", resize=16)
        assert "16x16 pixels are compared with a reference of 8x8" in text

    def test_copies_and_images_of_the_reference_are_counted(self, stub, tmp_path):
        pictures = save_pictures(tmp_path / "pictures", 8, seed=1)
        (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
        told: list[str] = []
        measure(pictures, pictures, tmp_path / "out", warn=told.append)
        text = "\n".join(told)
        assert "1 of 9 images are copies" in text and "9 of 9 images are in the reference" in text
        assert "the very set that is measured" in text

    def test_an_npz_keeps_its_order_and_one_sorted_by_class_is_told(self, stub, reference, tmp_path, monkeypatch):
        monkeypatch.setattr("argrpo_cli.evals.imagenet.SPLIT_SIZE", 10)
        rng = np.random.default_rng(0)
        kinds = rng.integers(0, 256, (4, 8, 8, 3))
        pixels = np.clip(np.repeat(kinds, 10, 0) + rng.integers(-3, 4, (40, 8, 8, 3)), 0, 255).astype(np.uint8)
        found = {}
        (tmp_path / "folder").mkdir()
        for index, one in enumerate(pixels):
            Image.fromarray(one).save(tmp_path / "folder" / f"{index:02d}.png")
        for name, order in (("sorted", np.arange(40)), ("mixed", rng.permutation(40))):
            np.savez(tmp_path / f"{name}.npz", arr_0=pixels[order])
        for name in ("sorted.npz", "mixed.npz", "folder"):
            found[name] = measure(tmp_path / name, reference, tmp_path / f"of-{name}")
        assert any("sorted by class" in text for text in found["sorted.npz"].warnings)
        for name in ("mixed.npz", "folder"):
            assert not any("sorted by class" in text for text in found[name].warnings), name
        scores = {name: first(one)["inception_score"] - 1 for name, one in found.items()}
        assert scores["sorted.npz"] < 0.5 * min(scores["mixed.npz"], scores["folder"]), "a folder is shuffled"

    def test_a_finished_evaluation_asked_again_repeats_them_all(self, stub, tmp_path):
        pictures, told = save_pictures(tmp_path / "pictures", 8, seed=1), ([], [])
        for texts in told:
            measure(pictures, pictures, tmp_path / "out", warn=texts.append)
        assert told[0] == told[1] and "8 of 8 images are in the reference" in told[1][-1]

    def test_guidance_in_part_is_told_of_a_folder_that_sample_drew(self, stub, policy, reference, tmp_path):
        drawn = ["sample", "--policy", policy, "--per-class", "3", "--cfg-interval", "2", "--device", "cpu"]
        assert run([*drawn, "--out", str(tmp_path / "drawn")]) == 0
        told: list[str] = []
        measure(tmp_path / "drawn", reference, tmp_path / "out", warn=told.append)
        assert [text for text in told if text.startswith("--")] == ["--cfg-interval 2; the paper's table 2 has -1"]

    def test_a_published_protocol_is_met_without_a_word(self):
        items = [Item("", "", lambda: np.zeros((3, 256, 256), np.uint8))] * 50_000
        stored = (Gaussian(torch.zeros(1), torch.eye(1)),) * 2
        adm = ReferenceFile("adm-256", ImageSet(Path("adm.npz"), items[:10_000]), stored, "0")
        asked = 50_000, 1000, (256, 256), asdict(Sampling())
        assert protocol_warnings(*asked, adm) == []
        validation = ReferenceFile("val", ImageSet(Path("val"), items), None, "0")
        assert any("validation set" in text for text in protocol_warnings(*asked, validation))


class TestCommandLine:
    def test_prints_a_table_and_warns_on_standard_error(self, stub, policy, reference, tmp_path, capsys):
        arguments = ["eval", "imagenet", "--policy", policy, "--total", str(N), "--reference", reference]
        assert run([*arguments, "--batch-size", str(BATCH), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
        captured = capsys.readouterr()
        assert "sFID" in captured.out and f"{N} images" in captured.out
        assert f"WARNING: {N} images; published figures are of 50,000" in captured.err
        assert run([*arguments, "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        assert "holds an evaluation of something else (sampling.seed)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "nothing to measure"),
            (["--images", "x", "--cfg-scale", "3"], "leave out --cfg-scale"),
            (["--policy", "nano-c2i", "--n", "3"], "--n 3: give 5 to"),
            (["--policy", "nano-c2i", "--reference", "nowhere"], "no folder or .npz file nowhere"),
            (["--images", "nowhere", "--reference", "REFERENCE"], "no folder or .npz file nowhere"),
            (["--policy", "nano-t2i", "--reference", "REFERENCE"], "draws captions"),
        ],
    )
    def test_bad_input_is_one_line(self, stub, reference, tmp_path, capsys, arguments, complaint):
        given = [reference if one == "REFERENCE" else one for one in arguments]
        assert run(["eval", "imagenet", *given, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
