"""Read text files and split them into windows of tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import user_path
from loftq_cli.machine.panics import catch_panics
from loftq_cli.machine.pretrained import open_pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LONGEST_WINDOW = 2048
_SHORTEST_WINDOW = 4
_READ_AHEAD = 24  # characters read per requested token: more than any tokenizer merges on average
_UNBOUNDED = 10**9  # tokenizers without a limit report 10**30
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Text:
    """The text of a file, or of all files in a directory; `path` as the user gave it.

    Attributes:
        sha256: of the whole content, so that the name does not matter.
        records: the whole file, or one record per line of a jsonl file or row of a parquet file.
    """

    path: Path
    sha256: str
    records: tuple[str, ...]


def read_text(path: str | Path, flag: str) -> Text:
    """Read text from a .txt, .md, .jsonl, .json or .parquet file, or from all such files of a directory in the order of
    their names.

    If no such path exists but it may name a dataset on the Hub (ORG/NAME, or a folder or file in one), one file is
    downloaded, from the training split if there is one. A record's text is its field `text`, or else all its strings,
    one per line.

    Raises:
        UsageError: there is no such file, or none of these types.
        LoftqError: it cannot be read, or holds no text.
    """
    name, path = Path(path), _find(path, flag)
    files = sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UsageError(
            f"{flag} {path}: this directory has no {', '.join(_SUFFIXES)} file: add one, or give another path."
        )
    hashed = hashlib.sha256()
    records: list[str] = []
    for file in files:
        try:
            hashed.update(file.read_bytes())
            records += _records(file)
        except OSError as error:
            raise LoftqError(
                f"{file} cannot be read ({error.strerror}): check the file and its permissions."
            ) from error
        except (ValueError, RecursionError) as error:
            raise LoftqError(f"{file} is not readable text ({error}): give UTF-8.") from error
    if not any(record.strip() for record in records):
        raise LoftqError(f"{path} holds no text: give another file.")
    return Text(name, hashed.hexdigest(), tuple(records))


def _find(path: str | Path, flag: str) -> Path:
    """Return the file or directory; a dataset on the Hub is downloaded first."""
    local = user_path(path)
    if local.exists():
        return local
    from loftq_cli.hub.datasets import fetch_text, may_be_dataset

    if not may_be_dataset(str(path), _SUFFIXES):
        raise UsageError(f"{flag} {path}: there is no such file or directory.")
    return fetch_text(str(path), flag, _SUFFIXES)


def _records(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return [_text_of(row) for row in _parquet(file)]
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [_text_of(json.loads(line)) for line in content.splitlines() if line.strip()]
    if file.suffix == ".json":
        values = json.loads(content)
        return [_text_of(value) for value in (values if isinstance(values, list) else [values])]
    return [content]


def _parquet(file: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise LoftqError(
            f"pyarrow is needed to read {file}: run `pip install pyarrow`, or give .txt or .jsonl."
        ) from None
    return pyarrow.parquet.read_table(file).to_pylist()


def _text_of(record: Any) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        return "\n".join(text for value in record.values() if (text := _text_of(value)))
    if isinstance(record, list):
        return "\n".join(text for value in record if (text := _text_of(value)))
    return ""


@dataclass(frozen=True)
class Windows:
    """Equal windows of a text.

    Attributes:
        ids: int64 [windows, tokens]; every window starts and ends with the special tokens of a text.
        before, after: number of special tokens that the tokenizer adds to each end of a window.
    """

    ids: Tensor
    before: int
    after: int

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def make_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, positions: int | None, max_tokens: int | None, window: int | None
) -> Windows:
    """Split a text into windows that do not overlap; a rest shorter than a window is dropped.

    Args:
        positions: the model's limit; None if it has none.
        max_tokens: the number of tokens of the text to use; None uses all of it.
        window: tokens per window; by default as many as model and tokenizer allow, at most LONGEST_WINDOW.

    Raises:
        LoftqError: the text is too short, or the window too long for the model.
    """
    limit = min(positions or _UNBOUNDED, _longest_input(tokenizer) or _UNBOUNDED)
    if window is not None and window > limit:
        raise UsageError(f"--window {window} is too long: this model takes {limit} tokens.")
    length = window or min(limit, LONGEST_WINDOW)
    before, after = _frame(tokenizer)
    ids = _tokenize(text, tokenizer, max_tokens)
    content = min(length - len(before) - len(after), len(ids))
    if content < _SHORTEST_WINDOW:
        raise LoftqError(f"{text.path} has only {len(ids)} tokens: give a longer text.")
    count = len(ids) // content
    body = torch.tensor(ids[: count * content]).reshape(count, content)
    frame = [torch.tensor(part, dtype=torch.long).expand(count, -1) for part in (before, after)]
    return Windows(torch.cat([frame[0], body, frame[1]], dim=1), len(before), len(after))


def _longest_input(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of tokens that the tokenizer allows; transformers takes it from the file as it is.

    Raises:
        LoftqError: it is not a number.
    """
    limit: object = tokenizer.model_max_length
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit < math.inf:
        raise LoftqError(
            f"tokenizer_config.json in {tokenizer.name_or_path} has model_max_length {limit!r:.80}, which is not a "
            "number of tokens: correct it."
        )
    return int(limit)


def _tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[int]:
    """Return the token ids of the records, with an empty line between them."""
    ids: list[int] = []
    for part in _parts(text.records, None if max_tokens is None else _READ_AHEAD * max_tokens):
        with tokenizer_errors(tokenizer.name_or_path):
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    return ids[:max_tokens]


def _parts(records: tuple[str, ...], characters: int | None) -> Iterator[str]:
    """Yield all records as one text, split after about `characters` characters if given."""
    whole = "\n\n".join(records)
    if characters is None or characters >= len(whole):
        yield whole
        return
    cut = whole.rfind("\n", 0, characters) + 1 or characters
    yield whole[:cut]
    yield whole[cut:]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after every text."""
    with tokenizer_errors(tokenizer.name_or_path):
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model; None if there is no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def open_tokenizer(path: Path, named: str = "") -> PreTrainedTokenizerBase:
    """Open the tokenizer beside a checkpoint; error messages call the folder `named`.

    Raises:
        LoftqError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        with catch_panics():
            tokenizer: PreTrainedTokenizerBase = open_pretrained(AutoTokenizer, path)
    except Exception as error:  # transformers raises many kinds
        cause = " ".join(str(error).split())[:160]
        raise LoftqError(
            f"{named or path} holds no tokenizer that transformers can load ({cause}): put its files there."
        ) from error
    tokenizer.name_or_path = named or str(path)
    return tokenizer


@contextlib.contextmanager
def tokenizer_errors(named: str) -> Iterator[None]:
    """Turn the errors and panics of a tokenizer at work into one sentence.

    Raises:
        LoftqError: the tokenizer has failed.
    """
    try:
        with catch_panics():
            yield
    except LoftqError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        cause = " ".join(str(error).split())[:160]
        raise LoftqError(
            f"the tokenizer in {named} cannot tokenize ({cause}): correct its tokenizer.json or download it again."
        ) from error
