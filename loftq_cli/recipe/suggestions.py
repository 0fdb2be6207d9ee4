"""What a user most likely meant by an invalid value of a recipe field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

# Words of other tools, by field.
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "data_type": {
        "nf2": "nf with bits 2",
        "nf3": "nf with bits 3",
        "nf4": "nf with bits 4",
        "normal": "nf",
        "normalfloat": "nf",
        "int2": "int with bits 2",
        "int3": "int with bits 3",
        "int4": "int with bits 4",
        "int8": "int with bits 8",
    },
    "format": {
        "bitsandbytes": "bnb",
        "nf4": "bnb",
        "gptqmodel": "gptq",
        "autogptq": "gptq",
        "auto-gptq": "gptq",
        "llmcompressor": "compressed-tensors",
        "llm-compressor": "compressed-tensors",
        "vllm": "compressed-tensors",
        "llama.cpp": "gguf",
        "q4_0": "gguf with bits 4",
        "q4_1": "gguf with bits 4",
        "q8_0": "gguf with bits 8",
        "q4_k_m": "gguf with bits 4",
        "q4_k": "gguf with bits 4",
    },
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    "method": {"qalora": "qa-lora", "none": "qlora", "plain": "qlora", "rtn": "qlora"},
}


def suggestion(name: str, types: Sequence[Any], choices: Sequence[Any], value: object) -> str:
    """Return the value of field `name` that was most likely meant, with how to write it; "" if nothing is close.

    Args:
        types, choices: types of the field's values, and the valid values if they are listed.
    """
    if not isinstance(value, str):
        return ""
    text = value.strip().lower()
    if meant := _ELSEWHERE.get(name, {}).get(text):
        return meant
    if (float in types or int in types) and _is_number(text):
        return f"{text} without quotes"
    names = [choice for choice in choices if isinstance(choice, str)]
    return next(iter(difflib.get_close_matches(text, names, n=1, cutoff=0.7)), "")


def _is_number(text: str) -> bool:
    return text.isascii() and text.replace(".", "", 1).isdecimal() and len(text) < 10
