"""Shared by all sources that are directories: reading JSON files and the indexes of sharded weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from loftq_cli.checkpoint.base import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import ConfinedFolder, check_name, real_path

_MAX_JSON = 100_000_000
ADAPTER_CONFIG = "adapter_config.json"  # of a PEFT adapter
CONFIG_HINT = "a Hugging Face checkpoint has one beside its weights"


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        hint: describes the file, for the message if it is missing.

    Raises:
        LoftqError: the file is missing, or is not a JSON object.
    """
    try:
        check_file(path)
        if path.stat().st_size > _MAX_JSON:
            raise LoftqError(f"{path} has {path.stat().st_size} bytes, too many for such a file: download it again.")
        content = json.loads(path.read_bytes())
        json.dumps(content, ensure_ascii=False).encode()  # JSON can hold lone surrogates, files cannot
    except FileNotFoundError:
        raise LoftqError(f"{path} is missing: {hint}.") from None
    except (ValueError, RecursionError) as error:
        raise LoftqError(f"{path} is not valid JSON ({error}): download it again.") from error
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error
    if not isinstance(content, dict):
        raise LoftqError(f"{path} is not a JSON object: download it again.")
    return content


def locate(directory: Path, name: str) -> tuple[ConfinedFolder, str]:
    """Return the folder and the name to open a model's file by. Only the file itself may be a link, to another file of
    the model or, in the Hub's cache, to one of this model's blobs.

    Raises:
        LoftqError: the name or a link leads out of the model.
    """
    inside = ConfinedFolder(directory)
    *folders, _ = check_name(name, directory)
    if folders:
        inside.path("/".join(folders))
    path = directory / name
    if not path.is_symlink():
        return inside, name
    real = real_path(path)
    for root in (real_path(directory), _blobs_of(directory)):
        if root is not None and real.is_relative_to(root):
            return ConfinedFolder(root), real.relative_to(root).as_posix()
    raise LoftqError(f"{path} is a link to {real}, outside of the model: put the file itself there.")


def _blobs_of(directory: Path) -> Path | None:
    """Return the folder that the links of a snapshot in the Hub's cache lead to; None for other directories."""
    for folder in (directory, *directory.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            return real_path(repository / "blobs")
    return None


def check_file(path: Path) -> None:
    """Refuse anything but a regular file, and links out of the directory: their targets were not given to us and would
    end up in an output that may be published. The Hub's cache itself consists of links into its blobs.

    Raises:
        FileNotFoundError: nothing has this name.
        LoftqError: it is not a file, or lies outside of the directory.
    """
    if not path.is_file():
        if path.is_symlink() or path.exists():
            raise LoftqError(f"{path} is not a file, or is a broken link: download it again.")
        raise FileNotFoundError(path)
    locate(path.parent, path.name)


def adapter_base(directory: Path) -> str | None:
    """Return the base model of the PEFT adapter in a directory, `an unnamed model` if it names none; None if there is
    no adapter.

    Raises:
        LoftqError: the adapter's config is damaged.
    """
    if not (directory / ADAPTER_CONFIG).exists():
        return None
    return str(
        read_json(directory / ADAPTER_CONFIG, "PEFT writes it").get("base_model_name_or_path") or "an unnamed model"
    )


def read_index(path: Path, suffix: str, present: Collection[str] | None = None) -> dict[str, str]:
    """Return the tensor → shard map of `*.index.json`; every shard is a file beside it that ends in `suffix`.

    Args:
        present: the existing files, if the shards are on the Hub and not beside the index.

    Raises:
        LoftqError: it is damaged, points elsewhere, or names a shard that is missing.
    """
    index = read_json(path, "it names the shards").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise LoftqError(f"{path} has no weight_map of names to files: download it again.")
    for file in sorted(set(index.values())):
        if Path(file).name != file or not file.endswith(suffix) or not file.isprintable():
            raise LoftqError(
                f"{path} names {file!r}, which is not a shard of this directory: download the index again."
            )
        if not ((path.parent / file).is_file() if present is None else file in present):
            raise LoftqError(f"shard {file} of {path.parent} is missing: finish the download and try again.")
    return index


def find_files(directory: Path, single: str, pattern: str) -> list[str]:
    """Return the weight files of a directory without an index: the single file, or else all that match `pattern`,
    without adapters and Meta's files.

    Raises:
        LoftqError: by their names (`…-of-00003`) some shards are missing.
    """
    return pick_files(directory, [path.name for path in directory.iterdir() if path.is_file()], single, pattern)


def pick_files(where: PurePath, names: Iterable[str], single: str, pattern: str) -> list[str]:
    """`find_files` for a list of names; `where` is the folder, for messages."""
    names = sorted(names)
    if single in names:  # which need not match `pattern`
        return [single]
    files = [name for name in names if fnmatchcase(name, pattern) and not name.startswith(("adapter", "consolidated"))]
    numbered = [match for file in files if (match := re.search(r"-of-0*(\d+)\.", file))]
    if numbered and len(numbered) < int(numbered[0][1]):
        raise LoftqError(
            f"{where} holds {len(numbered)} of {numbered[0][1]} shards: finish the download and try again."
        )
    return files


def collect(index_path: Path, index: Mapping[str, str] | None, found: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of all files by name; an index decides which of two copies counts.

    Raises:
        LoftqError: a tensor occurs twice, or is not in the file that the index names.
    """
    tensors: dict[str, TensorInfo] = {}
    for info in found:
        if index is not None and index.get(info.name) not in (None, info.file):
            continue
        if info.name in tensors:
            raise LoftqError(f"tensor {info.name} is in both {tensors[info.name].file} and {info.file}: remove one.")
        tensors[info.name] = info
    for name, file in (index or {}).items():
        if name not in tensors:
            raise LoftqError(f"{index_path} says {name} is in {file}, which does not hold it: download again.")
    return tensors
