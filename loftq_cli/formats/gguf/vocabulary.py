"""Convert a vocabulary from tokenizer.json to GGUF key-values: byte-level BPE, and SentencePiece-like BPE.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loftq_cli.errors import LoftqError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# ggml's names of the regular expression that splits words, by a part of it that the others lack.
_PARTS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}|": "qwen2"}


def vocabulary_values(tokenizer: bytes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key-values of `tokenizer.ggml.*`; none for an unsupported kind of tokenizer.

    Tokens that were added without resizing the embedding are left out, because the model cannot use them and GGUF has
    exactly one token for each row.

    Raises:
        LoftqError: the vocabulary itself has more tokens than the embedding has rows.
    """
    try:
        content = json.loads(tokenizer)
        model = content["model"]
        splitting = _splitting(content)
        if model["type"] != "BPE" or splitting is None:
            return {}
        return _values(content, splitting, config)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}


def _splitting(content: Mapping[str, Any]) -> str | None:
    """Return the name of the word splitting; "" for SentencePiece, None for one that is not supported."""
    if content["model"].get("byte_fallback"):
        return ""
    before = content.get("pre_tokenizer") or {}
    if before.get("type") == "ByteLevel":
        return "gpt-2" if before.get("use_regex", True) else None
    text = json.dumps(before).replace("\\\\", "\\")
    return next((name for piece, name in _PARTS.items() if piece in text), None)


def _values(content: Mapping[str, Any], splitting: str, config: Mapping[str, Any]) -> dict[str, Any]:
    model, size = content["model"], int(config["vocab_size"])
    merges = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for token, place in model["vocab"].items():
        if not 0 <= place < size:
            raise LoftqError(
                f"tokenizer.json gives the token {token!r:.60} the number {place}, but the model has only {size} "
                "embedding rows: resize the model's embeddings to the tokenizer, or use --format packed."
            )
        is_byte = not splitting and len(token) == 6 and token.startswith("<0x")
        tokens[place], kinds[place] = token, _BYTE if is_byte else _NORMAL
    for added in content.get("added_tokens", ()):
        place = added["id"]
        if not 0 <= place < size:
            continue
        tokens[place], kinds[place] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    if model.get("unk_token"):
        kinds[tokens.index(model["unk_token"])] = _UNKNOWN
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if splitting else "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    if splitting:
        found |= {"tokenizer.ggml.pre": splitting, "tokenizer.ggml.merges": merges}
    else:
        # SentencePiece merges the pair with the highest score first.
        rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
        found["tokenizer.ggml.scores"] = [
            rank.get(token, -1e6 if kind == _NORMAL else 0.0) for token, kind in zip(tokens, kinds)
        ]
    for name in ("bos", "eos"):
        chosen = config.get(f"{name}_token_id")
        chosen = chosen[0] if isinstance(chosen, list) else chosen
        if isinstance(chosen, int) and 0 <= chosen < size:
            found[f"tokenizer.ggml.{name}_token_id"] = chosen
    return found
