"""`loftq_cli.report`: read converted directories and write the page."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from loftq_cli.artifacts.manifest import Manifest, read_manifest
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import real_path, user_path
from loftq_cli.machine.regular_files import open_regular
from loftq_cli.reporting.data import collect
from loftq_cli.reporting.page import MARK, render_page
from loftq_cli.reporting.spectra import Spectrum, measure_spectra

_BEGIN = 1024  # bytes in which a report's mark stands
_MOST_SPECTRA = 32


def report(
    directories: str | Path | Sequence[str | Path],
    *,
    output: str | Path = "report.html",
    source: str | Path | None = None,
    singular_values: int = 3,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one HTML page about finished conversions, side by side; it needs no network and no other file.

    Args:
        directories: outputs of `quantize`, one or several.
        output: the page; a report that is there is replaced.
        source: the model they were made from, if it is not where it was.
        singular_values: matrices of each directory whose errors' singular values are drawn; 0 for none. They need the
            source. A source that was read from the Hub is not fetched again unless `source` names it.
        overwrite: replace a file that is not a report.
        progress: called with the name of each matrix whose singular values are computed.

    Returns:
        The path of the page.

    Raises:
        UsageError: no directory is given, or `output` is no place for a page.
        LoftqError: a directory is not a finished conversion, or `source` is another model.
    """
    given = [directories] if isinstance(directories, (str, Path)) else list(directories)
    if not given:
        raise UsageError("no directory is given: give at least one output of `loftq quantize`.")
    if not 0 <= singular_values <= _MOST_SPECTRA:
        raise UsageError(f"--singular-values {singular_values} is not between 0 and {_MOST_SPECTRA}: give fewer.")
    paths, page = [user_path(path) for path in given], user_path(output)
    _check_output(page, paths, overwrite)
    found = [(path, read_manifest(path)) for path in paths]
    conversions = []
    for name, (path, manifest) in zip(unique_names(paths), found):
        spectra, reason = _spectra(path, manifest, source, singular_values, progress)
        conversions.append(collect(name, manifest, spectra, reason))
    _write(page, render_page(conversions).encode())
    return page


def unique_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of directories, with a number behind those that others have too."""
    names = [real_path(path).name or "/" for path in paths]
    counts, seen, found = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return tuple(found)


def _spectra(
    path: Path,
    manifest: Manifest,
    source: str | Path | None,
    count: int,
    progress: Callable[[str], None],
) -> tuple[tuple[Spectrum, ...], str]:
    """Return the spectra, or the reason why there are none: without `source` a missing model is no error."""
    if count == 0:
        return (), ""
    if source is None and (manifest.source_revision is not None or not Path(manifest.source).is_dir()):
        return (), "Not computed: the source model is not in a directory here. Name it with --source."
    from loftq_cli.artifacts.origin import opened_source

    try:
        with opened_source(manifest, source) as checkpoint:
            return measure_spectra(path, manifest, checkpoint, count, progress), ""
    except (LoftqError, OSError) as error:
        if source is not None:
            raise
        return (), f"Not computed: {error}"


def _check_output(page: Path, directories: Sequence[Path], overwrite: bool) -> None:
    """Refuse a page that would spoil something, before any work is done.

    Raises:
        UsageError: it is a directory or a special file, lies in a conversion, or is a file of another kind.
    """
    if page.is_symlink() or (page.exists() and not page.is_file()):
        raise UsageError(f"-o {page} is not a regular file: give the path of a file, such as report.html.")
    home = real_path(page.parent)
    inside = next((path for path in directories if home == real_path(path) or real_path(path) in home.parents), None)
    if inside is not None:
        raise UsageError(
            f"-o {page} lies in {inside}, where `loftq verify` would report it: give a path outside of that directory."
        )
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise UsageError(f"-o {page} cannot be written, {page.parent} is not a writable directory: give another path.")
    if not overwrite and page.exists() and not _is_report(page):
        raise UsageError(f"-o {page} exists and is not a report: give another path, or --overwrite to replace it.")


def _is_report(page: Path) -> bool:
    """True for an empty file and for a page that `report` wrote."""
    try:
        with open_regular(page) as file:
            begin = file.read(_BEGIN)
    except OSError:
        return False
    return not begin or MARK.encode() in begin


def _write(page: Path, content: bytes) -> None:
    """Write the page under a temporary name, then rename it; nothing is left of an attempt that fails.

    Raises:
        LoftqError: the disk is full, or the directory cannot be written.
    """
    draft = ""
    try:
        handle, draft = tempfile.mkstemp(prefix=f".{page.name}.", dir=page.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)  # temporary files are private, a page is not
        os.replace(draft, page)
    except OSError as error:
        raise LoftqError(f"the report {page} cannot be written ({error.strerror}): give another path.") from error
    finally:
        if draft and os.path.exists(draft):
            os.unlink(draft)
