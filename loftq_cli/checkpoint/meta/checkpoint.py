"""Meta's own format: `consolidated.NN.pth`, one per model-parallel rank, with `params.json` and `tokenizer.model`.

The checkpoint is presented with transformers' Llama names, config and tokenizer. Every rank contains a slice of each
matrix, along a dimension that follows from the shapes. Rows of wq and wk are reordered, because Meta's rotary embedding
rotates adjacent pairs (2i, 2i+1) and transformers' rotates halves (i, i + d/2).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.base import SideFile, TensorInfo, fingerprint
from loftq_cli.checkpoint.meta.config import (
    MetaParams,
    MetaShape,
    context_length,
    infer_version,
    make_config,
    read_params,
)
from loftq_cli.checkpoint.meta.tokenizer import MetaTokenizer, read_tokenizer
from loftq_cli.checkpoint.pickled import TensorReader, local_pickles
from loftq_cli.checkpoint.side_files import find_side_files, local_file
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder

_COMPARED = 64  # evenly spaced rows to compare to detect tied matrices
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Slices:
    """The location of a matrix: the tensor `name` in each of `files`, concatenated along `dim`.

    Attributes:
        heads: number of heads whose rows are reordered for transformers' rotary embedding; 0 keeps the order.
    """

    name: str
    files: tuple[str, ...]
    dim: int
    heads: int


@dataclass(frozen=True)
class MetaCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over the ranks' files."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    reader: TensorReader
    slices: Mapping[str, Slices]
    tokenizer: MetaTokenizer
    version: str

    def read(self, name: str) -> Tensor:
        info, slices = self.tensors[name], self.slices[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        at = 0
        for file in slices.files:
            size = self.reader.shape(file, slices.name)[slices.dim]
            self.reader.copy(file, slices.name, tensor.narrow(slices.dim, at, size))
            at += size
        return permute(tensor, slices.heads) if slices.heads else tensor

    def read_piece(self, name: str, index: int) -> Tensor:
        return self.read(name)[index].clone()

    def side_files(self) -> tuple[SideFile, ...]:
        """Keep existing files: a directory may contain both Meta's and Hugging Face's tokenizer."""
        found = {side.name: side for side in find_side_files(self.path)}
        made = self.tokenizer.files(self.version, self.config["vocab_size"], context_length(self.version))
        if "tokenizer.json" in found:
            made = tuple(side for side in made if not side.name.startswith("tokenizer"))
        found.pop("tokenizer.model", None)
        if not self.tokenizer.tiktoken:  # other tools need it; tiktoken's would be mistaken for sentencepiece's
            found["tokenizer.model"] = local_file(self.tokenizer.path, "tokenizer.model")
        return tuple({**{side.name: side for side in made}, **found}.values())

    def cancel(self) -> None:
        self.reader.cancel()

    def close(self) -> None:
        self.reader.close()


def find_meta(directory: Path) -> Path | None:
    """Return the folder with Meta's weights: the directory itself, or `original` as in Hugging Face's repositories.

    Raises:
        LoftqError: `original` is a link, which may lead out of the directory.
    """
    if (directory / "params.json").is_file() and _ranks(directory):
        return directory
    original = directory / "original"
    if not (original / "params.json").is_file() or not _ranks(original):
        return None
    return ConfinedFolder(directory).path("original")


def open_meta(directory: Path, folder: Path, version: str = "auto") -> MetaCheckpoint:
    """Read params.json, the tokenizer and every rank's list of tensors.

    Args:
        folder: the folder with the weights, from `find_meta`.
        version: "1", "2", "code", "3", "3.1", "3.2"; "auto" infers it.

    Raises:
        LoftqError: a file is missing or damaged, or the files contradict each other.
        UsageError: the version does not match the tokenizer.
    """
    files = _ranks(folder)
    reader = local_pickles(folder, files, whole=len(files))
    return read_ranks(directory, folder, files, reader, version)


def read_ranks(
    directory: Path, folder: Path, files: Sequence[str], reader: TensorReader, version: str = "auto"
) -> MetaCheckpoint:
    """Return the checkpoint in `files`, which `reader` reads; `folder` contains params.json.

    Raises:
        LoftqError, UsageError: as `open_meta`.
    """
    params = read_params(folder / "params.json")
    _check_ranks(folder, files)
    infos = {file: {info.name: info for info in reader.infos(file)} for file in files}
    tokenizer = read_tokenizer(_find_tokenizer(folder))
    tied = _is_tied(reader, infos[files[0]], files[0])
    tensors: dict[str, TensorInfo] = {}
    slices: dict[str, Slices] = {}
    for source, target in _names(params, tied):  # which ends at the first name that a rank lacks
        pieces = [_piece(folder, infos[file], file, source) for file in files]
        tensors[target], slices[target] = _join(target, pieces, params)
    _check_unknown(folder, infos[files[0]], params)
    shape = MetaShape(
        vocab=tensors["model.embed_tokens.weight"].shape[0],
        intermediate=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        tied=tied,
        tiktoken=tokenizer.tiktoken,
        folder=str(directory),
    )
    chosen = infer_version(params, shape) if version == "auto" else version
    if chosen.startswith("3") != tokenizer.tiktoken:
        raise UsageError(f"--meta-version {chosen} does not match {tokenizer.path}: choose another or leave it out.")
    dtype = str(tensors["model.layers.0.mlp.gate_proj.weight"].dtype).removeprefix("torch.")
    config = make_config(params, shape, chosen, dtype, tokenizer.bos)
    return MetaCheckpoint(directory, tensors, config, fingerprint(config, tensors), reader, slices, tokenizer, chosen)


def permute(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (pair, 2) to (2, pair): [heads · d, in] → the same shape."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _ranks(folder: Path) -> tuple[str, ...]:
    """Return the files of the ranks in order."""
    return tuple(sorted(path.name for path in folder.glob("consolidated.*.pth")))


def _check_ranks(folder: Path, files: Sequence[str]) -> None:
    """Check that no rank is missing.

    Raises:
        LoftqError: the numbers of the files are not 0, 1, 2 ….
    """
    numbers = [int(match[1]) if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", file)) else -1 for file in files]
    if sorted(numbers) != list(range(len(files))):
        raise LoftqError(f"{folder} contains {', '.join(files)}, which are not all the ranks: finish the download.")


def _find_tokenizer(folder: Path) -> Path:
    """Return the path of tokenizer.model. Meta's download script puts it one level up, since all sizes share it."""
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise LoftqError(f"{folder} has no tokenizer.model: put the one that came with these weights beside params.json.")


def _names(params: MetaParams, tied: bool) -> Iterator[tuple[str, str]]:
    """Yield Meta's names and transformers' names one by one, since params.json may claim any number of layers."""
    for source, target in _TOP.items():
        if source != "output" or not tied:
            yield f"{source}.weight", f"{target}.weight"
    for i in range(params.n_layers):
        for source, target in _LAYER.items():
            yield f"layers.{i}.{source}.weight", f"model.layers.{i}.{target}.weight"


def _is_tied(reader: TensorReader, infos: Mapping[str, TensorInfo], file: str) -> bool:
    """True if the output matrix is missing or repeats the embedding, as in the small Llama 3.2 models."""
    embedding, output = infos.get("tok_embeddings.weight"), infos.get("output.weight")
    if embedding is None or output is None:
        return output is None
    if embedding.shape != output.shape or embedding.dtype != output.dtype or len(embedding.shape) != 2:
        return False
    rows = range(0, embedding.shape[0], max(1, embedding.shape[0] // _COMPARED))
    return all(torch.equal(reader.row(file, embedding.name, i), reader.row(file, output.name, i)) for i in rows)


def _piece(folder: Path, infos: Mapping[str, TensorInfo], file: str, name: str) -> TensorInfo:
    if name not in infos:
        raise LoftqError(
            f"{folder / file} does not contain {name}: check that params.json belongs to it, or download it again."
        )
    return infos[name]


def _join(target: str, pieces: Sequence[TensorInfo], params: MetaParams) -> tuple[TensorInfo, Slices]:
    """Return the location of the whole tensor, given its slices.

    Raises:
        LoftqError: the slices do not add up to the shape that params.json describes.
    """
    first, expected = pieces[0], _expected(target, params)
    if all(info.dtype == first.dtype and len(info.shape) == len(expected) for info in pieces):
        for used, dim in itertools.product(_groups(pieces), range(len(expected))):
            shape = _joined(used, dim)
            if shape is not None and all(want in (None, has) for want, has in zip(expected, shape)):
                heads = {"q_proj": params.n_heads, "k_proj": params.n_kv_heads}.get(target.split(".")[-2], 0)
                whole = TensorInfo(target, first.dtype, shape, first.file, first.start)
                return whole, Slices(first.name, tuple(info.file for info in used), dim, heads)
    shapes = ", ".join(str(list(info.shape)) for info in pieces[:3])
    raise LoftqError(
        f"{first.name} has shape {shapes} in {len(pieces)} files, which does not match the sizes in params.json: check "
        "that all consolidated.*.pth are present and belong together."
    )


def _groups(pieces: Sequence[TensorInfo]) -> list[Sequence[TensorInfo]]:
    """Return the candidate subsets of ranks to join: all of them; every n-th, in case neighbours contain the same key
    and value heads; and one, in case all contain the same data."""
    count = len(pieces)
    return [pieces[::step] for step in range(1, count + 1) if count % step == 0]


def _joined(pieces: Sequence[TensorInfo], dim: int) -> tuple[int, ...] | None:
    """Return the shape of the pieces concatenated along `dim`, or None if the other sizes differ."""
    rests = {(*info.shape[:dim], *info.shape[dim + 1 :]) for info in pieces}
    first = pieces[0].shape
    return (*first[:dim], sum(info.shape[dim] for info in pieces), *first[dim + 1 :]) if len(rests) == 1 else None


def _expected(target: str, params: MetaParams) -> tuple[int | None, ...]:
    """Return the shape of the whole tensor, with None for sizes that only the weights determine."""
    keys = params.n_kv_heads * params.head_dim
    return {
        "q_proj": (params.dim, params.dim),
        "k_proj": (keys, params.dim),
        "v_proj": (keys, params.dim),
        "o_proj": (params.dim, params.dim),
        "gate_proj": (None, params.dim),
        "up_proj": (None, params.dim),
        "down_proj": (params.dim, None),
        "embed_tokens": (None, params.dim),
        "lm_head": (None, params.dim),
    }.get(target.split(".")[-2], (params.dim,))


def _check_unknown(folder: Path, infos: Mapping[str, TensorInfo], params: MetaParams) -> None:
    known = {*(name for name, _ in _names(params, tied=False)), "rope.freqs"}
    unknown = [name for name in infos if name not in known]
    if unknown:
        raise LoftqError(
            f"{folder} contains {unknown[0]}, which a Llama 1 to 3 with {params.n_layers} layers does not have: give "
            "the model in Hugging Face's format."
        )
