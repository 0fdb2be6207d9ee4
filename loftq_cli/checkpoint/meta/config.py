"""Infer the Llama version that Meta's `params.json` describes and make the config.json that transformers needs.

params.json does not name the version. Beyond the values in params.json, versions differ in the context length, the
scaling of the rotary frequencies and the special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.local import read_json
from loftq_cli.errors import LoftqError

_CONTEXT = {"1": 2048, "2": 4096, "code": 16384, "3": 8192, "3.1": 131072, "3.2": 131072}
_THETA = {"1": 10000.0, "2": 10000.0, "code": 1000000.0, "3": 500000.0, "3.1": 500000.0, "3.2": 500000.0}
_SCALING = {"3.1": 8.0, "3.2": 32.0}
_SCALING_RANGE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "head_dim", "vocab_size")
_LIMITS = ("max_seq_len", "max_batch_size")
_KNOWN = frozenset({*_SIZES, *_LIMITS, "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor"})


@dataclass(frozen=True)
class MetaParams:
    """The values of params.json; `rope_theta` and `rope_scaling_factor` are None if they depend on the version."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    rope_theta: float | None
    rope_scaling_factor: float | None
    use_scaled_rope: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


@dataclass(frozen=True)
class MetaShape:
    """Properties that only the weights and the tokenizer determine.

    Attributes:
        tied: the output matrix is the embedding.
        tiktoken: the tokenizer is in Llama 3's format.
        folder: path of the directory, the only hint if a Llama 2 has the same numbers as a Llama 1.
    """

    vocab: int
    intermediate: int
    tied: bool
    tiktoken: bool
    folder: str


def read_params(path: Path) -> MetaParams:
    """Read and check params.json.

    Raises:
        LoftqError: it is missing, damaged, or describes something other than a dense Llama 1 to 3.
    """
    values = read_json(path, "Meta distributes one with consolidated.*.pth")
    values = values["model"] if isinstance(values.get("model"), dict) else values
    for name, value in values.items():
        if name not in _KNOWN and value not in (None, False, 0, -1, "", [], {}):
            raise LoftqError(
                f"{path} has '{name}', which dense text models of Llama 1 to 3 do not have: give the model in "
                "Hugging Face's format."
            )
    heads = _number(path, values, "n_heads")
    params = MetaParams(
        dim=_number(path, values, "dim"),
        n_layers=_number(path, values, "n_layers"),
        n_heads=heads,
        n_kv_heads=heads if values.get("n_kv_heads") is None else _number(path, values, "n_kv_heads"),
        norm_eps=_real(path, values, "norm_eps") or 1e-5,
        rope_theta=_real(path, values, "rope_theta"),
        rope_scaling_factor=_real(path, values, "rope_scaling_factor"),
        use_scaled_rope=bool(values.get("use_scaled_rope")),
    )
    odd_heads = values.get("head_dim") not in (None, params.head_dim)
    if params.dim % (2 * heads) or heads % params.n_kv_heads or odd_heads:
        raise LoftqError(f"{path} has dim {params.dim}, which does not match its number of heads: download it again.")
    return params


def infer_version(params: MetaParams, shape: MetaShape) -> str:
    """Return the version whose published params.json matches this one."""
    if shape.tiktoken or params.use_scaled_rope or params.rope_theta == _THETA["3"]:
        if not params.use_scaled_rope:
            return "3"
        return "3.2" if shape.tied else "3.1"  # only 3.2's small models tie
    if (params.rope_theta or 0) > _THETA["2"] or shape.vocab == 32016:
        return "code"
    all_heads = params.n_kv_heads == params.n_heads
    first = params.norm_eps < 5e-6 or (all_heads and params.dim in (6656, 8192))  # 30B and 65B were never Llama 2
    return "1" if first and not re.search(r"llama-?2", shape.folder.lower()) else "2"


def make_config(params: MetaParams, shape: MetaShape, version: str, dtype: str, bos: int) -> dict[str, Any]:
    """Return config.json for transformers 5; in every version's vocabulary `eos` follows `bos`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta or _THETA[version]}
    if version in _SCALING:
        rope |= {"rope_type": "llama3", "factor": params.rope_scaling_factor or _SCALING[version], **_SCALING_RANGE}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": dtype,
        "eos_token_id": bos + 1,
        "head_dim": params.head_dim,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": _CONTEXT[version],
        "mlp_bias": False,
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads,
        "rms_norm_eps": params.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def context_length(version: str) -> int:
    return _CONTEXT[version]


def _number(path: Path, values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise LoftqError(f"{path} has {name} {value!r}, which is not a valid size: download it again.")
    return value


def _real(path: Path, values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30):
        raise LoftqError(f"{path} has {name} {value!r}, which is not a positive number: download it again.")
    return None if value is None else float(value)
