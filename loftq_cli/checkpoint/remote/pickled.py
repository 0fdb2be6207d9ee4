"""Read pickled files on the Hub, as `torch.save` writes them, by range requests without a copy on disk.

A file in the old format is read from beginning to end, once for its list of tensors and once for their bytes, and is
held in memory meanwhile.
"""

from __future__ import annotations

import threading

from loftq_cli.checkpoint.pickled import PickleReader
from loftq_cli.checkpoint.remote.ranges import RemoteFile
from loftq_cli.hub.retry import HubModel


def remote_pickles(model: HubModel, folder: str, files: list[str], *, whole: int = 1) -> PickleReader:
    """Return a reader for `files` in the folder `folder` of a commit ("" or a name that ends in a slash)."""
    stop = threading.Event()
    return PickleReader({name: RemoteFile(model, folder + name, stop) for name in files}, stop, whole)
