"""What must not be quantized although it looks like a matrix: word lists, class lists, and weights read by hand.

Sources: transformers 5.23 (`models/*/modeling_*.py`) and torch 2.13 (`nn/modules`), surveyed class by class; the packed
formats keep no tensor named `weight` that other code could read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    pass

Tower = Literal["text", "vision", "audio", "other"]

# --- reasons, as the user reads them -----------------------------------------------------------------------------
BIAS: Final = "bias"
NORM: Final = "normalization"
NOT_MATRIX: Final = "not a matrix"
CONVOLUTION: Final = "convolution"
ROUTER: Final = "router"
EXPERTS: Final = "mixture-of-experts weights"
EMBEDDING: Final = "embedding"
POSITION: Final = "position embedding"
FLOAT32: Final = "kept in float32 by transformers (_keep_in_fp32_modules)"
TASK_HEAD: Final = "task head"
REARRANGED: Final = "split, joined or transposed by transformers while loading"
PARAMETRIZED: Final = "parametrized weight"
TABLES: Final = (EMBEDDING, POSITION)  # looked up, not multiplied: no Linear whatever their shape

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

# Without a model class only names are left. Whole words between dots, underscores and digits, first hit wins.
NAME_WORDS: Final = (
    ("experts", EXPERTS),
    ("expert", EXPERTS),
    ("embed", EMBEDDING),
    ("embedding", EMBEDDING),
    ("embeddings", EMBEDDING),
    ("emb", EMBEDDING),
    ("wte", EMBEDDING),
    ("wpe", POSITION),
    ("norm", NORM),
    ("layernorm", NORM),
    ("ln", NORM),
    ("router", ROUTER),
    ("head", TASK_HEAD),
    ("heads", TASK_HEAD),
    ("classifier", TASK_HEAD),
    ("score", TASK_HEAD),
    ("conv", CONVOLUTION),
)
# The last part of the module's name exactly: `mlp.gate` routes, `mlp.gate_proj` does not; `output` ends Meta's models.
LAST_NAMES: Final[Mapping[str, str]] = {"gate": ROUTER, "output": TASK_HEAD, "unembed": TASK_HEAD}
SMALLEST_MATRIX: Final = 32  # both sides, where only the shape tells a matrix


















