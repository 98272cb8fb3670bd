"""Qwen3-Next's shape and constants, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
LAYER_TYPES = ("linear_attention", "full_attention")
SUPPORTED_ACTIVATIONS = ("silu",)

# Without one of these a tensor's shape would be a guess, so there is no default for them.
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
# Keys that a config.json may leave out; the defaults are those of transformers' Qwen3NextConfig.
OPTIONAL_KEYS = (
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "norm_topk_prob",
    "decoder_sparse_step",
    "bos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
    "attention_dropout",
    "router_aux_loss_coef",
    "output_router_logits",
)


@dataclass(frozen=True)
class Qwen3NextConfig:
    """Every field of HF's `qwen3_next` config under its HF name; layer counts and sizes are in elements.

    Raises `ValueError` naming the field when a value has the wrong type, does not fit the others, or asks
    for something that is not implemented.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    layer_types: tuple[str, ...]
    architecture: str = "Qwen3NextForCausalLM"
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.25
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # The rest of the HF config does not change inference; it is kept so that nothing read is lost.
    initializer_range: float = 0.02
    use_cache: bool = True
    attention_dropout: float = 0.0
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self) -> None:
        for key in (*REQUIRED_KEYS, "max_position_embeddings", "decoder_sparse_step"):
            _require_integer(key, getattr(self, key), minimum=0 if key == "num_experts" else 1)
        for key in ("rms_norm_eps", "rope_theta", "partial_rotary_factor"):
            _require_positive_number(key, getattr(self, key))
        for key in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, got {getattr(self, key)!r}")
        _require_one_of("hidden_act", self.hidden_act, SUPPORTED_ACTIVATIONS)
        _require_one_of("dtype", self.dtype, tuple(DTYPE_BYTES))
        self._check_layers()
        self._check_heads()

    def _check_layers(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}: give one entry per layer"
            )
        for layer_type in self.layer_types:
            _require_one_of("layer_types", layer_type, LAYER_TYPES)
        for layer in self.mlp_only_layers:
            _require_integer("mlp_only_layers", layer, minimum=0)
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are only {self.num_experts} "
                "experts (num_experts)"
            )

    def _check_heads(self) -> None:
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(
                    f"{many} must be a multiple of {few}, got {getattr(self, many)} and {getattr(self, few)}"
                )
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} rotates "
                f"{self.rotary_dim} elements: it must be an even number from 2 to head_dim"
            )

    @property
    def rotary_dim(self) -> int:
        """Leading elements of each head that rotary embedding turns; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """Width of all Gated DeltaNet keys (and queries) together."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all Gated DeltaNet values together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def itemsize(self) -> int:
        """Bytes of one element of `dtype`."""
        return DTYPE_BYTES[self.dtype]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has the sparse MoE block; otherwise it has a dense MLP."""
        return (
            layer not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Qwen3NextConfig:
        """Read a directory with a `config.json`, or such a file's content as a dict.

        Both spellings of rope (`rope_parameters`, or `rope_theta` + `partial_rotary_factor`), of the layer
        pattern (`layer_types`, or `full_attention_interval`) and of the dtype (`dtype`, `torch_dtype`) are
        read. Keys that inference does not need are ignored.
        Raises `FileNotFoundError` without a config.json, and `ValueError` naming the key for a missing
        required key or an unsupported value.
        """
        raw = read_hf_config(source)
        missing = [key for key in REQUIRED_KEYS if raw.get(key) is None]
        if missing:
            raise ValueError(f"the model config lacks the required key(s) {', '.join(missing)}")
        model_type = raw.get("model_type", "qwen3_next")
        _require_one_of("model_type", model_type, ("qwen3_next",))
        if raw.get("quantization_config"):
            raise ValueError("quantization_config is not supported: use the unquantised checkpoint")

        values: dict[str, Any] = {key: raw[key] for key in REQUIRED_KEYS}
        values |= {key: raw[key] for key in OPTIONAL_KEYS if raw.get(key) is not None}
        rope_theta, partial_rotary_factor = _rope(raw)
        return cls(
            **values,
            architecture=hf_architecture(raw, default="Qwen3NextForCausalLM"),
            layer_types=_layer_types(raw),
            mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
            rope_theta=rope_theta,
            partial_rotary_factor=partial_rotary_factor,
            dtype=hf_dtype(raw),
            eos_token_ids=_token_ids(raw.get("eos_token_id")),
        )


def read_hf_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The content of `source`/config.json, or `source` itself when it is a mapping already."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no model config at {path}: give a directory that holds a config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(raw).__name__}")
    return raw


def hf_architecture(raw: Mapping[str, Any], default: str = "") -> str:
    """`architectures[0]`, which names the model class; `default` when the key is absent or empty."""
    architectures = raw.get("architectures") or [default]
    if not isinstance(architectures, list | tuple) or not isinstance(architectures[0], str):
        raise ValueError(f"architectures must be a list of class names, got {architectures!r}")
    return architectures[0]


def hf_dtype(raw: Mapping[str, Any]) -> str:
    """The checkpoint's dtype without torch's prefix, `"bfloat16"` when the config names none."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return str(dtype).removeprefix("torch.")


def _layer_types(raw: Mapping[str, Any]) -> tuple[str, ...]:
    if raw.get("layer_types") is not None:
        return tuple(raw["layer_types"])
    interval = raw.get("full_attention_interval", 4)
    _require_integer("full_attention_interval", interval, minimum=1)
    _require_integer("num_hidden_layers", raw["num_hidden_layers"], minimum=1)
    return tuple(
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention"
        for layer in range(raw["num_hidden_layers"])
    )


def _rope(raw: Mapping[str, Any]) -> tuple[float, float]:
    """(rope_theta, partial_rotary_factor), with transformers' precedence: the nested dict wins."""
    nested: Mapping[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):  # rope_scaling is the older name of the same dict
        if not raw.get(key):
            continue
        nested = raw[key]
        if not isinstance(nested, Mapping):
            raise ValueError(f"{key} must be an object or null, got {nested!r}")
        rope_type = nested.get("rope_type", nested.get("type", "default"))
        if rope_type != "default":
            raise ValueError(
                f"{key} asks for rope_type {rope_type!r}, which is not implemented: only 'default' is"
            )
    theta = nested.get("rope_theta", raw.get("rope_theta"))
    factor = nested.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return (10000.0 if theta is None else theta), (0.25 if factor is None else factor)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _require_integer(key: str, value: Any, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{key} must be an integer of at least {minimum}, got {value!r}")


def _require_positive_number(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key} must be a number above 0, got {value!r}")


def _require_one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} {value!r} is not supported: use {' or '.join(map(repr, allowed))}")
