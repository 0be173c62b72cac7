"""Inception's features: torch-fidelity's own numbers, the spatial ones at their place, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from argrpo_cli.networks import inception as module
from argrpo_cli.networks.inception import load_inception
from argrpo_cli.system.errors import UserError
from tests.evals.inception_weights import empty_inception, save_random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def published(weights, images):
    """Pool features, logits without bias, and the block of sFID, [B, 192, 17, 17], of torch-fidelity's network."""
    network = empty_inception().eval()
    torch.nn.Module.load_state_dict(network, torch.load(weights))
    caught = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: caught.append(call[2].clone()))
    with torch.no_grad():
        return *network(images), caught[0]


@pytest.mark.parametrize("one_step", [True, False])
def test_features_are_those_of_torch_fidelity(weights, images, published, monkeypatch, one_step):
    if not one_step:
        monkeypatch.setattr(module, "_one_step", lambda: False)
    pool, logits, block = published
    found = load_inception(weights).features(images)
    torch.testing.assert_close(found.pool, pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    # TensorFlow lays 17 x 17 places with 7 channels each in a row.
    expected = torch.stack([block[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], 1)
    torch.testing.assert_close(found.spatial, expected, rtol=1e-5, atol=1e-5)
    assert found.spatial.shape == (3, 2023) and found.spatial.min() == 0, "after the ReLU"


def test_other_weights_have_another_fingerprint(weights, tmp_path):
    other = save_random_inception(tmp_path / "other.pth", seed=1)
    first, again, third = load_inception(weights), load_inception(weights), load_inception(other)
    assert first.fingerprint == again.fingerprint != third.fingerprint
    assert first.package.startswith("torch-fidelity ")


def test_files_that_are_no_weights_of_inception_are_refused(tmp_path):
    with pytest.raises(UserError, match="weights not found"):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(UserError, match=r"damaged\.pth is not a readable file of weights"):
        load_inception(tmp_path / "damaged.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"weights do not fit Inception: .*other\.pth"):
        load_inception(tmp_path / "other.pth")


def test_without_a_connection_the_mend_is_named(monkeypatch):
    from urllib.error import URLError

    def unreachable(url, **options):
        raise URLError("name resolution failed")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"cannot fetch .*name resolution failed.*download https://.*--inception"):
        load_inception()


def test_without_torch_fidelity_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install 'argrpo-cli\[eval\]'"):
        load_inception()
