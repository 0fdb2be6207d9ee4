"""Meta's Llama in a page, written from its published model.py: complex rotary embedding on neighbouring pairs.

Independent of transformers and of loftq; it tells what a converted checkpoint has to compute. Also writes such models
the way Meta distributes them.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. 1234 foxes, they'll say: it's NOT a dog!\n"
    "Grüße aus Köln, und «Zürich» … 你好。 A second line follows   with  blanks.\n"
) * 20


@dataclass(frozen=True)
class Reference:
    """A model with Meta's names and the keys of params.json."""

    params: Mapping[str, object]
    state: Mapping[str, Tensor]

    def logits(self, ids: Tensor) -> Tensor:
        """[tokens] → [tokens, vocabulary], float32."""
        heads, dim = int(self.params["n_heads"]), int(self.params["dim"])
        kv = int(self.params.get("n_kv_heads") or heads)
        turn = self._rotation(len(ids), dim // heads)
        mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
        h = self.state["tok_embeddings.weight"][ids]
        for i in range(int(self.params["n_layers"])):
            w = {name: self.state[f"layers.{i}.{name}.weight"] for name in LAYER_NAMES}
            x = self._norm(h, w["attention_norm"])
            q = rotate((x @ w["attention.wq"].T).view(len(ids), heads, -1), turn)
            k = rotate((x @ w["attention.wk"].T).view(len(ids), kv, -1), turn)
            v = (x @ w["attention.wv"].T).view(len(ids), kv, -1)
            k, v = (t.repeat_interleave(heads // kv, 1).transpose(0, 1) for t in (k, v))
            scores = q.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(dim // heads) + mask
            attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), dim)
            h = h + attended @ w["attention.wo"].T
            x = self._norm(h, w["ffn_norm"])
            gate = F.silu(x @ w["feed_forward.w1"].T) * (x @ w["feed_forward.w3"].T)
            h = h + gate @ w["feed_forward.w2"].T
        return self._norm(h, self.state["norm.weight"]) @ self.state["output.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(self.params["norm_eps"])) * weight

    def _rotation(self, length: int, width: int) -> Tensor:
        theta = float(self.params.get("rope_theta", 10000.0))
        freqs = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
        if self.params.get("use_scaled_rope"):
            freqs = torch.tensor([scaled_frequency(float(freq)) for freq in freqs])
        angles = torch.outer(torch.arange(length).float(), freqs)
        return torch.polar(torch.ones_like(angles), angles)


LAYER_NAMES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3", "attention_norm", "ffn_norm",
)  # fmt: skip


def scaled_frequency(freq: float, factor: float = 8.0) -> float:
    """Llama 3.1's apply_scaling: low frequencies divided by 8, smooth between wavelengths 2048 and 8192."""
    length = 2 * math.pi / freq
    if length < 8192 / 4:
        return freq
    if length > 8192 / 1:
        return freq / factor
    smooth = (8192 / length - 1) / (4 - 1)
    return (1 - smooth) * freq / factor + smooth * freq


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """[tokens, heads, d] as complex numbers (2i, 2i+1), times [tokens, d/2]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, None]).flatten(2)


def make_reference(vocab: int, tied: bool = False, **params: object) -> Reference:
    """Random weights, large enough that a wrong order of rows shows in the logits."""
    dim, heads = int(params["dim"]), int(params["n_heads"])
    kv_rows = int(params.get("n_kv_heads") or heads) * (dim // heads)
    hidden = 3 * dim
    torch.manual_seed(5)
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv_rows, dim),
        "attention.wv": (kv_rows, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    state = {"tok_embeddings.weight": torch.randn(vocab, dim), "norm.weight": 1 + 0.1 * torch.randn(dim)}
    for i in range(int(params["n_layers"])):
        state |= {f"layers.{i}.{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        state |= {f"layers.{i}.{name}.weight": 1 + 0.1 * torch.randn(dim) for name in ("attention_norm", "ffn_norm")}
    state["output.weight"] = state["tok_embeddings.weight"] if tied else torch.randn(vocab, dim) / dim**0.5
    return Reference({"norm_eps": 1e-5, "vocab_size": -1, **params}, state)


def write_meta(reference: Reference, folder: Path, ranks: int, embedding_dim: int) -> Path:
    """Write consolidated.NN.pth as fairscale's model parallelism does, and params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(dict(reference.params)))
    split = {name: 0 for name in ("wq", "wk", "wv", "w1", "w3", "output")} | {"wo": 1, "w2": 1}
    split["tok_embeddings"] = embedding_dim
    for rank in range(ranks):
        state = {"rope.freqs": torch.ones(4)}
        for name, tensor in reference.state.items():
            dim = split.get(name.split(".")[-2])
            state[name] = tensor if dim is None else tensor.chunk(ranks, dim)[rank].clone()
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    return folder


def sentencepiece_model(vocab: int) -> bytes:
    """A BPE model with Llama's settings, trained on a few lines."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=vocab, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=3, character_coverage=0.99,
    )  # fmt: skip
    return model.getvalue()


def tiktoken_ranks(merges: int) -> list[bytes]:
    """Return 256 bytes and the most frequent pairs, learned one by one."""
    ranks = [bytes([i]) for i in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(LLAMA3_PATTERN, TEXT[:400])]
    for _ in range(merges):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(best[0] + best[1])
        words = [merge(word, best) for word in words]
    return ranks


def tiktoken_file(ranks: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))


def tiktoken_encode(text: str, ranks: list[bytes]) -> list[int]:
    """Byte-pair encoding as tiktoken does it: the pair with the lowest rank first; whole words at once."""
    rank_of = {token: i for i, token in enumerate(ranks)}
    ids = []
    for word in regex.findall(LLAMA3_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            known = [pair for pair in pairwise(parts) if pair[0] + pair[1] in rank_of]
            if not known:
                break
            parts = merge(parts, min(known, key=lambda pair: rank_of[pair[0] + pair[1]]), once=True)
        ids += [rank_of[part] for part in parts]
    return ids


def merge(parts: list[bytes], pair: tuple[bytes, bytes], once: bool = False) -> list[bytes]:
    merged, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
            if once:
                return merged + parts[i:]
        else:
            merged.append(parts[i])
            i += 1
    return merged
