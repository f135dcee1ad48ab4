"""Configuration of a pruned decoder. This file travels inside checkpoints, so it stands alone."""

# No `from __future__ import annotations` here: @strict checks each field against its evaluated annotation.

import copy
import json
from dataclasses import asdict, dataclass, replace

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# In config.json, the activation is called this, and its real name is kept under another key. The base model's class,
# which transformers would build from the file by its model_type, then ends with an error that says what to do.
NEEDS_OUR_CODE = "of a model pruned by distprune: pass trust_remote_code=True, or import distprune"
REAL_ACTIVATION = "pruned_hidden_act"


def as_written(described: dict) -> dict:
    """A configuration as config.json has it: of the base model's type, which tokenizers and tools look at."""
    layer_type = "full_attention" if described.get("sliding_window") is None else "sliding_attention"
    written = described | {
        "model_type": described["base_model_type"],
        "hidden_act": NEEDS_OUR_CODE,
        REAL_ACTIVATION: described["hidden_act"],
    }
    # By itself that key makes transformers take a Mistral for a Ministral.
    if set(described["layer_types"]) == {layer_type}:
        del written["layer_types"]
    return written


def as_read(described: dict) -> dict:
    """The inverse of :func:`as_written`; what was not written by it stays as it is."""
    if not is_ours(described.get("hidden_act")):
        return described
    read = dict(described)
    return read | {
        "model_type": PrunedConfig.model_type,
        "base_model_type": described["model_type"],
        "hidden_act": read.pop(REAL_ACTIVATION),
    }


def is_ours(hidden_act: str | None) -> bool:
    """Whether a configuration with that activation is one that :func:`as_written` gave."""
    return hidden_act == NEEDS_OUR_CODE


@dataclass(frozen=True)
class LayerShape:
    """Widths, ranks and output biases of one decoder layer.

    A layer without attention has no heads: the four widths of its attention are 0, and it has neither ranks nor an
    output bias. One without a feed-forward network has an `ffn_width` of 0, no linear branch and no down bias.

    Attributes:
        query_heads: query heads, a multiple of `kv_heads`.
        kv_heads: key/value heads.
        query_key_dim: width of one query or key head, two for each rotary pair that it keeps.
        value_dim: width of one value head; it may be smaller or larger than `query_key_dim`.
        ffn_width: intermediate width of the feed-forward network.
        query_rank: rank of the factored query projection, None where it is a dense matrix.
        key_rank: rank of the factored key projection, None where it is a dense matrix.
        output_rank: rank of the factored attention output projection, None where it is a dense matrix.
        calibration_rank: rank of the linear branch beside the feed-forward network, None where there is none.
        output_bias: whether the attention output projection has a bias.
        down_bias: whether the feed-forward down projection has a bias.

    Raises:
        ValueError: a width is negative or a rank not positive, a bias is not a bool, `query_heads` is not a multiple
            of `kv_heads`, or a part is absent by one of its fields and there by another.
    """

    query_heads: int
    kv_heads: int
    query_key_dim: int
    value_dim: int
    ffn_width: int
    query_rank: int | None = None
    key_rank: int | None = None
    output_rank: int | None = None
    calibration_rank: int | None = None
    output_bias: bool = False
    down_bias: bool = False

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name.endswith("_bias"):
                sound, kind = isinstance(value, bool), "true or false"
            else:
                rank = name.endswith("_rank")
                sound = (value is None and rank) or (isinstance(value, int) and value >= rank)
                kind = "a positive integer" if rank else "a positive integer, or 0 in a layer without this part"
            if not sound:
                raise ValueError(f"{name} must be {kind}, got {value!r}.")
        attention = ("query_heads", "kv_heads", "query_key_dim", "value_dim")
        self._check_absence("attention", attention, ("query_rank", "key_rank", "output_rank", "output_bias"))
        self._check_absence("a feed-forward network", ("ffn_width",), ("calibration_rank", "down_bias"))
        if self.has_attention and self.query_heads % self.kv_heads != 0:
            raise ValueError(f"query_heads ({self.query_heads}) must be a multiple of kv_heads ({self.kv_heads}).")

    def _check_absence(self, part: str, widths: tuple[str, ...], extras: tuple[str, ...]):
        zero = [name for name in widths if getattr(self, name) == 0]
        left = [name for name in widths + extras if getattr(self, name)]
        if zero and left:
            raise ValueError(
                f"{zero[0]} is 0, as in a layer without {part}, but {left[0]} is {getattr(self, left[0])}: "
                f"give such a layer {', '.join(widths)} of 0, and no {' or '.join(extras)}."
            )

    @property
    def has_attention(self) -> bool:
        return self.query_heads > 0

    @property
    def has_ffn(self) -> bool:
        return self.ffn_width > 0


@strict
class PrunedConfig(PreTrainedConfig):
    """A decoder whose layers each have their own widths and ranks.

    `intermediate_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim` describe the original
    model; `layer_shapes` says what is left of each layer, and defaults to all of it.

    Arguments beyond those of transformers' `LlamaConfig`:
        base_model_type: `model_type` of the original model, such as "llama".
        attention_bias: whether the query, key and value projections have a bias.
        attention_output_bias: whether the attention output projection has a bias, in every layer that has one.
            Without it, that of a single layer has one where its `LayerShape` says so.
        mlp_bias: whether the three feed-forward projections have a bias, in every layer that has them. Without it,
            the down projection of a single layer has one where its `LayerShape` says so.
        query_key_norm: whether each query and key head is RMS-normalized before rotary embedding (Qwen3).
        sliding_window: attention span, in tokens, of the layers of type "sliding_attention".
        layer_types: "full_attention" or "sliding_attention" for each layer. By default all layers slide where
            `sliding_window` is given, and none otherwise.
        layer_shapes: for each layer a dict of `LayerShape` fields.

    Raises:
        ValueError: `layer_shapes` does not fit the model; the message names the layer and the field.
    """

    model_type = "distprune"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    base_model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    query_key_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    layer_shapes: list[dict] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers
        if self.layer_shapes is None:
            self.layer_shapes = [asdict(self.dense_shape()) for _ in range(self.num_hidden_layers)]
        # Here and not in a `validate_` method, whose errors @strict wraps in one that is no ValueError.
        self._check_layer_types()
        self._check_layer_shapes()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        described, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return as_read(described), unused

    def to_json_file(self, json_file_path, use_diff: bool = True):
        described = json.loads(self.to_json_string(use_diff))
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(as_written(described), indent=2, sort_keys=True) + "\n")

    def dense_shape(self) -> LayerShape:
        """The shape of a layer of the original model, from which nothing was removed."""
        return LayerShape(
            query_heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            query_key_dim=self.head_dim,
            value_dim=self.head_dim,
            ffn_width=self.intermediate_size,
            output_bias=self.attention_output_bias,
            down_bias=self.mlp_bias,
        )

    def layer_shape(self, index: int) -> LayerShape:
        """The shape of layer `index`."""
        try:
            return self.with_biases(LayerShape(**self.layer_shapes[index]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer_shapes[{index}]: {error}") from error

    def with_biases(self, shape: LayerShape) -> LayerShape:
        """The shape with the biases that all layers of the model have, beside those it has itself."""
        return replace(
            shape,
            output_bias=shape.output_bias or (shape.has_attention and self.attention_output_bias),
            down_bias=shape.down_bias or (shape.has_ffn and self.mlp_bias),
        )

    def attention_layers(self) -> list[int]:
        """The layers with attention. A layer's place among them is its place in the KV cache."""
        return [index for index, shape in enumerate(self.layer_shapes or ()) if shape.get("query_heads") != 0]

    def get_text_config(self, decoder=None, encoder=None) -> "PrunedConfig":
        """The configuration itself; as that of a decoder, which caches are made from, with the attention layers alone.

        A cache holds no entry for a layer without attention: one that stayed empty would pass for a cache of no tokens.
        """
        kept = self.attention_layers()
        if not decoder or len(kept) in (0, self.num_hidden_layers):
            return super().get_text_config(decoder=decoder, encoder=encoder)
        cached = copy.copy(self)
        cached.num_hidden_layers = len(kept)
        cached.layer_types = [self.layer_types[index] for index in kept]
        cached.layer_shapes = [self.layer_shapes[index] for index in kept]
        return cached

    def _check_layer_types(self):
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"layer_types: {sorted(unknown)} must be full_attention or sliding_attention.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention layers, so sliding_window must be given.")

    def _check_layer_shapes(self):
        if len(self.layer_shapes) != self.num_hidden_layers:
            raise ValueError(
                f"layer_shapes has {len(self.layer_shapes)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}: give one shape for each layer."
            )
        for index in range(self.num_hidden_layers):
            shape, name = self.layer_shape(index), f"layer_shapes[{index}]"
            # Rotary embedding turns pairs of query/key coordinates: they go in twos.
            if shape.query_key_dim > self.head_dim or (shape.query_key_dim % 2 and shape.query_key_dim < self.head_dim):
                raise ValueError(
                    f"{name}: query_key_dim ({shape.query_key_dim}) must be even and not exceed head_dim "
                    f"({self.head_dim})."
                )
            if self.query_key_norm and shape.query_key_dim not in (0, self.head_dim):
                raise ValueError(
                    f"{name}: query_key_dim ({shape.query_key_dim}) must equal head_dim ({self.head_dim}), because "
                    "query_key_norm takes the norm over all coordinates of a head: no rotary pair can go."
                )
            if shape.value_dim > self.head_dim:
                raise ValueError(f"{name}: value_dim ({shape.value_dim}) must not exceed head_dim ({self.head_dim}).")
        if not self.attention_layers():
            raise ValueError("layer_shapes has no layer with attention: at least one must keep it.")


__all__ = ["LayerShape", "PrunedConfig"]
