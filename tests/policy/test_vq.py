"""The image tokenizer against the published network with formula weights, VQ-16 and VQ-8 at their real size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from argrpo_cli.policy.llamagen.config import VQConfig
from argrpo_cli.policy.llamagen.pretrained import VQModel
from argrpo_cli.policy.llamagen.vq import from_uint8, to_uint8
from tests.formula import formula_weights

DATA = Path(__file__).parents[1] / "data" / "policy"
MULTIPLIERS = {"VQ-8": [1, 2, 2, 4], "VQ-16": [1, 1, 2, 2, 4]}


@pytest.fixture(scope="module", params=["VQ-8", "VQ-16"])
def published(request):
    """The network filled by formula, and its golden inputs and outputs."""
    facts = json.loads((DATA / f"{request.param}.json").read_text())
    multipliers = MULTIPLIERS[request.param]
    model = VQModel(VQConfig(encoder_ch_mult=multipliers, decoder_ch_mult=multipliers)).eval()
    model.load_state_dict(formula_weights(facts["shapes"]), strict=True)
    golden = load_file(DATA / f"E_public_{request.param.lower().replace('-', '')}.safetensors")
    return model, golden, facts


def test_parameter_count_is_the_published_one(published):
    model, _, facts = published
    assert sum(p.numel() for p in model.parameters()) == facts["n_parameters"]


@torch.no_grad()
def test_encoding_equals_the_reference(published):
    model, golden, _ = published
    latent = model.latent(golden["in/images"])
    torch.testing.assert_close(latent, golden["out/enc_h"], atol=5e-5, rtol=0)
    indices = model.encode(golden["in/images"])
    assert indices.flatten().tolist() == golden["out/enc_indices"].tolist()
    height, width = latent.shape[2:]
    entries = model.quantize.entries(indices, height, width)
    torch.testing.assert_close(entries, golden["out/enc_quant"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_decoding_equals_the_reference(published):
    model, golden, _ = published
    batch = golden["out/decoded"].shape[0]
    decoded = model.decode_tokens(golden["in/codes"].view(batch, -1))
    torch.testing.assert_close(decoded, golden["out/decoded"], atol=5e-5, rtol=0)
    torch.testing.assert_close(model(golden["in/images"]), golden["out/recon"], atol=5e-5, rtol=0)
    published_bytes = golden["out/decoded_uint8"].permute(0, 3, 1, 2).int()
    assert (to_uint8(decoded).int() - published_bytes).abs().max() <= 1


def small_model() -> VQModel:
    torch.manual_seed(0)
    config = VQConfig(
        codebook_size=32,
        ch=32,
        encoder_ch_mult=[1, 2],
        decoder_ch_mult=[1, 2],
        num_res_blocks=1,
        z_channels=32,
        patch_size=4,
    )
    return VQModel(config).eval()


@torch.no_grad()
def test_folded_network_keeps_pixel_places():
    """With patch_size 4 the first layer sees a change of pixels in their cell and its neighbours only."""
    model = small_model()
    images = torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 20:24, 4:8] = 1.0  # folded row 5, column 1
    seen: list[torch.Tensor] = []
    model.encoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output))
    shapes = {model.latent(picture).shape for picture in (images, changed)}
    assert model.config.downsample == 8 and shapes == {(1, 8, 4, 4)}
    rows, columns = (seen[1] - seen[0]).abs().sum(1)[0].nonzero(as_tuple=True)
    assert set(rows.tolist()) == {4, 5, 6} and set(columns.tolist()) == {0, 1, 2}


@torch.no_grad()
def test_codes_of_any_length_are_compared_by_direction():
    model = small_model()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    before_tokens, before = model.encode(images), model(images)
    model.quantize.embedding.weight.mul_(torch.rand(32, 1) * 5 + 0.1)
    assert torch.equal(model.encode(images), before_tokens)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_save_and_load_round_trip(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(32, (2, 16))
    assert torch.equal(loaded.decode_tokens(tokens), model.decode_tokens(tokens))


def test_bytes_and_floats_agree():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    outside = to_uint8(torch.tensor([-3.0, 3.0, 0.0]))
    assert outside.tolist() == [0, 255, 128]


@torch.no_grad()
def test_tokens_that_make_no_square_are_refused():
    with pytest.raises(ValueError, match="15 tokens"):
        small_model().decode_tokens(torch.zeros(1, 15, dtype=torch.int64))


def test_unit_codebook_is_what_is_looked_up():
    quantizer = small_model().quantize
    entries = quantizer.entries(torch.arange(16).view(1, 16), 4, 4)
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(1, 4, 4))
    expected = F.normalize(quantizer.embedding.weight[:16], dim=-1)
    torch.testing.assert_close(entries[0].flatten(1).t(), expected)
