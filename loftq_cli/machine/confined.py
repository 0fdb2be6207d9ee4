"""A folder that nothing leaves: names are relative and normal, and no link is followed on the way.

Names of files come from manifests, indexes and repositories, and folders can hold links that somebody else made. Every
open, unlink, rename and listing of an output, its state or a staging folder goes through `ConfinedFolder`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loftq_cli.errors import LoftqError

_LEFT_BY_LINK = (errno.ELOOP, errno.ENOTDIR)


def check_name(name: str, where: object) -> tuple[str, ...]:
    """Return the parts of a relative, normal name such as `loftq_init/adapter_config.json`.

    Args:
        where: the folder or the file that the name comes from, for the message.

    Raises:
        LoftqError: the name is absolute or empty, or has a part that is empty, `.` or `..`.
    """
    parts = tuple(name.split("/"))
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise LoftqError(
            f"{where} names the file {name!r:.120}, which would lie outside of its folder: remove that name."
        )
    return parts


def user_path(path: str | Path) -> Path:
    """Return the path with `~` replaced by the home directory; left as it is for a user who does not exist."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """Return the absolute path without links. A link that leads to itself stays; `Path.resolve` may raise for it."""
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class ConfinedFolder:
    """Access to the files below `root`. The root itself may be reached through links; nothing below it may be one.

    Raises:
        LoftqError: from every method, where a name or a link leads out of the folder.
        OSError: whatever the file system says.
    """

    root: Path

    def path(self, name: str) -> Path:
        """Return the path of a name after checking that no existing part of it is a link. It need not exist."""
        place = self.root
        for part in check_name(name, self.root):
            place = place / part
            if place.is_symlink():
                raise self._linked(place)
        return place

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
        """Return a file descriptor; parent folders are opened one by one, and a link at any of them ends it."""
        *folders, leaf = check_name(name, self.root)
        with self._descend(folders) as parent:
            try:
                return os.open(leaf, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)
            except OSError as error:
                raise self._explained(error, name) from error

    def read(self, name: str) -> BinaryIO:
        """Open a regular file for reading; a FIFO, a socket or a device is refused without being waited for."""
        handle = self.open(name, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise LoftqError(f"{self.root / name} is not a regular file: remove it.")
        return os.fdopen(handle, "rb")

    def write(self, name: str) -> BinaryIO:
        """Create a file, in place of a regular file that is there; missing folders on the way are made.

        The old file is removed, not emptied: it may have another name outside (a hard link).
        """
        self.make_parents(name)
        if self.path(name).exists():
            self.read(name).close()  # refuses what is not a regular file
            self.unlink(name)
        return os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def make_parents(self, name: str) -> None:
        """Make the folders that a name lies in."""
        folders: list[str] = []
        for part in check_name(name, self.root)[:-1]:
            with self._descend(folders) as parent, contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=parent)
            folders.append(part)

    def unlink(self, name: str) -> None:
        """Remove a file, or the link itself where the last part is one; a missing file is no error."""
        *folders, leaf = check_name(name, self.root)
        with contextlib.suppress(FileNotFoundError), self._descend(folders) as parent:
            os.unlink(leaf, dir_fd=parent)

    def replace(self, source: str, target: str) -> None:
        """Rename a file within the folder, over `target` where that exists; missing folders are made."""
        self.make_parents(target)
        *from_folders, from_leaf = check_name(source, self.root)
        *to_folders, to_leaf = check_name(target, self.root)
        with self._descend(from_folders) as old, self._descend(to_folders) as new:
            os.replace(from_leaf, to_leaf, src_dir_fd=old, dst_dir_fd=new)

    def exists(self, name: str) -> bool:
        """True if there is a file or folder of this name, reached without links."""
        *folders, leaf = check_name(name, self.root)
        try:
            with self._descend(folders) as parent:
                return not stat.S_ISLNK(os.stat(leaf, dir_fd=parent, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def remove_tree(self, name: str) -> None:
        """Remove a folder below the root with everything in it; links in it are removed, not followed."""
        import shutil

        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)  # which does not follow links, by file descriptors where the platform has them

    @contextlib.contextmanager
    def _descend(self, folders: list[str]) -> Iterator[int]:
        """Open the root, then each folder relative to the one before."""
        handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for depth, folder in enumerate(folders, 1):
                try:
                    below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                except OSError as error:
                    raise self._explained(error, "/".join(folders[:depth])) from error
                os.close(handle)
                handle = below
            yield handle
        finally:
            os.close(handle)

    def _explained(self, error: OSError, name: str) -> Exception:
        place = self.root / name
        if error.errno in _LEFT_BY_LINK and place.is_symlink():
            return self._linked(place)
        error.filename = str(place)
        return error

    def _linked(self, place: Path) -> LoftqError:
        return LoftqError(f"{place} is a link, which could lead out of {self.root}: replace it with what it links to.")
