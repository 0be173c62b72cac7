"""`--diversity`: features of networks beside the columns of every benchmark, kept, resumed and reported."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from argrpo_cli.cli.app import run as command
from argrpo_cli.evals import benchmark as b
from argrpo_cli.evals import diversity as d
from argrpo_cli.evals import diversity_columns, diversity_networks
from argrpo_cli.evals.diversity_networks import FeatureNetwork, check_networks, load_features
from argrpo_cli.evals.imagenet import ImageNet
from argrpo_cli.evals.tables import read_results, sections
from argrpo_cli.images import read_image
from argrpo_cli.networks.dinov2 import MEAN, STD, load_dinov2
from argrpo_cli.shapes import Result
from argrpo_cli.system.errors import UserError
from tests.captioned import save_captioned_policy
from tests.evals.stub_inception import StubInception, install
from tests.evals.test_benchmark import Brightness
from tests.evals.test_imagenet import save_pictures
from tests.training.tiny import save_tiny_policy

WITH_BASE = ["distance", "vendi_within", "vendi", "recall", "coverage"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    return [str(save_captioned_policy(folder / str(seed) / "mine", seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    one, two = (save_tiny_policy(folder / name) for name in ("one", "two"))
    return [str(one), str(two)]


@pytest.fixture
def thumbs(monkeypatch):
    """A network whose features are the means of 16 tiles; how many images it has seen."""
    seen = []

    def features(images):
        seen.append(len(images))
        return nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 255

    network = FeatureNetwork("nano-judge", "tiles", features, "0123456789abcdef")
    monkeypatch.setattr(diversity_columns, "load_features", lambda name, device: network)
    return seen


def drawbench(policies, prompts, out, *more):
    asked = ["--policy", policies[0], *(["--baseline", policies[1]] if len(policies) > 1 else [])]
    asked += ["--prompts", str(prompts), "--n", "3", "--columns", "nano-quality", "--batch-size", "4"]
    return command(["eval", "drawbench", *asked, "--device", "cpu", "--out", str(out), *more])


def test_the_columns_are_the_statistics_of_the_networks_features(captioned, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no label is broken
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a dog\na photo of two cars\n")
    assert drawbench(captioned, prompts, tmp_path / "o", "--diversity", "nano-clip, nano-judge") == 0
    result = Result.load(tmp_path / "o" / "summary.json")
    names = ("nano-clip", "nano-judge")
    assert list(result.columns) == ["nano-quality", *(f"{name}/{key}" for name in names for key in WITH_BASE)]
    own, base = result.rows.values()
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for name in names:
        network = load_features(name)
        first, second = (
            network.features(torch.stack([torch.from_numpy(read_image(path)) for path in sorted(folder.glob("*.png"))]))
            for folder in (tmp_path / "o" / row / "images" for row in result.rows)
        )
        for row, features in ((own, first), (base, second)):
            assert row[f"{name}/distance"].value == pytest.approx(d.distance_within(features, groups).value, rel=1e-4)
            assert row[f"{name}/vendi_within"].value == pytest.approx(d.vendi_within(features, groups).value, rel=1e-4)
            assert row[f"{name}/vendi"].value == pytest.approx(d.vendi_of_all(features, groups).value, rel=1e-4)
            assert row[f"{name}/vendi"].error > 0 and row[f"{name}/distance"].count == 6
        assert own[f"{name}/recall"].value == d.recall(first, second, groups).value
        assert own[f"{name}/coverage"].value == d.coverage(first, second, groups).value
        assert f"{name}/recall" not in base
        paired = d.distance_within(first, groups).minus(d.distance_within(second, groups))
        assert result.difference[f"{name}/distance"].error == pytest.approx(paired.error, rel=1e-3)
        assert result.protocol["diversity"][name]["weights"] == network.fingerprint
    told = capsys.readouterr().out
    assert "nano-judge" in told and "coverage of the" in told
    titles = [one.title for one in sections(read_results([tmp_path / "o"]))]
    assert titles == ["DrawBench (table 4)", *(f"DrawBench (table 4), diversity, {name}" for name in names)]


def test_features_are_kept_and_an_interrupted_look_goes_on(tiny, tmp_path, thumbs, monkeypatch):
    def run(out, **rest):
        return b.run(Brightness(), tiny, out, device="cpu", n=3, batch_size=5, diversity=["nano-judge"], **rest)

    whole = run(tmp_path / "whole")
    assert thumbs == [5, 5, 2] * 2
    (row, _), groups = whole.rows.values(), 4
    assert row["nano-judge/recall"].value == row["nano-judge/coverage"].value == 1, "of the same weights and seeds"
    assert row["nano-judge/distance"].count == groups * 3 and whole.difference["nano-judge/vendi"].value == 0
    load, left = diversity_columns.load_features, [5, 5, 2, 5]

    def breaking(name, device):
        network = load(name, device)

        def features(images):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return network.features(images)

        return FeatureNetwork(name, network.source, features, network.fingerprint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(diversity_columns, "load_features", breaking)
        run(tmp_path / "o")
    thumbs.clear()
    assert run(tmp_path / "o") == whole and thumbs == [5, 2]
    thumbs.clear()
    assert run(tmp_path / "o") == whole and thumbs == []
    alone = b.run(Brightness(), tiny[:1], tmp_path / "1", device="cpu", n=1, diversity=["nano-judge"])
    assert list(alone.columns) == ["bright", "nano-judge/vendi"], "one image of each, and nothing to compare with"


def test_a_finished_folder_takes_it_later(tiny, tmp_path, thumbs, monkeypatch):
    monkeypatch.setattr(Brightness, "final", True, raising=False)

    def run(**rest):
        return b.run(Brightness(), tiny[:1], tmp_path / "o", device="cpu", batch_size=8, **rest)

    before = run()
    monkeypatch.setattr(Brightness, "measure", lambda *_: pytest.fail("measured again"))
    after = run(diversity=["nano-judge"])
    assert list(after.columns) == ["bright", "nano-judge/distance", "nano-judge/vendi_within", "nano-judge/vendi"]
    (own,), (earlier,) = after.rows.values(), before.rows.values()
    assert own["bright"] == earlier["bright"] and own["nano-judge/vendi"].value > 1 and thumbs == [8]
    assert Result.load(tmp_path / "o" / "summary.json") == after


def test_imagenets_images_are_looked_at_while_they_are_there(tiny, tmp_path, thumbs, monkeypatch):
    network = StubInception()
    install(network, monkeypatch.setattr)
    reference = str(save_pictures(tmp_path / "reference", 8, seed=1))

    def run(out, names=("nano-judge",), **options):
        benchmark = ImageNet(reference=reference, **options)
        return b.run(benchmark, tiny, out, device="cpu", n=12, batch_size=5, diversity=names)

    whole = run(tmp_path / "whole", keep_features=True, keep_images=True)
    row = next(iter(whole.rows.values()))
    assert [key for key in row if "/" in key] == [
        f"nano-judge/{key}" for key in ("vendi", *WITH_BASE[:2], *WITH_BASE[3:])
    ]
    folder = tmp_path / "whole" / next(iter(whole.rows))
    pictures = [torch.from_numpy(read_image(path)) for path in sorted((folder / "images").iterdir())]
    features = nn.functional.adaptive_avg_pool2d(torch.stack(pictures).float(), 4).flatten(1) / 255
    groups = torch.arange(12) // 3  # files are named by class
    assert row["nano-judge/distance"].value == pytest.approx(d.distance_within(features, groups).value, rel=1e-5)
    assert (folder / "diversity").is_dir()
    look = network.features

    def breaking(images):
        if len(network.batches) == 6 + 2 + 5:  # of the first run, the reference once more, and five of six
            raise KeyboardInterrupt
        return look(images)

    network.batches.clear()
    network.batches += [0] * 8
    network.features = breaking
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "o")
    network.features = look
    assert run(tmp_path / "o").rows == whole.rows
    assert not list((tmp_path / "o").rglob("*.safetensors"))
    thumbs.clear()
    assert run(tmp_path / "o").rows == whole.rows and not thumbs
    with pytest.raises(UserError, match=r"holds an evaluation of something else \(diversity\)"):
        run(tmp_path / "o", ("nano-judge", "nano-clip"))


def test_dinov2_is_transformers_own_on_normalised_pixels(tmp_path):
    """A tiny one of the same architecture at random, saved as published ones are."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    theirs = Dinov2Model(config).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "dino")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    with torch.no_grad():
        expected = theirs((images / 255 - mean) / std).last_hidden_state[:, 0]
    check_networks([f"dinov2={tmp_path / 'dino'}"])
    assert load_features(f"dinov2={tmp_path / 'dino'}").name == "dinov2"
    ours = load_dinov2(str(tmp_path / "dino"))
    assert torch.allclose(ours.features(images), expected, atol=1e-5) and expected.std() > 0.1
    assert ours.features(images[:, :, :40, :90]).shape == (2, 16)
    text = (tmp_path / "dino" / "config.json").read_text()
    (tmp_path / "dino" / "config.json").write_text(text.replace('"dinov2"', '"vit"'))
    with pytest.raises(UserError, match="holds a 'vit' model; expected 'dinov2'"):
        load_dinov2(str(tmp_path / "dino"))


def test_dreamsim_is_taken_from_its_package(monkeypatch):
    """A stand-in of the package's interface: an embedding of pixels in [0, 1] that drops the dimension of one image."""

    class Network(nn.Linear):
        def embed(self, pixels):
            assert pixels.shape[1:] == (3, 224, 224) and pixels.min() >= 0 and pixels.max() <= 1
            return self(pixels.mean((2, 3))).squeeze()

    torch.manual_seed(0)
    package = types.ModuleType("dreamsim")
    package.__spec__ = types.SimpleNamespace()
    package.dreamsim = lambda pretrained, device, cache_dir: (Network(3, 5), None)
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    check_networks(["dreamsim"])
    network = load_features("dreamsim")
    one = network.features(torch.full((1, 3, 64, 64), 51, dtype=torch.uint8))
    assert one.shape == (1, 5) and len(network.fingerprint) == 16
    package.dreamsim = lambda **_: 1 / 0
    with pytest.raises(UserError, match="dreamsim: its package cannot load it: division by zero"):
        load_features("dreamsim")


def test_clip_is_the_network_of_the_reward(monkeypatch):
    asked = []

    class Clip:
        network, image_features = nn.Linear(2, 2), staticmethod(lambda images: images.float())

    monkeypatch.setattr("argrpo_cli.networks.clip.load_open_clip", lambda *given: asked.append(given[:4]) or Clip)
    assert load_features("clip").source.startswith("CLIP ViT-B/32")
    load_features("clip=weights.safetensors")
    assert asked == [
        ("ViT-B-32-quickgelu", "openai", None, "cpu"),
        ("ViT-B-32-quickgelu", "openai", Path("weights.safetensors"), "cpu"),
    ]


def no_hub():
    raise ConnectionError("the hub is not reached (h: no route)")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("clip,dino", "--diversity 'dino' is unknown; there are clip, dinov2, dreamsim, nano-clip, nano-judge"),
        ("clip,clip", "--diversity names 'clip' twice"),
        ("dinov2,dinov2=absent", "--diversity names 'dinov2' twice"),
        ("dinov2=absent", "--diversity dinov2=absent: no such file or folder"),
        ("nano-clip=.", "--diversity nano-clip=.: nano-clip takes no files"),
        (
            "dinov2",
            "cannot fetch model.safetensors of facebook/dinov2-large: the hub is not reached (h: no route)",
        ),
        ("nano-judge,clip", "and give it: --diversity clip=PATH"),
        (",", "--diversity is empty; name at least one of clip"),
        ("dreamsim", "--diversity dreamsim needs its package; install it (pip install dreamsim), or leave it out"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(asked, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diversity_networks, "find_spec", lambda name: None)
    monkeypatch.setattr(diversity_networks, "in_cache", lambda repo: False)
    monkeypatch.setattr("argrpo_cli.system.files.is_cached", lambda *_: False)
    monkeypatch.setattr("argrpo_cli.system.hub.require_hub", no_hub)
    assert command(["eval", "geneval", "--diversity", asked, "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_finished_pictures_and_too_few_images_are_refused(captioned, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    assert command(["eval", "geneval", "--images", str(tmp_path / "pictures"), "--diversity", "clip"]) == 2
    assert "--images measures finished pictures; leave out --diversity" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a dog\n")
    assert drawbench(captioned, prompts, tmp_path / "o", "--diversity", "nano-judge") == 2
    assert "--diversity against a baseline needs at least 6 images; there are 3" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
