"""Find out if a plan has been completed already."""

from __future__ import annotations

from functools import partial

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, is_sealed, parse_manifest, read_content
from loftq_cli.engine.output.directory import PUSH_STATE, STATE, claim, clear_state, journal_of
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.planning.plan import Plan


def find_finished(plan: Plan) -> Manifest | None:
    """Return the manifest of a finished conversion with this recipe and source, or None if there is none.

    The manifest must match its digest, and every file must exist with its full size. Contents are not read: `verify`
    does that.

    Raises:
        LoftqError: there is a manifest, but it is damaged; or a file of it is a link.
    """
    output = plan.output
    try:
        if not (output / MANIFEST).is_file() or journal_of(output).read_header() is not None:
            return None
        content = read_content(output / MANIFEST)
    except OSError:
        return None  # claiming the directory says what is wrong with it
    manifest = parse_manifest(output / MANIFEST, content)
    if not is_sealed(content):
        return None
    paths = {ConfinedFolder(output).path(name): record.nbytes for name, record in manifest.files.items()}
    whole = all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths.items())
    return manifest if whole and manifest.fingerprint == plan.fingerprint else None


def remove_leftovers(plan: Plan) -> None:
    """Remove the state of a run that was killed after it had published a finished output.

    Raises:
        UsageError: another run is writing the directory.
    """
    if (plan.output / STATE).is_dir():
        with claim(plan.output, {"the model": plan.source}, partial(clear_state, plan.output, keep=PUSH_STATE)):
            pass
