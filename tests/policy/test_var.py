"""VAR against another implementation of it: the network, guidance, drawing with a cache, the tokenizer, its files."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.llamagen.vq import to_uint8
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.policy.protocol import Card
from argrpo_cli.policy.published import POLICIES
from argrpo_cli.policy.tokens import scale_weights
from argrpo_cli.policy.var.model import guidance_of_scales
from argrpo_cli.policy.var.policy import VAR
from argrpo_cli.policy.var.sample import new_cache
from argrpo_cli.policy.var.vq import ResidualQuantizer, phi_of_scales
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from tests.policy import var_reference as reference

SCALES, CODES, CLASSES = (1, 2, 3, 4), 24, 5
TOKENS = 30
VAE = "vae_ch160v4096z32.pth"  # beside a policy's file no network is asked
KINDS = {  # modulation of the blocks' own or shared, attention of unit vectors or plain (whose heads are 64 wide)
    "own, cosine": {},
    "own, plain": {"cosine": False, "heads": 1},
    "shared, cosine": {"shared": True},
}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def vae() -> State:
    return reference.random_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, vae: State) -> dict[str, Path]:
    """A policy of each kind as a published file, the tokenizer's beside them."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(vae, folder / VAE)
    for index, geometry in enumerate(KINDS.values()):
        torch.save(reference.random_policy(**geometry), folder / f"mine_{index}.pth")
    return {kind: folder / f"mine_{index}.pth" for index, kind in enumerate(KINDS)}


@pytest.fixture(scope="module")
def policies(files: dict[str, Path]) -> dict[str, VAR]:
    return {kind: load_policy(file) for kind, file in files.items()}


@pytest.fixture(scope="module")
def policy(policies: dict[str, VAR]) -> VAR:
    return policies["own, cosine"]


def tokens_of(policy: VAR, classes: list[int], **settings: float) -> Tensor:
    return policy.sample(Encoded(torch.tensor(classes)), Sampling(**settings), range(len(classes))).tokens.clone()


def spans() -> list[slice]:
    return [slice(0, 1), slice(1, 5), slice(5, 14), slice(14, 30)]


# --- the network


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_under_the_mask_gives_the_logits_of_a_pass_for_every_scale(
    kind: str, files: dict[str, Path], policies: dict[str, VAR], vae: State
) -> None:
    model, state = policies[kind].model, torch.load(files[kind], weights_only=True)
    classes, tokens = torch.tensor([0, 3, CLASSES]), torch.randint(CODES, (3, TOKENS))
    ours = model.logits(model.hidden(Encoded(classes), tokens))
    theirs = reference.logits(state, vae, classes, tokens, SCALES, KINDS[kind].get("heads", 4))
    assert ours.dtype == torch.float32 and theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    scored = model(Encoded(classes), tokens, Sampling(cfg_scale=1.0, temperature=0.7), True)
    expected = (theirs / 0.7).log_softmax(-1)
    torch.testing.assert_close(scored.logp, expected.gather(-1, tokens[..., None])[..., 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scored.entropy, -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_token_depends_on_the_scales_before_it_and_not_on_its_own(policy: VAR) -> None:
    tokens = torch.randint(CODES, (1, TOKENS))
    before = policy.model.hidden(Encoded(torch.tensor([1])), tokens)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % CODES  # of the third scale
    after = policy.model.hidden(Encoded(torch.tensor([1])), changed)
    assert torch.equal(before[:, :14], after[:, :14]) and (before[:, 14:] != after[:, 14:]).any(-1).all()


# --- guidance


def test_guidance_rises_from_scale_to_scale_as_published() -> None:
    """The published logits (1 + t) c - t u, t = cfg k / (K - 1), of cfg 1.5: l_u + s (l_c - l_u) with s = 1 + t."""
    ours = guidance_of_scales(Sampling(cfg_scale=2.5), 10)
    assert ours == pytest.approx([1 + 1.5 * k / 9 for k in range(10)])
    assert guidance_of_scales(Sampling(cfg_scale=2.5, cfg_interval=1), 4) == pytest.approx([1, 1.5, 1, 1])
    assert guidance_of_scales(Sampling(cfg_scale=1.0), 4) == [1.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_pass_is_guided_scale_by_scale(
    kind: str, files: dict[str, Path], policies: dict[str, VAR], vae: State
) -> None:
    model, state = policies[kind].model, torch.load(files[kind], weights_only=True)
    classes, tokens = torch.tensor([2, 4]), torch.randint(CODES, (2, TOKENS))
    heads = KINDS[kind].get("heads", 4)
    conditional = reference.logits(state, vae, classes, tokens, SCALES, heads)
    null = reference.logits(state, vae, torch.full((2,), CLASSES), tokens, SCALES, heads)
    expected = torch.empty_like(conditional)
    for k, span in enumerate(spans()):
        t = 1.5 * k / 3
        expected[:, span] = (1 + t) * conditional[:, span] - t * null[:, span]
    sampling = Sampling(cfg_scale=2.5)
    scored = model(Encoded(classes), tokens, sampling)
    logp = expected.log_softmax(-1)
    torch.testing.assert_close(scored.logp, logp.gather(-1, tokens[..., None])[..., 0], atol=2e-4, rtol=2e-4)
    part = model.distribution(Encoded(classes), tokens, sampling)(slice(20, 40))
    torch.testing.assert_close(part, logp.flatten(0, 1)[20:40], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_references_through_both_halves_and_recomputed_or_not(
    kind: str, files: dict[str, Path], policies: dict[str, VAR], vae: State
) -> None:
    state = torch.load(files[kind], weights_only=True)
    for value in state.values():
        value.requires_grad_(value.is_floating_point())
    classes, tokens, advantages = torch.tensor([2, 4]), torch.randint(CODES, (2, TOKENS)), torch.randn(2, 1)
    strengths = torch.cat([torch.full((side**2, 1), 1 + 1.5 * k / 3) for k, side in enumerate(SCALES)])
    conditional, null = (
        reference.logits(state, vae, each, tokens, SCALES, KINDS[kind].get("heads", 4))
        for each in (classes, torch.full((2,), CLASSES))
    )
    logp = (null + strengths * (conditional - null)).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (advantages * logp).mean().backward()
    for recomputed in (False, True):
        model = copy.deepcopy(policies[kind].model).train()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (advantages * model(Encoded(classes), tokens, Sampling(cfg_scale=2.5)).logp).mean().backward()
        for name, parameter in model.named_parameters():
            if name.startswith("quantizer."):
                assert parameter.grad is None, name
                continue
            expected = state[name].grad
            assert expected.norm() > 0, f"{name}: or nothing is compared"
            assert (parameter.grad - expected).norm() < 1e-3 * expected.norm(), name


# --- drawing


def test_under_autocast_draws_and_training_pass_agree_as_far_as_bfloat16_goes(policies: dict[str, VAR]) -> None:
    encoded, sampling = Encoded(torch.arange(CLASSES).repeat(4)), Sampling(cfg_scale=2.5)
    for policy in policies.values():
        with torch.autocast("cpu", torch.bfloat16):
            drawn = policy.sample(encoded, sampling, range(len(encoded)), logp="guided")
            scored = policy.model(encoded, drawn.tokens.clone(), sampling)
        ratio = (scored.logp - drawn.logp).exp()
        assert 0 < (ratio - 1).abs().mean() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_drawing_tells_the_log_probabilities_of_the_training_pass(
    kind: str, scale: float, policies: dict[str, VAR]
) -> None:
    policy, encoded = policies[kind], Encoded(torch.tensor([0, 3, 4]))
    sampling = Sampling(cfg_scale=scale, temperature=0.9)
    for logp, trained in (("guided", sampling), ("conditional", Sampling(cfg_scale=1.0, temperature=0.9))):
        drawn = policy.sample(encoded, sampling, [5, 6, 7], logp=logp)
        scored = policy.model(encoded, drawn.tokens.clone(), trained)
        assert (scored.logp.exp() / drawn.logp.exp() - 1).abs().max() < 1e-4


def test_draws_are_those_of_the_reference_with_its_filters(files: dict[str, Path], policy: VAR, vae: State) -> None:
    """Token after token: where the cumulative distribution, cut by top-k and top-p as published, passes the noise."""
    state, seeds, classes = torch.load(files["own, cosine"], weights_only=True), [3, 8], torch.tensor([1, 2])
    sampling = Sampling(cfg_scale=2.5, top_k=9, top_p=0.8)
    drawn = policy.sample(Encoded(classes), sampling, seeds, logp="guided")
    conditional = reference.logits(state, vae, classes, drawn.tokens, SCALES)
    null = reference.logits(state, vae, torch.full((2,), CLASSES), drawn.tokens, SCALES)
    for image, seed in enumerate(seeds):
        noise = torch.rand(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for k, span in enumerate(spans()):
            for place in range(span.start, span.stop):
                logits = (1 + 0.5 * k) * conditional[image, place] - 0.5 * k * null[image, place]
                order = logits.argsort(descending=True)[:9].tolist()
                p = logits[order].softmax(0).tolist()
                kept = next(n for n in range(1, 10) if sum(p[:n]) > 0.8 or n == 9)
                total = sum(p[:kept])
                mass = {code: p[index] / total for index, code in enumerate(order[:kept])}
                passed, token = 0.0, -1
                for code in sorted(mass):
                    passed += mass[code]
                    if passed > noise[place]:
                        token = code
                        break
                assert token == drawn.tokens[image, place]
                assert drawn.logp[image, place].exp().item() == pytest.approx(mass[token], rel=1e-3)


def test_a_condition_and_a_seed_are_an_image_in_any_batch(policy: VAR) -> None:
    encoded, sampling = Encoded(torch.tensor([0, 1, 2, 3])), Sampling(cfg_scale=2.0)
    together = policy.sample(encoded, sampling, [9, 8, 7, 6]).tokens
    alone = policy.sample(encoded[torch.tensor([2])], sampling, [7]).tokens
    assert torch.equal(together[2:3], alone) and len(together.unique(dim=0)) == 4


def test_a_dropped_condition_is_the_null_class(policy: VAR) -> None:
    given = policy.encode(policy.conditions([1, 4]), dropped=torch.tensor([True, False]))
    assert given.condition.tolist() == [CLASSES, 4]


def test_nothing_runs_twice_without_guidance(policy: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = policy.model.run
    monkeypatch.setattr(policy.model, "run", lambda x, *args, **keys: rows.append(len(x)) or run(x, *args, **keys))
    for scale in (1.0, 2.0):
        tokens_of(policy, [0, 1, 2], cfg_scale=scale)
    assert rows == [3] * 4 + [6] * 4


def test_what_cannot_be_drawn_is_said(policy: VAR) -> None:
    with pytest.raises(ValueError, match=r"class ids must lie in 0 \.\. 5"):
        tokens_of(policy, [6])
    with pytest.raises(ValueError, match="2 seeds for 1 conditions"):
        policy.sample(Encoded(torch.tensor([0])), Sampling(), [1, 2])
    with pytest.raises(ValueError, match=r"tokens are \[1, 29\]"):
        policy.model(Encoded(torch.tensor([0])), torch.zeros(1, 29, dtype=torch.long))


# --- the tokenizer


@torch.no_grad()
def test_pictures_and_tokens_are_those_of_the_reference(policy: VAR, vae: State) -> None:
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    ours = policy.tokenise(images).clone()
    latent = reference.latent(vae, images.float() / 127.5 - 1)
    assert torch.equal(ours, reference.quantise(vae, latent, SCALES)) and len(ours.unique()) > 5
    pixels = reference.pixels(vae, ours, SCALES)
    torch.testing.assert_close(policy.tokenizer.decode_tokens(ours), pixels, atol=2e-5, rtol=2e-5)
    assert (policy.decode(ours).float() - to_uint8(pixels).float()).abs().max() <= 1
    assert policy.decode(ours, 32).shape == (2, 3, 32, 32)


def test_every_scale_brings_the_quantised_latent_nearer_and_exact_codes_come_back() -> None:
    """A latent that a code says exactly is said by the first scale; the later ones choose the code that adds nothing,
    and tokens, latent, tokens is a round trip."""
    quantizer = ResidualQuantizer(CODES, 6, SCALES, 4, phi_ratio=0.0).requires_grad_(False)
    torch.manual_seed(0)
    quantizer.embedding.weight.copy_(torch.randn(CODES, 6)), quantizer.embedding.weight[0].zero_()
    flat = quantizer.embedding.weight[[5, 17]][..., None, None].expand(2, 6, 4, 4)
    tokens = quantizer.encode(flat)
    assert tokens[:, 0].tolist() == [5, 17] and not tokens[:, 1:].any()
    torch.testing.assert_close(quantizer.decode(tokens), flat, atol=1e-6, rtol=0)
    assert torch.equal(quantizer.encode(quantizer.decode(tokens)), tokens)
    latent, rest = torch.randn(8, 6, 4, 4), []
    parts = quantizer.encode(latent).split([1, 4, 9, 16], dim=1)
    so_far = torch.zeros_like(latent)
    for k, part in enumerate(parts):
        so_far = quantizer.add(so_far, part, k)
        rest.append((latent - so_far).square().mean().item())
    assert rest[-1] < 0.6 * latent.square().mean() and rest[-1] < rest[0]


def test_what_a_scale_sees_is_the_latent_before_it(policy: VAR) -> None:
    quantizer, tokens = policy.model.quantizer, torch.randint(CODES, (2, TOKENS))
    seen, latent = quantizer.inputs(tokens).split([4, 9, 16], dim=1), None
    for k, span in enumerate(spans()[:-1]):
        latent = quantizer.add(latent, tokens[:, span], k)
        torch.testing.assert_close(seen[k], quantizer.shrink(latent, k + 1))
    torch.testing.assert_close(quantizer.add(latent, tokens[:, 14:], 3), quantizer.decode(tokens))


def test_ten_scales_share_four_convolutions_as_published() -> None:
    assert phi_of_scales(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scales(5, 1) == [0] * 5 and phi_of_scales(5, 5) == [0, 1, 2, 3, 4]


# --- files and folders


def test_a_saved_policy_opens_as_what_it_was(policy: VAR, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    assert isinstance(again, VAR) and again.fingerprint() == policy.fingerprint()
    assert again.tokenizer_fingerprint() == policy.tokenizer_fingerprint()
    assert torch.equal(tokens_of(again, [0, 1], cfg_scale=2.5), tokens_of(policy, [0, 1], cfg_scale=2.5))
    low = load_policy(tmp_path / "policy", dtype="bfloat16")
    assert low.model.head.weight.dtype == torch.bfloat16 and low.model.quantizer.phis[0].weight.dtype == torch.float32
    assert tokens_of(low, [0], cfg_scale=2.5).shape == (1, TOKENS)
    card = policy.card
    assert (card.tokens, card.codes, card.image_size, card.scales) == (TOKENS, CODES, 64, (1, 4, 9, 16))
    outline = outline_policy(tmp_path / "policy")
    assert outline.policy.model.num_parameters() == policy.model.num_parameters() and outline.files == ()
    cache = sum(one.nbytes for pair in new_cache(policy.model, 6) for one in pair)
    assert outline.drawing_bytes(3, guided=True, recorded=False, number=4) == cache


Break = Callable[[State], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "missing": (lambda state: state.pop("blocks.1.ffn.fc2.bias"), r"missing blocks\.1\.ffn\.fc2\.bias"),
    "another": (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
    "shape": (
        lambda state: state.update({"blocks.0.attn.proj.weight": torch.zeros(3, 3)}),
        r"blocks\.0\.attn\.proj\.weight is \[3, 3\]",
    ),
    "bias": (lambda state: state["blocks.0.attn.zero_k_bias"].add_(1), "zero_k_bias is not zero"),
    "tokens": (lambda state: state.update(lvl_1L=state["lvl_1L"][:, :-2]), "lvl_1L is of 28 tokens, expected 30"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_whole_is_refused_by_name(kind: str, vae: State, tmp_path: Path) -> None:
    change, words = BROKEN[kind]
    state = reference.random_policy()
    change(state)
    torch.save(state, tmp_path / "var_d16.pth"), torch.save(vae, tmp_path / VAE)
    with pytest.raises(UserError, match=rf"var_d16\.pth.*{words}"):
        load_policy(tmp_path / "var_d16.pth")


def test_a_tokenizer_that_is_not_whole_or_another_is_refused(vae: State, tmp_path: Path) -> None:
    torch.save(reference.random_policy(), tmp_path / "mine.pth")
    torch.save({key: value for key, value in vae.items() if "phi" not in key and "qresi" not in key}, tmp_path / VAE)
    with pytest.raises(UserError, match=r"missing quantize\.quant_resi\.qresi_ls\.0\.bias"):
        load_policy(tmp_path / "mine.pth")
    torch.save(reference.random_tokenizer(codes=25), tmp_path / VAE)
    with pytest.raises(UserError, match="codes in the tokenizer: 25, but the model's vocab_size 24"):
        load_policy(tmp_path / "mine.pth")


def test_the_published_names_have_their_geometry() -> None:
    millions = {
        "var-d16": 310,
        "var-d16-cca": 310,
        "var-d30": 2010,
        "var-d36-512": 2354,
    }
    for name, size in millions.items():
        outline = outline_policy(name)
        assert round(outline.policy.model.num_parameters() / 1e6) == size, name
        card = outline.policy.card
        assert (card.tokens, card.codes) == ((2240 if "512" in name else 680), 4096)
        assert card.image_size == POLICIES[name].image_size
    published = POLICIES["var-d16"]
    assert (published.repo, published.file) == ("FoundationVision/var", "var_d16.pth")
    assert published.sampling == {"cfg_scale": 2.5, "top_k": 900, "top_p": 0.96}
    assert POLICIES["var-d16-cca"].sampling["cfg_scale"] == 1.0
    assert re.fullmatch(r"CCA_VAR_Guidance_Free/VAR_d16_CCA\.pth", POLICIES["var-d16-cca"].file)


def test_each_scale_counts_alike_by_its_weights() -> None:
    card = Card("x", "var", "classes", (), 64, TOKENS, CODES, "x", scales=(1, 4, 9, 16))
    weights = scale_weights(card, 1.0)
    assert [weights[span].sum().item() for span in spans()] == pytest.approx([7.5] * 4)
    half = scale_weights(card, 0.5)
    assert half.mean().item() == pytest.approx(1) and (half[0] / half[14]).item() == pytest.approx(4)
    with pytest.raises(UserError, match=r"scale_balance 1: nano-c2i draws token by token and has no scales; use 0"):
        scale_weights(Card("nano-c2i", "llamagen", "classes", (), 64, 64, 1024, "x"), 1.0)
