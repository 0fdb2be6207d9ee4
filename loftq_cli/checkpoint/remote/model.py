"""Open models on the Hub: choose the commit and the files, and read them from the Hub's cache or by range requests.

Only the files that a conversion needs are fetched: config, tokenizer and other side files, and weights in one format
(safetensors, else pickles, else Meta's), never those of another framework.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from loftq_cli.checkpoint import pickled, safetensors
from loftq_cli.checkpoint.archives import is_zip
from loftq_cli.checkpoint.base import Checkpoint
from loftq_cli.checkpoint.local import ADAPTER_CONFIG, pick_files, read_index
from loftq_cli.checkpoint.meta.checkpoint import read_ranks
from loftq_cli.checkpoint.quantized import MODELOPT
from loftq_cli.checkpoint.remote.pickled import remote_pickles
from loftq_cli.checkpoint.remote.ranges import open_remote
from loftq_cli.checkpoint.scaled import with_scales
from loftq_cli.checkpoint.side_files import companions, travels
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.read_errors import hub_errors
from loftq_cli.hub.retry import OPENING_ATTEMPTS, HubModel, is_transient, with_retries
from loftq_cli.machine.confined import user_path

_BESIDE = ("config.json", "README.md", ADAPTER_CONFIG, MODELOPT)  # the card names the licence
_MANIFEST = "loftq.json"
_META_RANK = re.compile(r"consolidated\.\d+\.pth")
_FOREIGN = re.compile(r".*\.(gguf|ggml|h5|msgpack|onnx|ckpt|npz|pth|pt|bin|safetensors)")


@dataclass(frozen=True)
class Weights:
    """The files of a repository that contain the weights to read.

    Attributes:
        kind: `safetensors`, `pickled` or `meta`.
        index: the index that names the files, if there is one; `files` is then empty.
        beside: further small files that this kind requires.
    """

    kind: str
    files: tuple[str, ...]
    index: str | None = None
    beside: tuple[str, ...] = ()


_listings: dict[Path, tuple[str, ...]] = {}


def repository_files(folder: Path) -> tuple[str, ...] | None:
    """Return the names of all files of the repository that a snapshot folder belongs to; None if this process has not
    asked the Hub for them. The folder holds only those that were needed."""
    return _listings.get(folder.resolve())


def parse_model(model: str, revision: str | None) -> HubModel | Path:
    """Return a directory, or the model `org/name[@revision]` if no directory has that name.

    Raises:
        UsageError: two revisions are given, or one for a directory.
    """
    path = user_path(model)
    match = None if path.exists() else re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", model, re.ASCII)
    if match is None or not _is_repo_id(match[1]):
        if revision is not None and path.exists():
            raise UsageError(f"--revision is for a model on the Hub, but {model} is a local path: leave it out.")
        return path
    if match[2] and revision not in (None, match[2]):
        raise UsageError(f"{model} and --revision {revision} contradict each other: give one of them.")
    return HubModel(match[1], match[2] or revision)


def open_hub(
    model: HubModel, opener: Callable[[Path], Checkpoint], *, stream: bool, weights: bool, meta_version: str = "auto"
) -> tuple[Checkpoint, HubModel]:
    """Open a model on the Hub and return it with its commit.

    Args:
        opener: opens a directory.
        stream: read the weights by range requests without keeping a copy.
        weights: True if weights will be read; for headers alone they are not downloaded.
        meta_version: see `checkpoint.open_checkpoint`.

    Raises:
        LoftqError: the user has no access to the model, the Hub cannot be reached, or the model has no weights in a
            supported format.
    """
    with hub_errors(model, stream=stream):
        if is_offline_mode() and not stream:
            folder = _cached(model)
            return opener(folder), _commit(model, folder)
        try:
            commit, names = _list(model)
        except HTTPError as error:
            if stream or not is_transient(error):
                raise
            folder = _cached(model, error)
            return opener(folder), _commit(model, folder)
        chosen = choose_weights(model, names)
        folder = _fetch_small(model, commit, names, chosen)
        _listings[folder.resolve()] = tuple(names)
        at = dataclasses.replace(model, revision=commit)
        files, index = _shards(folder, names, chosen)
        if stream or not weights:
            checkpoint = _open_parts(at, folder, chosen, files, index, meta_version, stream=stream)
            if checkpoint is not None:
                return with_scales(checkpoint), at
        return opener(_snapshot(at, files)), at


def _open_parts(
    model: HubModel,
    folder: Path,
    chosen: Weights,
    files: list[str],
    index: dict[str, str] | None,
    meta_version: str,
    *,
    stream: bool,
) -> Checkpoint | None:
    """Return the checkpoint over range requests, or None if a download is better: a pickle in the old format has to be
    read whole for its list of tensors."""
    if chosen.kind == "safetensors":
        return open_remote(model, folder, files, index)
    inside = "original/" if files[0].startswith("original/") else ""
    files = [name.removeprefix(inside) for name in files]
    reader = remote_pickles(model, inside, files, whole=len(files) if chosen.kind == "meta" else 1)
    if not stream and not all(is_zip(file) for file in reader.files.values()):
        return None
    if chosen.kind == "meta":
        return read_ranks(folder, folder / inside, files, reader, meta_version)
    return pickled.read_lists(folder, files, index, reader)


def fetch_conversion(model: HubModel) -> Path | None:
    """Return a copy of a conversion that was pushed to the Hub, with its adapter; None if the repository holds none.

    Raises:
        LoftqError: the user has no access to the model, or the Hub cannot be reached.
    """
    with hub_errors(model, stream=False):
        folder = _snapshot(model, [], [_MANIFEST])
        return _snapshot(model, [], ["*"]) if (folder / _MANIFEST).is_file() else None


def choose_weights(model: HubModel, names: Sequence[str]) -> Weights:
    """Choose the weights of a repository with these files, as `open_checkpoint` does in a directory.

    Raises:
        LoftqError: there are no weights in a supported format.
    """
    top = [name for name in names if "/" not in name]
    known = (
        ("safetensors", safetensors.INDEX, safetensors.SINGLE, safetensors.SHARDS),
        ("pickled", pickled.INDEX, pickled.SINGLE, pickled.SHARDS),
    )
    for kind, index, single, shards in known if "config.json" in top else ():
        if index in top and single not in top:
            return Weights(kind, (), index)
        files = [single] if single in top else pick_files(PurePosixPath(model.repo), top, single, shards)
        if files:
            return Weights(kind, tuple(files))
    for folder in ("", "original/"):
        ranks = sorted(name for name in names if _META_RANK.fullmatch(name.removeprefix(folder)))
        if ranks and f"{folder}params.json" in names:
            beside = (name for name in (f"{folder}params.json", f"{folder}tokenizer.model") if name in names)
            return Weights("meta", tuple(ranks), None, tuple(beside))
    raise LoftqError(_no_weights(model, top))


def _no_weights(model: HubModel, top: Sequence[str]) -> str:
    if any(name.startswith("adapter_model.") for name in top):
        return f"{model} is an adapter: give the model that it was trained on."
    if any(name.endswith((".safetensors", ".bin")) for name in top) and "config.json" not in top:
        return f"{model} has weights but no config.json: give a model that transformers can load."
    foreign = sorted(name for name in top if _FOREIGN.fullmatch(name))
    only = f", only {foreign[0]}, which loftq does not read" if foreign else ""
    return (
        f"{model} contains no *.safetensors, pytorch_model*.bin or Meta's consolidated.*.pth with params.json{only}: "
        "give the full-precision model it was made from."
    )


def _list(model: HubModel) -> tuple[str, list[str]]:
    """Return the commit and its files."""
    found = with_retries(
        lambda: HfApi().model_info(model.repo, revision=model.revision, timeout=30.0), OPENING_ATTEMPTS
    )
    if found.sha is None:
        raise LoftqError(f"the Hub did not return a commit for {model}: give one with --revision.")
    return found.sha, [file.rfilename for file in found.siblings or ()]


def _fetch_small(model: HubModel, commit: str, names: Sequence[str], chosen: Weights) -> Path:
    """Fetch all files but the weights and return the snapshot folder of the commit."""
    wanted = [name for name in names if "/" not in name and (travels(name) or name in _BESIDE)]
    wanted += [*chosen.beside, *((chosen.index,) if chosen.index else ())]
    # Fetched by the user's revision, so that the cache records the commit that it refers to.
    folder = _snapshot(model, wanted)
    if folder.name != commit:
        raise LoftqError(
            f"{model} is being changed on the Hub: run the same command again.", exit_code=ExitCode.INCOMPLETE
        )
    nested = [name for name in companions(folder, names) if name not in wanted]
    return _snapshot(dataclasses.replace(model, revision=commit), nested) if nested else folder


def _shards(folder: Path, names: Sequence[str], chosen: Weights) -> tuple[list[str], dict[str, str] | None]:
    if chosen.index is None:
        return list(chosen.files), None
    index = read_index(folder / chosen.index, ".safetensors" if chosen.kind == "safetensors" else ".bin", names)
    return sorted(set(index.values())), index


def _snapshot(model: HubModel, names: Sequence[str], wanted: Sequence[str] = ()) -> Path:
    """Fetch these files, and those that match `wanted`, into the Hub's cache and return the snapshot folder."""
    patterns = [*(glob.escape(name) for name in names), *wanted]

    def fetch() -> Path:
        try:
            folder = Path(snapshot_download(model.repo, revision=model.revision, allow_patterns=patterns))
        except RuntimeError as error:  # hf_xet, which downloads large files, raises it when the network fails
            raise CutShort(f"the download of {model} was interrupted ({error})") from error
        # If the Hub does not respond, huggingface_hub returns the files that it has.
        if not all((folder / name).is_file() for name in names):
            raise CutShort(f"the download of {model} was interrupted")
        return folder

    return with_retries(fetch)


def _cached(model: HubModel, error: Exception | None = None) -> Path:
    """Return the cached snapshot, for use when the Hub cannot be reached."""
    try:
        folder = Path(
            snapshot_download(
                model.repo, revision=model.revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        choose_weights(model, names)
    except (LocalEntryNotFoundError, LoftqError):
        # An earlier streamed run left only the small files in the cache, which is not a complete copy.
        raise error or LocalEntryNotFoundError("no copy in the cache") from None
    return folder


def _commit(model: HubModel, folder: Path) -> HubModel:
    return dataclasses.replace(model, revision=folder.name)


def _is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
