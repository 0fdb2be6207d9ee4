"""A Hub on loopback for the fuzzer's own process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.hub_server import HubServer, environment

REPO = "some-org/fuzzed"
_LARGEST = 10_000_000


@contextmanager
def loopback_hub(home: Path) -> Iterator[HubServer]:
    """A Hub for this process; the environment has to be set before huggingface_hub is imported anywhere else."""
    from huggingface_hub import close_session, constants

    from loftq_cli.hub import retry

    with HubServer() as server:
        os.environ.update(environment(server, home))
        os.environ.pop("HF_HUB_OFFLINE", None)
        constants.ENDPOINT = server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(home / "hub"), str(home / "token")
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
        retry.FIRST_PAUSE = 0.001
        close_session()
        yield server
        close_session()


def publish(hub: HubServer, rng: random.Random, folder: Path) -> str:
    """Make the files of a folder a repository, some of whose requests may fail, and return its name."""
    hub.repos.clear()
    hub.failures.clear()
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size < _LARGEST]
    hub.add(REPO, {path.name: path.read_bytes() for path in files})
    if rng.random() < 0.3:
        host = rng.choice(("hub", "cdn"))
        failure = rng.choice(({"status": 500}, {"status": 403}, {"status": 404}, {"status": 429}, {"cut": 10}))
        passes = failure.get("status") not in (403, 404)  # huggingface_hub waits for seconds before it tries again
        hub.fail("/" if host == "cdn" else "resolve/", host=host, times=1 if passes else 99, **failure)
    return REPO
