"""A decoder whose layers each have their own widths and ranks, and may lack attention or feed-forward network.

One class for the Llama, Mistral, Qwen2 and Qwen3 family: RMSNorm before each sublayer, rotary embedding,
grouped-query attention, gated feed-forward network. Tensor names are Llama's. This file travels inside the
checkpoints that need it, so it imports torch, transformers and its configuration only.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm as RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_distprune import LayerShape, PrunedConfig

#: How transformers calls the cache that it hands a model and takes from its output: by a new name from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


class Factorable(nn.Module):
    """A module whose linear maps are dense or, each where a rank is given, stored as two factors: `left(right(x))`.

    A dense `q_proj` is an `nn.Linear` of that name. A factored one is two of them, `right.q_proj` with a weight
    (rank, in_features) and `left.q_proj` with a weight (out_features, rank) and the bias.

    So whatever finds linear maps by the last part of their name, as PEFT's `target_modules` does, finds both factors.
    Adapters train on each and merge into it, exactly and at the same rank. A module of its own for the two, called
    `q_proj`, would be found before its factors and refused; made a subclass of `nn.Linear`, it would be taken for a
    dense matrix by what replaces those: quantizers and vLLM.
    """

    def __init__(self):
        super().__init__()
        self.right, self.left = nn.ModuleDict(), nn.ModuleDict()

    def add_linear(self, name: str, in_features: int, out_features: int, rank: int | None = None, bias: bool = False):
        """Add a linear map under its usual name: dense where `rank` is None, factored otherwise."""
        if rank is None:
            self.add_module(name, nn.Linear(in_features, out_features, bias=bias))
        else:
            self.right[name] = nn.Linear(in_features, rank, bias=False)
            self.left[name] = nn.Linear(rank, out_features, bias=bias)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the map of that name gives for x."""
        if name in self.right:
            return self.left[name](self.right[name](x))
        return getattr(self, name)(x)

    def ends(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The module that takes the input of the map of that name, and the one that gives its output."""
        if name in self.right:
            return self.right[name], self.left[name]
        return getattr(self, name), getattr(self, name)


def widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """States (.., w) with zeros after their last coordinate, (.., width)."""
    missing = width - states.shape[-1]
    return nn.functional.pad(states, (0, missing)) if missing else states


def one_token_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of one new token on a CPU, as SDPA gives it: (batch, 1, heads, width).

    `query` is (batch, heads, 1, width), `key` and `value` (batch, groups, tokens, width), `mask` as SDPA takes it. The
    fused kernel can read the keys and values of a group for all of its heads, where transformers would copy the whole
    cache for each.
    """
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2)


class PrunedAttention(Factorable):
    """Grouped-query attention with its own number of heads, rotary pairs, value width and ranks.

    Scores are divided by the square root of the original head width, whatever was removed.

    Where queries and keys are narrower than the original head, the buffer `rotary_pairs` (groups, pairs) says which
    pairs of its coordinates each KV group has kept: pair p of a head is its coordinates p and p + head_dim / 2, and a
    narrowed head holds the first coordinates of all its pairs before the second ones.
    """

    rotary_pairs: torch.Tensor | None

    def __init__(self, config: PrunedConfig, layer_idx: int, shape: LayerShape):
        super().__init__()
        self.config = config
        # What transformers' caches count by: they hold nothing for layers without attention.
        self.layer_idx = sum(index < layer_idx for index in config.attention_layers())
        self.query_key_dim = shape.query_key_dim
        self.value_dim = shape.value_dim
        self.num_key_value_groups = shape.query_heads // shape.kv_heads  # transformers' name for a group's query heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        hidden, bias = config.hidden_size, config.attention_bias
        self.add_linear("q_proj", hidden, shape.query_heads * shape.query_key_dim, shape.query_rank, bias)
        self.add_linear("k_proj", hidden, shape.kv_heads * shape.query_key_dim, shape.key_rank, bias)
        self.add_linear("v_proj", hidden, shape.kv_heads * shape.value_dim, bias=bias)
        self.add_linear("o_proj", shape.query_heads * shape.value_dim, hidden, shape.output_rank, shape.output_bias)
        if config.query_key_norm:
            self.q_norm = RMSNorm(shape.query_key_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(shape.query_key_dim, eps=config.rms_norm_eps)
        pairs = None
        if shape.query_key_dim < config.head_dim:
            pairs = torch.arange(shape.query_key_dim // 2).repeat(shape.kv_heads, 1)
        self.register_buffer("rotary_pairs", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self._project(hidden_states)
        query, key = self._rotate(query, key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.linear("o_proj", output.flatten(2)), weights

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (batch, heads, tokens, width of a head)."""
        query = self.linear("q_proj", hidden_states).unflatten(-1, (-1, self.query_key_dim))
        key = self.linear("k_proj", hidden_states).unflatten(-1, (-1, self.query_key_dim))
        value = self.linear("v_proj", hidden_states).unflatten(-1, (-1, self.value_dim))
        if self.config.query_key_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys turned by their tokens' positions, each group's pairs at their own speeds."""
        if self.rotary_pairs is None:
            return apply_rotary_pos_emb(query, key, *position_embeddings)
        columns = torch.cat([self.rotary_pairs, self.rotary_pairs], dim=1)
        # (batch, tokens, head_dim) -> (batch, groups, tokens, width)
        cos, sin = (table[..., columns].movedim(2, 1) for table in position_embeddings)
        query, key = query.unflatten(1, (-1, self.num_key_value_groups)), key.unsqueeze(2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
        return query.flatten(1, 2), key.squeeze(2)

    def _attend(self, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The configured kernel's output (batch, tokens, heads, value_dim), and its weights if any."""
        implementation = self.config._attn_implementation
        # Fused kernels, SDPA's among them, want values as wide as keys (or take a path several times slower): zero
        # columns change nothing, and those of the values are cut off again.
        if implementation != "eager":
            width = max(self.query_key_dim, self.value_dim)
            query, key, value = (widened(states, width) for states in (query, key, value))
        if implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu" and not self.training:
            return one_token_attention(query, key, value, mask, self.scaling)[..., : self.value_dim], None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output[..., : self.value_dim], weights


class PrunedFeedForward(Factorable):
    """Gated feed-forward network, with a low-rank linear branch beside it where calibration left one."""

    def __init__(self, config: PrunedConfig, shape: LayerShape):
        super().__init__()
        hidden, width = config.hidden_size, shape.ffn_width
        self.add_linear("gate_proj", hidden, width, bias=config.mlp_bias)
        self.add_linear("up_proj", hidden, width, bias=config.mlp_bias)
        self.add_linear("down_proj", width, hidden, bias=shape.down_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        if shape.calibration_rank is not None:
            self.add_linear("calibration", hidden, hidden, shape.calibration_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output + self.linear("calibration", x) if "calibration" in self.right else output


class PrunedDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer, usable inside the model or on its own.

    On its own, build it under `torch.device("meta")`, fill it with `load_state_dict(state, assign=True)`, and
    call it with `position_embeddings` from a `RotaryEmbedding(config)` and the mask that `causal_masks` gives
    for its `layer_type`. `config` must name an attention kernel: `PrunedConfig(attn_implementation="sdpa")`.
    `shape` stands in for the shape that `config` gives the layer. A part that the shape lacks is None, as is its
    norm; without both, the layer gives its hidden states back.
    """

    def __init__(self, config: PrunedConfig, layer_idx: int, shape: LayerShape | None = None):
        super().__init__()
        shape = config.with_biases(shape) if shape else config.layer_shape(layer_idx)
        self.hidden_size = config.hidden_size
        self.layer_type = config.layer_types[layer_idx]
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if shape.has_attention:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = PrunedAttention(config, layer_idx, shape)
        if shape.has_ffn:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = PrunedFeedForward(config, shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) in, hidden states of the same shape and dtype out."""
        if self.self_attn is not None:
            attention_output, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states = hidden_states + attention_output
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


MASK_OF_LAYER_TYPE = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def causal_masks(
    config: PrunedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict | None = None,
    past_key_values: Cache | None = None,
    position_ids: torch.LongTensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """The attention mask for each layer type of the model, as the configured attention kernel takes it.

    Args:
        config: it must name an attention kernel, as that of a model does, or that of
            `PrunedConfig(attn_implementation="sdpa")`.
        hidden_states: (batch, tokens, hidden); only its shape, dtype and device are used.
        attention_mask: (batch, past + new tokens), zero where padded. None where nothing is padded. A dict of
            finished masks (`generate` makes one ahead of time for a static cache) is returned as it is.
        past_key_values: the cache, if the tokens before these are in one.
        position_ids: (batch, tokens). Positions that start again mark sequences packed in one row.

    Returns:
        Layer type to mask, None where the kernel needs no mask.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    return {
        layer_type: MASK_OF_LAYER_TYPE[layer_type](
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        for layer_type in set(config.layer_types)
    }


class PrunedPreTrainedModel(PreTrainedModel):
    """What the bare model and the language model share."""

    config: PrunedConfig
    config_class = PrunedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrunedDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PrunedDecoderLayer, "attentions": PrunedAttention}


class PrunedModel(PrunedPreTrainedModel):
    """Embedding, decoder layers and final norm: token ids to hidden states (batch, tokens, hidden)."""

    def __init__(self, config: PrunedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PrunedDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        # Where transformers has not renamed it, `cache` is what paged attention wants.
        if CACHE in kwargs:
            past_key_values = kwargs.pop(CACHE)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            new = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            position_ids = (seen + new).unsqueeze(0)
        masks = causal_masks(self.config, hidden_states, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer.layer_type],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: past_key_values})


class PrunedForCausalLM(PrunedPreTrainedModel, GenerationMixin):
    """The pruned decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PrunedConfig):
        super().__init__(config)
        self.model = PrunedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary), and the loss for `labels` (batch, tokens; -100 ignored).

        `logits_to_keep`: how many last tokens to compute logits for (0: all), or a 1-D tensor of positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["PrunedForCausalLM", "PrunedModel", "PrunedPreTrainedModel"]
