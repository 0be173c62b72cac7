"""LlamaGen and its image tokenizer as models of transformers: what is trained, saved and opened by its auto classes.

Kept apart from the networks, since importing what trains takes longer than to draw an image.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from argrpo_cli.policy.llamagen.config import LlamaGenConfig, VQConfig
from argrpo_cli.policy.llamagen.model import Backbone, Layer, LlamaGenNetwork
from argrpo_cli.policy.llamagen.vq import VQNetwork


class TrainedLayer(Layer, GradientCheckpointingLayer):
    """A layer that gradient checkpointing can compute again."""


class LlamaGenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both classes below."""

    config_class = LlamaGenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TrainedLayer"]  # noqa: RUF012 (transformers' own convention)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Backbone) and module.config.condition == "caption":
            init.normal_(module.null_caption, std=module.config.caption_dim**-0.5)


class LlamaGenModel(Backbone, LlamaGenPreTrainedModel):
    """The backbone alone."""

    layer = TrainedLayer

    def __init__(self, config: LlamaGenConfig) -> None:
        LlamaGenPreTrainedModel.__init__(self, config)
        self.build(config)
        self.gradient_checkpointing = False
        self.post_init()


class LlamaGenForImageGeneration(LlamaGenNetwork, LlamaGenPreTrainedModel):
    """LlamaGen with its LM head over image tokens."""

    config_class = LlamaGenConfig
    backbone = LlamaGenModel

    def __init__(self, config: LlamaGenConfig) -> None:
        LlamaGenPreTrainedModel.__init__(self, config)
        self.build(config)
        self.post_init()

    @classmethod
    def around(cls, network: LlamaGenNetwork) -> Self:
        """A network as a model of transformers, of the same weights: they are not copied."""
        with torch.device("meta"):
            model = cls(LlamaGenConfig.of(network.config))
        model.config.dtype, model.config._name_or_path = network.lm_head.weight.dtype, network.origin
        return _filled(model, network)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head:  # as published: a fresh policy is uniform over the vocabulary
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)


class VQModel(VQNetwork, PreTrainedModel):
    """The image tokenizer."""

    config_class = VQConfig
    base_model_prefix = "vq"
    main_input_name = "images"

    def __init__(self, config: VQConfig):
        PreTrainedModel.__init__(self, config)
        self.build(config)
        self.post_init()

    @classmethod
    def around(cls, network: VQNetwork) -> Self:
        """A tokenizer as a model of transformers, of the same weights: they are not copied."""
        with torch.device("meta"):
            model = cls(VQConfig.of(network.config))
        return _filled(model, network)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()


def _filled(model: PreTrainedModel, network: nn.Module) -> PreTrainedModel:
    """A model on the meta device with the very parameters and buffers of a network that has the same."""
    model.load_state_dict(network.state_dict(keep_vars=True), assign=True)
    return model.train(network.training)


AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig, exist_ok=True)
AutoModel.register(LlamaGenConfig, LlamaGenModel, exist_ok=True)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForImageGeneration, exist_ok=True)
