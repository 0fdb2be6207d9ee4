"""All model exceptions: weights that must stay in full precision although they look like ordinary matrices.

To add an exception, add an entry to one of these tables and a line to `KEPT` in `tests/modules/test_roles.py`.

Sources: transformers 5.23 (`models/*/modeling_*.py`) and torch 2.13 (`nn/modules`), surveyed class by class. Weights
that only some containers must keep are not here: see `TensorRole.needs` and `formats.container.Container.unmet`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from loftq_cli.modules.reasons import Why

Tower = Literal["text", "vision", "audio", "other"]

TABLES: Final = (Why.EMBEDDING, Why.POSITION)  # rows are looked up, not multiplied: never a Linear

# --- names -------------------------------------------------------------------------------------------------------
# Embeddings of positions, not tokens; only the wording of the reason depends on this.
POSITION_WORDS: Final = ("position", "pos_emb", "wpe", "rel_embeddings", "relative")

# A class with such a name chooses between experts; so does a Linear with one of these names next to `experts`.
ROUTER_CLASS: Final = re.compile(r"Router|Mo[Ee]\w*Gate$")
ROUTER_NAMES: Final = ("gate", "router", "shared_expert_gate")

# Heads of classes without a base model at `base_model_prefix` (T5ForQuestionAnswering, CLIPForImageClassification).
TASK_HEAD_NAME: Final = re.compile(r"(classifier|score|qa_outputs|class_predictor|\w+_heads?)(\.|$)")

# For the model types that transformers lists under the key, PEFT 0.21 (`_convert_peft_config_moe`) treats every target
# whose name ends like this as fused experts; a shared expert or dense MLP of that name is targeted as a parameter.
PEFT_EXPERT_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
}

# Linear subclasses that override forward but still compute x @ W.T + b. bitsandbytes replaces them too.
PLAIN_LINEAR_CLASSES: Final = frozenset({"FalconLinear"})

# Part of a sub-config's key -> tower, tried in this order; the sub-model's `input_modalities` decide if none matches.
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
# Reads that a switch in the config enables: Bloom multiplies slice by slice only to reproduce Megatron's rounding.
READ_ONLY_WHEN: Final[Mapping[str, str]] = {"BloomAttention": "slow_but_exact", "BloomMLP": "slow_but_exact"}

# Reads that source analysis cannot see, because they go through a local variable: class -> module paths below it.
# Rwkv divides these weights in place when it switches to eval mode.
HIDDEN_READS: Final[Mapping[str, tuple[str, ...]]] = {
    "RwkvModel": (r"blocks\.\d+\.attention\.output", r"blocks\.\d+\.feed_forward\.value"),
}

# --- without a model class ---------------------------------------------------------------------------------------
# Only names are available. Whole words between dots, underscores and digits; the first match wins.
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
# The exact last part of the module's path: `mlp.gate` is a router, `mlp.gate_proj` is not; Meta's head is `output`.
LAST_NAMES: Final[Mapping[str, Why]] = {"gate": Why.ROUTER, "output": Why.TASK_HEAD, "unembed": Why.TASK_HEAD}
SMALLEST_MATRIX: Final = 32  # of both dimensions, if only the shape identifies a matrix
