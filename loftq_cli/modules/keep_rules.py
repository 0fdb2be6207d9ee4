"""The exceptions of models, all in this file: what must stay in full precision although it looks like a matrix.

A new exception is an entry in one of these tables and a line in `tests/modules/test_roles.py` (`KEPT`).

Sources: transformers 5.23 (`models/*/modeling_*.py`) and torch 2.13 (`nn/modules`), surveyed class by class; the packed
formats keep no tensor named `weight` that other code could read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from loftq_cli.modules.reasons import Why

Tower = Literal["text", "vision", "audio", "other"]

TABLES: Final = (Why.EMBEDDING, Why.POSITION)  # looked up, not multiplied: no Linear whatever their shape

# --- names -------------------------------------------------------------------------------------------------------
# Embeddings that encode places, not tokens; only the wording of the reason depends on it.
POSITION_WORDS: Final = ("position", "pos_emb", "wpe", "rel_embeddings", "relative")

# A class of this name decides between experts; so does a Linear of such a name beside a module called `experts`.
ROUTER_CLASS: Final = re.compile(r"Router|Mo[Ee]\w*Gate$")
ROUTER_NAMES: Final = ("gate", "router", "shared_expert_gate")

# Heads of classes with no base model under `base_model_prefix` (T5ForQuestionAnswering, CLIPForImageClassification).
TASK_HEAD_NAME: Final = re.compile(r"(classifier|score|qa_outputs|class_predictor|\w+_heads?)(\.|$)")

# PEFT 0.21 (`_convert_peft_config_moe`) takes every target of these last names for the fused experts of the model types
# that transformers files under the key; a shared expert or a dense MLP of that name is targeted as a parameter instead.
PEFT_EXPERT_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
}

# Linear subclasses with a forward of their own that is x @ W.T + b all the same. bitsandbytes replaces them too.
PLAIN_LINEAR_CLASSES: Final = frozenset({"FalconLinear"})

# Part of a sub-config's key -> tower. Asked in this order; what is left is told by the sub-model's `input_modalities`.
TOWER_WORDS: Final[tuple[tuple[str, Tower], ...]] = (
    ("qformer", "other"),
    ("projector", "other"),
    ("perceiver", "other"),
    ("text", "text"),
    ("vision", "vision"),
    ("image", "vision"),
    ("vq_", "vision"),
    ("audio", "audio"),
    ("speech", "audio"),
    ("codec", "audio"),
)

# --- weights that other code reads (`weight_reads` finds the rest) ------------------------------------------------
# The read sits behind a switch of the config: Bloom multiplies slice by slice only to repeat Megatron's rounding.
READ_ONLY_WHEN: Final[Mapping[str, str]] = {"BloomAttention": "slow_but_exact", "BloomMLP": "slow_but_exact"}

# Reads no source analysis sees, because a local variable stands in between: class -> module paths below it.
# Rwkv divides these weights in place when it goes to eval mode.
HIDDEN_READS: Final[Mapping[str, tuple[str, ...]]] = {
    "RwkvModel": (r"blocks\.\d+\.attention\.output", r"blocks\.\d+\.feed_forward\.value"),
}

# --- without a model class ---------------------------------------------------------------------------------------
# Only names are left. Whole words between dots, underscores and digits, first hit wins.
NAME_WORDS: Final = (
    ("experts", Why.EXPERTS),
    ("expert", Why.EXPERTS),
    ("embed", Why.EMBEDDING),
    ("embedding", Why.EMBEDDING),
    ("embeddings", Why.EMBEDDING),
    ("emb", Why.EMBEDDING),
    ("wte", Why.EMBEDDING),
    ("wpe", Why.POSITION),
    ("norm", Why.NORM),
    ("layernorm", Why.NORM),
    ("ln", Why.NORM),
    ("router", Why.ROUTER),
    ("head", Why.TASK_HEAD),
    ("heads", Why.TASK_HEAD),
    ("classifier", Why.TASK_HEAD),
    ("score", Why.TASK_HEAD),
    ("conv", Why.CONVOLUTION),
)
# The last part of the module's name exactly: `mlp.gate` routes, `mlp.gate_proj` does not; `output` ends Meta's models.
LAST_NAMES: Final[Mapping[str, Why]] = {"gate": Why.ROUTER, "output": Why.TASK_HEAD, "unembed": Why.TASK_HEAD}
SMALLEST_MATRIX: Final = 32  # both sides, where only the shape tells a matrix
