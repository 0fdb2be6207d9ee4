"""Convert Meta's `tokenizer.model` to `tokenizer.json` and `tokenizer_config.json` without sentencepiece or tiktoken.

There are two formats: a sentencepiece ModelProto (Llama 1, 2, Code Llama), and tiktoken's lines of a base64 token and
its rank (Llama 3). Both are BPE; the merges follow from the vocabulary, since a token's id is its rank.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.base import SideFile
from loftq_cli.checkpoint.files import MAX_TOKENIZER
from loftq_cli.checkpoint.local import check_file
from loftq_cli.checkpoint.side_files import made_file
from loftq_cli.errors import LoftqError
from loftq_cli.machine.regular_file import read_bounded

# llama3/tokenizer.py, Tokenizer.pat_str
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BEGIN, _END, _TURN, _MESSAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
_BPE = 2  # TrainerSpec.ModelType
_MAX_TOKEN = 1024  # characters or bytes of a token; merges are sought at every place within it
_MAX_SPECIAL = 65_536  # Llama 3 has 256
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.Type


@dataclass(frozen=True)
class Piece:
    """One token of a sentencepiece model."""

    text: str
    kind: int


@dataclass(frozen=True)
class MetaTokenizer:
    """The content of tokenizer.model: `pieces` of a sentencepiece model by id, or tiktoken's tokens by rank."""

    path: Path
    pieces: tuple[Piece, ...] = ()
    ranks: tuple[bytes, ...] = ()

    @property
    def tiktoken(self) -> bool:
        return bool(self.ranks)

    @property
    def bos(self) -> int:
        """Return the id of the beginning token; the end token follows it."""
        return len(self.ranks) if self.ranks else 1

    def files(self, version: str, vocab: int, context: int) -> tuple[SideFile, ...]:
        """Return tokenizer.json, tokenizer_config.json and generation_config.json.

        Args:
            vocab: number of rows of the embedding, which includes tiktoken's special tokens.

        Raises:
            LoftqError: the tokenizer does not belong to the embedding.
        """
        if not len(self.pieces or self.ranks) <= vocab:
            raise LoftqError(
                f"{self.path} has {len(self.pieces or self.ranks)} tokens but the embedding has {vocab} rows: use "
                "the tokenizer.model that came with these weights."
            )
        generation: dict[str, Any] = {"bos_token_id": self.bos, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        if self.ranks:
            special = special_tokens(version, vocab - len(self.ranks))
            # A base model never generates the end tokens of chat models, so all of them can be stop tokens.
            ends = [self.bos + special.index(token) for token in (_END, _MESSAGE, _TURN) if token in special]
            generation["eos_token_id"] = ends
            tokenizer, config = _llama3_tokenizer(self.ranks, special), _llama3_config(context)
        else:
            generation["eos_token_id"] = self.bos + 1
            tokenizer, config = _llama2_tokenizer(self.pieces), _llama2_config(self.pieces, context)
        return (
            made_file("tokenizer.json", tokenizer.encode()),
            made_file("tokenizer_config.json", _json(config)),
            made_file("generation_config.json", _json(generation)),
        )


def read_tokenizer(path: Path) -> MetaTokenizer:
    """Read a tokenizer in either format.

    Raises:
        LoftqError: the file is in neither format.
    """
    try:
        check_file(path)
        content = read_bounded(path, MAX_TOKENIZER)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            return MetaTokenizer(path, ranks=_read_ranks(content))
        return MetaTokenizer(path, pieces=_read_pieces(content))
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise LoftqError(f"{path} is not a Llama tokenizer ({error}): download it again.") from error
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error


def special_tokens(version: str, count: int) -> list[str]:
    """Return Llama 3's special tokens, which follow the ranks; 3.1 named some reserved ones (see llama-models)."""
    names: Sequence[str]
    if version == "3":
        names = (_BEGIN, _END, "", "", "", "", "<|start_header_id|>", "<|end_header_id|>", "", _TURN)
    else:
        names = (_BEGIN, _END, "", "", "<|finetune_right_pad_id|>", "", "<|start_header_id|>", "<|end_header_id|>",
                 _MESSAGE, _TURN, "<|python_tag|>")  # fmt: skip
    if count > _MAX_SPECIAL:
        raise LoftqError(
            f"the embedding has {count} rows for special tokens, more than any Llama has: use the tokenizer.model that "
            "came with these weights."
        )
    if count < len(names):
        raise LoftqError(
            f"the embedding has {count} rows for special tokens but Llama {version} has {len(names)}: use the "
            "tokenizer.model that came with these weights, or give --meta-version."
        )
    padded = [*names, *[""] * (count - len(names))]
    numbers = iter(range(count))
    return [name or f"<|reserved_special_token_{next(numbers)}|>" for name in padded]


def _llama2_tokenizer(pieces: Sequence[Piece]) -> str:
    """Return a tokenizer with sentencepiece's ids: a space is always prepended, even if the text starts with one, and
    the text is not split into words first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text in vocab
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    unknown, begin = pieces[0].text, pieces[1].text
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
        same = [AddedToken(p.text, normalized=False, special=kind != _USER_DEFINED) for p in pieces if p.kind == kind]
        tokenizer.add_tokens(same)
    tokenizer.post_processor = _begin_with(begin, 1)
    return tokenizer.to_str(pretty=True)


def _begin_with(token: str, number: int) -> Any:
    from tokenizers import processors

    pair = f"{token}:0 $A:0 {token}:1 $B:1"
    return processors.TemplateProcessing(single=f"{token} $A", pair=pair, special_tokens=[(token, number)])


def _llama2_config(pieces: Sequence[Piece], context: int) -> dict[str, Any]:
    # Not LlamaTokenizer: transformers 5 would rebuild it and not prepend a space to a text that starts with one.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": pieces[0].text,
        "bos_token": pieces[1].text,
        "eos_token": pieces[2].text,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }


def _llama3_tokenizer(ranks: Sequence[bytes], special: Sequence[str]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()  # type: ignore[no-untyped-call]
    rank_of = {token: i for i, token in enumerate(ranks)}

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in rank_of and right in rank_of]
        known.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += [(text(left), text(right)) for left, right in known]
    vocab = {text(token): i for i, token in enumerate(ranks)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated", invert=False)
    letters_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([level, _begin_with(_BEGIN, len(ranks))])
    return tokenizer.to_str(pretty=True)


def _llama3_config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BEGIN,
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }


def _read_ranks(content: bytes) -> tuple[bytes, ...]:
    """Parse lines of `base64 rank`, where ranks count from 0."""
    pairs = [line.split() for line in content.splitlines() if line.strip()]
    if any(len(pair) != 2 or int(pair[1]) != i for i, pair in enumerate(pairs)):
        raise ValueError("the ranks are not 0, 1, 2 …")
    tokens = tuple(base64.b64decode(token, validate=True) for token, _ in pairs)
    if any(len(token) > _MAX_TOKEN for token in tokens):
        raise ValueError("a token is too long")
    return tokens


def _read_pieces(content: bytes) -> tuple[Piece, ...]:
    """Parse a ModelProto: pieces = 1 {piece = 1, score = 2, type = 3}, trainer_spec = 2 {model_type = 3}."""
    pieces, model_type = [], 1
    for number, value in _fields(content):
        if number == 1:
            piece = {1: b"", 3: 1, **dict(_fields(value))}
            pieces.append(Piece(piece[1].decode(), int(piece[3])))
        elif number == 2:
            model_type = dict(_fields(value)).get(3, 1)
    if len(pieces) < 3 or len({piece.text for piece in pieces}) < len(pieces) or model_type != _BPE:
        raise ValueError("not a sentencepiece BPE model")
    if any(len(piece.text) > _MAX_TOKEN for piece in pieces):
        raise ValueError("a token is too long")
    return tuple(pieces)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yield the field numbers and raw values (int or bytes) of a protobuf message."""
    if not isinstance(message, bytes):
        raise ValueError("not a protobuf message")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, value = tag & 7, None
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("not a protobuf message")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise ValueError("not a protobuf message")


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
