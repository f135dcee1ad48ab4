"""What the engine asks of a model family: its tensors' names and its geometry."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distprune.budgets import StoredSizes
from distprune.checkpoint import TensorInfo
from distprune.decoder_layer import DecoderLayer, layer_from_state, state_of
from distprune.modeling import LayerShape, PrunedConfig, layer_tensor_shapes


@dataclass(frozen=True)
class Family:
    """A family whose decoder layer computes what ours does; subclasses say where it differs.

    Our own decoder-layer module (``distprune.modeling``) runs every family, dense or pruned, so a family is data:
    names and flags, no forward pass of its own.
    """

    model_type: str
    layer_prefix: str = "model.layers.{index}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    # Buffers that old checkpoints carry although they are computed anew when the model is built.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def decoder_flags(self, config: PreTrainedConfig) -> dict[str, object]:
        """The flags of :class:`PrunedConfig` that make our decoder layer compute what this family's does."""
        return {}

    def dense_config(self, config: PreTrainedConfig) -> PrunedConfig:
        """The unpruned model as our configuration sees it: every layer at its full width."""
        return PrunedConfig(
            base_model_type=self.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden_act=config.hidden_act,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=copy.deepcopy(config.rope_parameters),
            attention_dropout=getattr(config, "attention_dropout", 0.0),
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=config.use_cache,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            dtype=config.dtype,
            **self.decoder_flags(config),
        )

    def layer_shapes(self, config: PrunedConfig, index: int) -> dict[str, tuple[int, ...]]:
        """Checkpoint names and shapes of the tensors of one layer, in the shape that ``config`` gives it."""
        prefix = self.layer_prefix.format(index=index)
        return {
            prefix + name: shape
            for name, shape in layer_tensor_shapes(config, index, config.layer_shape(index)).items()
        }

    def outer_shapes(self, config: PrunedConfig) -> dict[str, tuple[int, ...]]:
        """Checkpoint names and shapes of what lies outside the decoder layers: embedding, final norm and head."""
        table = (config.vocab_size, config.hidden_size)
        shapes = {self.embedding: table, self.final_norm: (config.hidden_size,)}
        return shapes if config.tie_word_embeddings else shapes | {self.head: table}

    def head_of(self, config: PrunedConfig) -> str:
        """The checkpoint's name of what gives the logits: the embedding where it serves as head too."""
        return self.embedding if config.tie_word_embeddings else self.head

    def tensor_shapes(self, config: PrunedConfig) -> dict[str, tuple[int, ...]]:
        """Checkpoint names and shapes of all tensors of a model, dense or pruned."""
        shapes = self.outer_shapes(config)
        for index in range(config.num_hidden_layers):
            shapes |= self.layer_shapes(config, index)
        return shapes

    def unknown_tensors(self, names: Iterable[str], dense: PrunedConfig) -> list[str]:
        """The checkpoint's tensors that this family has no place for; a tied head's copy of the embedding has one."""
        known = {self.head, *self.tensor_shapes(dense)}
        return [name for name in names if name not in known and not name.endswith(self.ignored_suffixes)]

    def layer_from_checkpoint(self, tensors: Mapping[str, Tensor], dense: PrunedConfig, index: int) -> DecoderLayer:
        prefix = self.layer_prefix.format(index=index)
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return layer_from_state(state, dense.layer_shape(index))

    def layer_to_checkpoint(self, layer: DecoderLayer, index: int) -> dict[str, Tensor]:
        prefix = self.layer_prefix.format(index=index)
        return {prefix + name: tensor for name, tensor in state_of(layer).items()}

    def stored_sizes(self, tensors: Mapping[str, TensorInfo], dense: PrunedConfig) -> StoredSizes:
        """How large the numbers of the checkpoint's tensors are."""
        layers = []
        for index in range(dense.num_hidden_layers):
            prefix = self.layer_prefix.format(index=index)
            names = self.layer_shapes(dense, index)
            layers.append({name.removeprefix(prefix): tensors[name].dtype.itemsize for name in names})
        return StoredSizes(tuple(layers), sum(tensors[name].nbytes for name in self.outer_shapes(dense)))

    def stock_config(self, config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
        """The original architecture's configuration when every layer has ``shape``, all widths being equal.

        It is transformers' own class, whatever code came with the model: what is pruned runs without that.
        """
        described = config.to_dict()
        described.pop("auto_map", None)
        stock = type(AutoConfig.for_model(self.model_type)).from_dict(described)
        stock.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        stock.intermediate_size = shape.ffn_width
        stock.num_attention_heads = shape.query_heads
        stock.num_key_value_heads = shape.kv_heads
        stock.head_dim = shape.query_key_dim
        return stock
