"""The full-size detector: its input, its post-processing against one written query by query, its weights."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from argrpo_cli.geneval import detector
from argrpo_cli.geneval.detector import (
    NOT_NEEDED,
    Mask2Former,
    build_mask2former,
    load_mask2former,
    measure_masks,
    postprocess,
    preprocess,
    resize_bytes,
    scaled_size,
)
from argrpo_cli.geneval.prompts import OBJECT_NAMES
from argrpo_cli.system.errors import UserError
from tests.geneval.goldens import DATA
from tests.geneval.mask2former_files import Widths, published_shapes

TINY = Widths(
    embed=16,
    depths=(1, 1, 1, 1),
    swin_heads=(1, 2, 2, 4),
    window=4,
    hidden=32,
    heads=2,
    encoder_layers=1,
    encoder_ffn=16,
    decoder_layers=1,
    decoder_ffn=16,
    queries=7,
)


def tiny_config(classes=80):
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=TINY.embed,
            depths=list(TINY.depths),
            num_heads=list(TINY.swin_heads),
            window_size=TINY.window,
            image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=7,
        num_labels=classes,
    )


def resized(image, height, width):
    """Bilinear, pixel centres at halves, float64 [H, W, ...]; written out to check the other."""
    for axis, size in ((0, height), (1, width)):
        length = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1,) + (1,) * (image.ndim - 1))
        moved = np.moveaxis(image, axis, 0)
        image = np.moveaxis(moved[low] * (1 - share) + moved[np.minimum(low + 1, length - 1)] * share, 0, axis)
    return image


def one_by_one(class_logits, mask_logits, padded, scaled, size):
    """The post-processing of one image in float64 and plain loops: (class, query, score, box, mask), best first."""
    exponentials = np.exp(class_logits - class_logits.max(1, keepdims=True))
    probability = exponentials / exponentials.sum(1, keepdims=True)
    pairs = [(probability[q, c], q, c) for q in range(len(class_logits)) for c in range(80)]
    rows = []
    for value, query, label in sorted(pairs, reverse=True)[:100]:
        logits = resized(resized(mask_logits[query], *padded)[: scaled[0], : scaled[1]], *size)
        mask = logits > 0
        inside = 1 / (1 + np.exp(-logits[mask]))
        y, x = np.nonzero(mask)
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1) if mask.any() else (0, 0, 0, 0)
        rows.append((OBJECT_NAMES[label], query, value * (inside.mean() if mask.any() else 0), box, mask))
    return rows


def assert_same(objects, expected):
    """An image's objects are those of `one_by_one`, class by class in the same order."""
    assert sum(len(found) for found in objects.detections.values()) == len(expected) == 100
    for name, found in objects.detections.items():
        wanted = [row for row in expected if row[0] == name]
        assert len(found) == len(wanted) and [detection.index for detection in found] == list(range(len(found)))
        for detection, (_, _, score, box, mask) in zip(found, wanted, strict=True):
            assert detection.score == pytest.approx(score, abs=1e-6)
            assert detection.box == box
            np.testing.assert_array_equal(objects.masks[name][detection.index].numpy(), mask)


def blobs(count, height, width, seed):
    """float32 [count, height, width]: a smooth hill each, one of them nowhere positive, one everywhere."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    middle = rng.uniform(0, 1, (count, 2)) * (height, width)
    distance = np.hypot(y - middle[:, :1, None], x - middle[:, 1:, None])
    logits = rng.uniform(2, 8, (count, 1, 1)) - distance + rng.normal(0, 0.3, (count, height, width))
    logits[0], logits[1] = -3 - distance[0], 3 + distance[1]
    return logits.astype(np.float32)


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((256, 256), (800, 800)),
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((300, 500), (800, 1333)),
        ((480, 640), (800, 1067)),  # 1066.67 is rounded to the nearest
        ((200, 1000), (267, 1333)),
    ],
)
def test_an_image_is_fitted_into_1333_by_800(size, seen):
    assert scaled_size(*size) == seen
    assert scaled_size(*size[::-1]) == seen[::-1]


def test_pictures_are_resized_as_opencv_resizes_them():
    with np.load(DATA / "mmdet.npz") as official:
        own = resize_bytes(torch.from_numpy(official["picture"]).permute(2, 0, 1)[None], 41, 64)
        np.testing.assert_array_equal(own[0].permute(1, 2, 0).numpy(), official["resized"])
    cv2 = pytest.importorskip("cv2")
    for size, seen in (((256, 256), (800, 800)), ((37, 61), (12, 200)), ((50, 40), (50, 40))):
        image = np.random.default_rng(size).integers(0, 256, (*size, 3), np.uint8)
        own = resize_bytes(torch.from_numpy(image).permute(2, 0, 1), *seen).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(own, cv2.resize(image, seen[::-1], interpolation=cv2.INTER_LINEAR))


def test_the_input_is_resized_padded_with_grey_to_multiples_of_32_and_normalised():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 50), np.uint8)
    pixels = preprocess(torch.from_numpy(images)).numpy()
    height, width = scaled_size(20, 50)
    assert (height, width) == (533, 1333) and pixels.shape == (2, 3, 544, 1344)
    mean, deviation = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    for image, own in zip(images, pixels, strict=True):
        back = own.transpose(1, 2, 0) * deviation + mean
        np.testing.assert_allclose(back, np.rint(back), atol=1e-3)
        np.testing.assert_allclose(np.concatenate([back[533:].ravel(), back[:, 1333:].ravel()]), 128, atol=1e-3)
        exact = resized(image.transpose(1, 2, 0).astype(np.float64), height, width)
        assert np.abs(back[:height, :width] - exact).max() < 2, "OpenCV's whole numbers lie a little lower"


@pytest.mark.parametrize("size", [(40, 56), (13, 90)])
def test_postprocessing_is_that_of_every_query_by_itself(size):
    rng = np.random.default_rng(1)
    class_logits = rng.normal(0, 2, (2, 9, 81)).astype(np.float32)
    class_logits[:, :, [2, 16]] += 3  # cars and dogs: queries with several likely classes, classes with several queries
    mask_logits = np.stack([blobs(9, 12, 18, seed) for seed in (2, 3)])
    padded, scaled = (48, 72), (45, 70)
    both = postprocess(torch.from_numpy(class_logits), torch.from_numpy(mask_logits), padded, scaled, size)
    assert len(both) == 2
    for objects, classes, masks in zip(both, class_logits, mask_logits, strict=True):
        assert_same(objects, one_by_one(classes.astype(np.float64), masks.astype(np.float64), padded, scaled, size))


def test_a_query_may_give_several_classes_and_an_empty_mask_scores_nothing():
    class_logits = torch.full((1, 3, 81), -20.0)
    class_logits[0, 0, [0, 15]] = 5.0  # a person and a cat, at equal odds
    class_logits[0, 1, 16] = 5.0  # a dog without a single pixel
    masks = torch.full((1, 3, 4, 4), -1.0)
    masks[0, 0, 1:3, 2:] = 1.0
    (objects,) = postprocess(class_logits, masks, (4, 4), (4, 4), (4, 4))
    inside = 1 / (1 + np.exp(-1))
    for name in ("person", "cat"):
        best = objects.detections[name][0]
        assert best.score == pytest.approx(0.5 * inside, abs=1e-5) and best.box == (2, 1, 4, 3)
        assert objects.masks[name][0].sum() == 4
    assert objects.detections["dog"][0].score == 0 and objects.detections["dog"][0].box == (0, 0, 0, 0)
    assert not objects.masks["dog"][0].any()


def test_memory_for_masks_is_bounded_and_changes_nothing(monkeypatch):
    logits = torch.from_numpy(blobs(11, 8, 8, 5))
    whole = measure_masks(logits, (32, 32), (30, 32), (20, 24))
    taken, interpolate = [], detector.F.interpolate
    monkeypatch.setattr(detector, "MASK_PIXELS", 3 * 32 * 32 + 5)
    monkeypatch.setattr(
        detector.F, "interpolate", lambda x, *rest, **more: taken.append(x.shape[1]) or interpolate(x, *rest, **more)
    )
    for own, other in zip(measure_masks(logits, (32, 32), (30, 32), (20, 24)), whole, strict=True):
        torch.testing.assert_close(own, other)
    assert max(taken) == 3 and sum(taken) == 22


def test_detection_with_a_network_is_that_of_its_outputs_image_by_image(monkeypatch):
    monkeypatch.setattr(detector, "SHORT_EDGE", 72)
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(tiny_config()).eval()
    with torch.no_grad():
        network.class_predictor.weight.mul_(30)
        images = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8)
        found = list(Mask2Former(network, batch_size=2).detect(images))
        assert len(found) == 3
        for image, objects in zip(images, found, strict=True):
            pixels = preprocess(image[None])
            assert pixels.shape[-2:] == (96, 96)
            output = network(pixel_values=pixels)
            classes, masks = output.class_queries_logits[0].double(), output.masks_queries_logits[0].double()
            expected = one_by_one(classes.numpy(), masks.numpy(), (96, 96), (72, 96), (48, 64))
            scores = sorted((one.score for rows in objects.detections.values() for one in rows), reverse=True)
            assert scores == pytest.approx(sorted((row[2] for row in expected), reverse=True), abs=1e-4)
            assert {name: len(rows) for name, rows in objects.detections.items()} == Counter(row[0] for row in expected)


def test_images_are_looked_at_batch_by_batch_as_they_are_asked_for():
    seen = []

    class Network(nn.Module):
        def forward(self, pixel_values):
            seen.append(len(pixel_values))
            shape = (len(pixel_values), 2)
            return SimpleNamespace(
                class_queries_logits=torch.zeros(*shape, 81), masks_queries_logits=torch.ones(*shape, 4, 4)
            )

    objects = Mask2Former(Network(), batch_size=2).detect(torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    assert next(objects).detections and seen == [2]
    assert len(list(objects)) == 4 and seen == [2, 2, 1]


def test_classes_are_cocos_in_its_order_under_genevals_names():
    models = pytest.importorskip("torchvision.models.detection")
    names = models.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = [name for name in names if name not in ("__background__", "N/A")]
    renamed = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    assert len(coco) == 80 and tuple(renamed.get(name, name) for name in coco) == OBJECT_NAMES


def test_the_real_network_has_the_published_shapes():
    with torch.device("meta"):
        own = build_mask2former().state_dict()
    own = {key: tuple(value.shape) for key, value in own.items() if not key.endswith(NOT_NEEDED)}
    published = {key: shape for key, shape in published_shapes().items() if not key.endswith(NOT_NEEDED)}
    assert Counter(own.values()) == Counter(published.values())
    backbone = "model.pixel_level_module.encoder"
    same = {key: shape for key, shape in published.items() if not key.startswith(backbone)}  # transformers 5 renamed it
    assert same == {key: shape for key, shape in own.items() if not key.startswith(backbone)}


@pytest.fixture
def published(tmp_path):
    """A tiny network's folder in the published layout, and its state."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(TINY)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key in state:
        if key.endswith("relative_position_index"):
            state[key] = torch.zeros(shapes[key], dtype=torch.int64)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tiny_config().save_pretrained(tmp_path)
    return tmp_path, state


def test_a_published_file_fills_the_whole_network(published):
    folder, state = published
    network = load_mask2former(weights=folder).network
    own = {key: value for key, value in network.state_dict().items() if not key.endswith(NOT_NEEDED)}
    given = [value for key, value in state.items() if not key.endswith(NOT_NEEDED)]
    assert sorted(value.double().sum().item() for value in own.values()) == pytest.approx(
        sorted(value.double().sum().item() for value in given)
    )
    query = "encoder.layers.2.blocks.0.attention.self.query.weight"
    (found,) = (value for key, value in own.items() if "layers.2.blocks.0" in key and key.endswith("q_proj.weight"))
    assert torch.equal(found, state[f"model.pixel_level_module.encoder.{query}"])
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_that_do_not_fit_are_told_in_one_line(published, capfd):
    folder, state = published
    key = "class_predictor.weight"
    save_file({k: v for k, v in state.items() if k != key}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys such as class_predictor\.weight"):
        load_mask2former(weights=folder)
    save_file(state | {key: torch.zeros(5, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"class_predictor\.weight is \[5, 32\], config\.json says \[81, 32\]"):
        load_mask2former(weights=folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot load ") as caught:
        load_mask2former(weights=folder)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights not found: .*model\.safetensors; give a folder with config\.json"):
        load_mask2former(weights=folder)
    assert capfd.readouterr() == ("", "")


def test_another_number_of_classes_is_refused(tmp_path):
    config = tiny_config(classes=133)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["id2label"]) == 133
    with pytest.raises(UserError, match="tells 133 classes apart, expected COCO's 80"):
        load_mask2former(weights=tmp_path)
