"""Find out before the first matrix is converted if an output cannot be completed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.artifacts.summary import CARD, text_sizes
from loftq_cli.engine.output.directory import STATE, is_publishing, partial_folder
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder, check_name
from loftq_cli.machine.sizes import size_text
from loftq_cli.planning.plan import INDEX, Plan
from loftq_cli.tensorfile.hashing import hash_file

_LONGEST_NAME = 255  # bytes of one part of a path, on all common file systems
_OWN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|loftq_init/(adapter_model\.safetensors|adapter_config\.json)")
_OWN_NAMES = frozenset({"config.json", "loftq.yaml", CARD, MANIFEST, INDEX})


def planned_bytes(plan: Plan) -> int:
    """Return the bytes of all files of a plan, after checking that each of them can be written.

    Raises:
        LoftqError: a file of the source has a name that loftq uses itself or that no file system takes; or the card or
            the manifest cannot be rendered.
    """
    own = [*(file.name for file in plan.files), *plan.texts, CARD, MANIFEST]
    taken = {name.casefold() for name in own}
    for side in plan.side_files:
        _check_side_file(side.name, plan, taken)
        taken.add(side.name.casefold())
    try:
        sizes = text_sizes(plan)
    except (UnicodeEncodeError, RecursionError) as error:
        raise LoftqError(
            f"the model card or {MANIFEST} of {plan.source} cannot be written ({error}): check the names of its files "
            "and tensors and the first lines of its README.md."
        ) from error
    weights = sum(file.nbytes for file in plan.written_files)
    small = sum(map(len, plan.texts.values())) + sum(side.nbytes for side in plan.side_files)
    return weights + small + sizes.manifest + sizes.card


def _check_side_file(name: str, plan: Plan, taken: set[str]) -> None:
    parts = check_name(name, plan.source)
    if parts[0].casefold() == STATE or name.casefold() in taken:
        raise LoftqError(
            f"{plan.source} has a file {name}, which is the name of one that loftq writes itself: rename or remove it."
        )
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        raise LoftqError(f"{plan.source} has a file {name!r}, whose name is not valid UTF-8: rename it.") from None
    if longest > _LONGEST_NAME:
        raise LoftqError(f"{plan.source} has a file with a name of {longest} bytes, {name!r:.80}: shorten it.")


def planned_names(plan: Plan) -> list[str]:
    """Return the names of all files of a plan."""
    return [*(file.name for file in plan.files), *plan.texts, *(side.name for side in plan.side_files), CARD, MANIFEST]


def check_places(plan: Plan, ours: Iterable[str]) -> None:
    """Check that nothing of somebody else's is where a file of the plan will be.

    Args:
        ours: names of files that an earlier conversion wrote.

    Raises:
        UsageError: something is there.
        LoftqError: a link is on the way.
    """
    own, folder = set(ours), ConfinedFolder(plan.output)
    for name in planned_names(plan):
        path = folder.path(name)
        if path.exists() and name not in own:
            raise UsageError(f"{path} is not loftq's: move it away, or choose another -o.")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file: move it away, or choose another -o.")


def published_names(plan: Plan) -> list[str]:
    """Return the planned files that the same unfinished conversion may have moved to their final places."""
    return planned_names(plan) if is_publishing(plan.output) else []


def owned_names(output: Path, manifest: Manifest) -> list[str]:
    """Return the files of a finished conversion that are certainly loftq's.

    These are files with names that only loftq gives, and copies of the model's files whose content is as recorded.
    """
    folder = ConfinedFolder(output)
    found = []
    for name, record in manifest.files.items():
        path = folder.path(name)
        own = name in _OWN_NAMES or _OWN.fullmatch(name) is not None
        if own or (path.is_file() and path.stat().st_size == record.nbytes and hash_file(path) == record):
            found.append(name)
    return [*found, MANIFEST]


def check_space(plan: Plan, needed: int, reusable: int) -> None:
    """Check that the disk has room for the output.

    Args:
        needed: bytes of all its files.
        reusable: bytes on the same disk that the run takes over or removes.

    Raises:
        LoftqError: it has not (exit code 4).
    """
    disk = shutil.disk_usage(plan.output)
    if disk.total and needed > disk.free + reusable:
        raise LoftqError(
            f"{plan.output} needs {size_text(needed)}, but its disk has only {size_text(disk.free + reusable)} "
            "for it: make room, then run the same command again, or choose another -o.",
            exit_code=ExitCode.INCOMPLETE,
        )


def allocated(output: Path, names: Iterable[str] = ()) -> int:
    """Return the bytes that the state's files and the published files `names` take on the disk."""
    paths = [output / name for name in names]
    for folder, _, files in os.walk(partial_folder(output)):  # which does not follow links
        paths += [Path(folder) / name for name in files]
    return sum(path.lstat().st_blocks * 512 for path in paths if path.is_file() and not path.is_symlink())
