"""The keys and shapes of a published Mask2Former file, written down from the published conversion, for any widths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Sizes of a network; the defaults are those of `mask2former-swin-small-coco-instance`."""

    embed: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    swin_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    hidden: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    queries: int = 100
    classes: int = 80


def published_shapes(w: Widths = Widths()) -> dict[str, tuple[int, ...]]:
    """Key to shape, as transformers 4 named them; `relative_position_index` holds whole numbers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(*names: str, width: int = w.hidden) -> None:
        for name in names:
            shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    swin, pixel, decoder = (
        f"model.{part}" for part in ("pixel_level_module.encoder", "pixel_level_module.decoder", "transformer_module")
    )
    shapes[f"{swin}.embeddings.patch_embeddings.projection.weight"] = (w.embed, 3, 4, 4)
    shapes[f"{swin}.embeddings.patch_embeddings.projection.bias"] = (w.embed,)
    norm(f"{swin}.embeddings.norm", width=w.embed)
    widths = [w.embed * 2**stage for stage in range(4)]
    for stage, width in enumerate(widths):
        for number in range(w.depths[stage]):
            block = f"{swin}.encoder.layers.{stage}.blocks.{number}"
            norm(f"{block}.layernorm_before", f"{block}.layernorm_after", width=width)
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{block}.attention.{name}", width, width)
            linear(f"{block}.intermediate.dense", 4 * width, width)
            linear(f"{block}.output.dense", width, 4 * width)
            shapes[f"{block}.attention.self.relative_position_bias_table"] = (
                (2 * w.window - 1) ** 2,
                w.swin_heads[stage],
            )
            shapes[f"{block}.attention.self.relative_position_index"] = (w.window**2, w.window**2)
        if stage < 3:
            shapes[f"{swin}.encoder.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norm(f"{swin}.encoder.layers.{stage}.downsample.norm", width=4 * width)
        norm(f"{swin}.hidden_states_norms.stage{stage + 1}", width=width)

    h = w.hidden
    shapes |= {f"{pixel}.level_embed": (3, h), f"{decoder}.level_embed.weight": (3, h)}
    for level, width in enumerate(reversed(widths[1:])):
        projection = f"{pixel}.input_projections.{level}"
        shapes |= {f"{projection}.0.weight": (h, width, 1, 1), f"{projection}.0.bias": (h,)}
        norm(f"{projection}.1")
    for number in range(w.encoder_layers):
        layer = f"{pixel}.encoder.layers.{number}"
        points = w.heads * 3 * 4  # heads, levels, points of deformable attention
        linear(f"{layer}.self_attn.sampling_offsets", 2 * points, h)
        linear(f"{layer}.self_attn.attention_weights", points, h)
        linear(f"{layer}.self_attn.value_proj", h, h)
        linear(f"{layer}.self_attn.output_proj", h, h)
        linear(f"{layer}.fc1", w.encoder_ffn, h)
        linear(f"{layer}.fc2", h, w.encoder_ffn)
        norm(f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm")
    shapes |= {f"{pixel}.mask_projection.weight": (h, h, 1, 1), f"{pixel}.mask_projection.bias": (h,)}
    shapes |= {f"{pixel}.adapter_1.0.weight": (h, w.embed, 1, 1), f"{pixel}.layer_1.0.weight": (h, h, 3, 3)}
    norm(f"{pixel}.adapter_1.1", f"{pixel}.layer_1.1")

    shapes |= {f"{decoder}.{name}.weight": (w.queries, h) for name in ("queries_embedder", "queries_features")}
    for number in range(w.decoder_layers):
        layer = f"{decoder}.decoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{name}", h, h)
        shapes |= {f"{layer}.cross_attn.in_proj_weight": (3 * h, h), f"{layer}.cross_attn.in_proj_bias": (3 * h,)}
        linear(f"{layer}.cross_attn.out_proj", h, h)
        linear(f"{layer}.fc1", w.decoder_ffn, h)
        linear(f"{layer}.fc2", h, w.decoder_ffn)
        norm(*(f"{layer}.{name}_layer_norm" for name in ("self_attn", "cross_attn", "final")))
    norm(f"{decoder}.decoder.layernorm")
    for number in range(3):
        linear(f"{decoder}.decoder.mask_predictor.mask_embedder.{number}.0", h, h)
    linear("class_predictor", w.classes + 1, h)
    shapes["criterion.empty_weight"] = (w.classes + 1,)
    return shapes
