"""`loftq merge`: fold a trained adapter into the backbone, one matrix at a time.

Four ways:

* `dense`: W = Q + ΔW in the model's dtype, for any container and any LoRA or QA-LoRA adapter.
* `zeros`: QA-LoRA over integers with float zeros (`packed`). ΔW is constant within groups, so it is added to the
  groups' zeros; codes, scales and bits stay as they are (QA-LoRA section 3.3).
* `gguf`: the same, written as a GGUF file's Q4_1 blocks, whose scales and zeros are float16.
* `requantize`: W = Q + ΔW is quantized again on the container's own grid, and the error is measured.

Experts that share a parameter in the running model are merged one at a time, under their names on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, read_manifest
from loftq_cli.checkpoint import SideFile
from loftq_cli.checkpoint.safetensors import open_safetensors
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.checkpoint.trained_on import check_trained_on, conversion_in
from loftq_cli.engine.output.directory import claim, on_full_disk, open_writer, publish, read_back, write_files
from loftq_cli.engine.output.journal import hash_tensors
from loftq_cli.engine.output.lock import Lock
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import get_container
from loftq_cli.formats.base import DTYPES
from loftq_cli.machine.confined import real_path, user_path
from loftq_cli.machine.precision import full_precision
from loftq_cli.merging import texts as merged
from loftq_cli.merging.choose import choose_way
from loftq_cli.merging.into_gguf import lay_out_gguf
from loftq_cli.merging.job import Merge, MergePlan
from loftq_cli.merging.model_config import merged_config
from loftq_cli.merging.output import start_merge
from loftq_cli.merging.pieces import merge_piece, pieces_of
from loftq_cli.merging.places import find_places
from loftq_cli.merging.saved_tensors import SavedTensor, find_saved
from loftq_cli.merging.texts import MergeReport
from loftq_cli.merging.trained_adapter import WEIGHTS, TrainedAdapter, read_adapter
from loftq_cli.modules.roles import float32_tensors
from loftq_cli.planning.output_files import INDEX, index_text
from loftq_cli.recipe.model import DTYPE_CHOICES, parse_size
from loftq_cli.tensorfile.hashing import FileRecord, hash_file
from loftq_cli.tensorfile.layout import backbone_metadata, lay_out_shards

logger = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
Progress = Callable[[int, int], None]


@full_precision()
def merge(
    directory: str | Path,
    adapter: str | Path,
    *,
    output: str | Path,
    to: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    noted: Callable[[str], None] = logger.warning,
) -> MergeReport:
    """Write the backbone in `directory` with the trained adapter folded in; the result needs no adapter.

    Args:
        directory: a finished output of `quantize`.
        adapter: a folder that PEFT's `save_pretrained` wrote.
        to: `dense`, `zeros`, `gguf` or `requantize`; `auto` takes `zeros` if that is exact, else `dense`.
        dtype: of dense weights; `auto` is the model's own. `float32` keeps every digit.
        overwrite: replace a finished merge, or drop an unfinished conversion.
        force: merge an adapter that was trained on another conversion, if its shapes fit.
        progress: called with the number of tensors that are done, and the total.
        noted: called with a note about the adapter; logged as a warning by default.

    Raises:
        UsageError: the way does not suit this backbone and adapter, or the output belongs to something else.
        LoftqError: backbone or adapter is missing or damaged, or they do not belong together; the disk is full, or a
            file does not read back as it was written (exit code 4: the same command starts again).
    """
    if dtype not in DTYPE_CHOICES:
        raise UsageError(f"--dtype cannot be '{dtype}': choose one of {', '.join(DTYPE_CHOICES)}.")
    source, target = real_path(user_path(directory)), real_path(user_path(output))
    manifest, trained = read_manifest(source), read_adapter(user_path(adapter))
    if note := check_trained_on(conversion_in(source), trained.folder, force=force):
        noted(f"{note}.")
    inputs = {"the backbone": source, "the adapter": real_path(trained.folder)}
    try:
        with _opened(manifest, source, trained, to, dtype) as job:
            plan = _make_plan(job, parse_size(max_shard_size))
            start = partial(start_merge, target, _names(job, plan), overwrite, plan.side_files)
            with on_full_disk(target), claim(target, inputs, start) as lock:
                errors, hashes = _write_weights(job, plan, target, lock, progress)
                report = _report(job, plan, target, errors)
                _finish(job, plan, report, hashes, lock)
        return report
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise LoftqError(f"merging into {target} failed ({what}): check that file, then try again.") from error


@contextmanager
def _opened(manifest: Manifest, source: Path, trained: TrainedAdapter, to: str, dtype: str) -> Iterator[Merge]:
    """Open the backbone and choose the way.

    Raises:
        UsageError: the way does not exist, or would lose the update.
        LoftqError: the adapter does not belong to the backbone.
    """
    if get_container(manifest.format).unmergeable:
        choose_way(to, manifest, trained, {}, lambda name: torch.empty(0))  # refuses
    with closing(open_safetensors(source)) as checkpoint:
        saved = find_saved(trained, manifest, checkpoint.tensors, checkpoint.read)
        places = find_places(trained, manifest, _resized(saved))
        way = choose_way(_allowed(to, saved), manifest, trained, places, checkpoint.read)
        kind = DTYPES[manifest.dtype if dtype == "auto" else dtype]
        cast = dtype != "auto" and way == "dense"
        float32 = float32_tensors(checkpoint.config, list(checkpoint.tensors), dtype) if cast else frozenset()
        yield Merge(manifest, source, checkpoint, trained, places, way, kind, cast, saved, float32)


def _resized(saved: Mapping[str, SavedTensor]) -> dict[str, tuple[int, ...]]:
    """Return the new shapes of the modules whose weights the adapter replaces by ones of another shape."""
    return {
        name.removesuffix(".weight"): one.shape
        for name, one in saved.items()
        if one.before is not None and one.shape != one.before
    }


def _allowed(wanted: str, saved: Mapping[str, SavedTensor]) -> str:
    """Return the way that the adapter's whole tensors allow.

    Raises:
        UsageError: only dense weights can hold them, and the user asked for something else.
    """
    first = next((one for one in saved.values() if one.needs_dense), None)
    if first is None or wanted not in ("auto", "zeros", "gguf", "requantize"):
        return wanted
    if wanted != "auto":
        raise UsageError(
            f"--to {wanted} cannot store the adapter's own {first.tensor}, which replaces a quantized matrix or has "
            "another shape: use --to dense."
        )
    return "dense"


def _make_plan(job: Merge, max_bytes: int) -> MergePlan:
    adapter_sha = hash_file(job.trained.folder / WEIGHTS).sha256
    identity = merged.fingerprint(job.manifest, adapter_sha, job.way, str(job.dtype))
    pieces = tuple(pieces_of(job))
    if job.way == "gguf":
        weights = lay_out_gguf(job, pieces, identity)
    else:
        weights = lay_out_shards((piece.outputs for piece in pieces), max_bytes, backbone_metadata(identity))
    written = {"config.json", merged.RECORD, merged.CARD, INDEX}
    side_files = tuple(side for side in _side_files(job) if side.name not in written)
    config = merged_config(job.checkpoint.config, job.saved.values(), job.manifest, job.trained.config.task)
    return MergePlan(pieces, weights, adapter_sha, identity, config, side_files)


def _side_files(job: Merge) -> Iterable[SideFile]:
    """Return the backbone's side files; tokenizer files beside an adapter with other tokens win over them."""
    files = {side.name: side for side in find_side_files(job.source)}
    vocabulary = any(one.rows or (one.before is not None and one.shape != one.before) for one in job.saved.values())
    if vocabulary:
        beside = find_side_files(job.trained.folder)
        files |= {side.name: side for side in beside if side.name.startswith(_TOKENIZER_FILES)}
    return files.values()


def _names(job: Merge, plan: MergePlan) -> set[str]:
    """Return the names of all files that the merge may write."""
    texts = {"config.json", merged.RECORD, merged.CARD, INDEX, MANIFEST}
    return texts | {file.name for file in plan.weights.files} | {side.name for side in plan.side_files}


def _write_weights(
    job: Merge, plan: MergePlan, output: Path, lock: Lock, progress: Progress
) -> tuple[dict[str, float], dict[str, str]]:
    """Merge and write every piece.

    Returns:
        The relative error of every changed matrix by module, and the sha256 of every tensor that was written.
    """
    errors: dict[str, float] = {}
    hashes: dict[str, str] = {}
    with open_writer(output, plan.weights.files, create=True) as writer:
        for i, piece in enumerate(plan.pieces):
            lock.check()
            progress(i, len(plan.pieces))
            tensors, error = merge_piece(job, piece)
            writer.write(tensors)
            hashes |= hash_tensors(tensors)
            if piece.module is not None:
                errors[piece.module] = float(f"{error:.6g}")
    return errors, hashes


def _report(job: Merge, plan: MergePlan, output: Path, errors: dict[str, float]) -> MergeReport:
    dense = job.way == "dense"
    return MergeReport(
        output=str(output),
        way=job.way,
        format={"dense": "dense", "gguf": "gguf"}.get(job.way, job.manifest.format),
        dtype=str(job.dtype).removeprefix("torch.") if dense else job.manifest.dtype,
        fingerprint=plan.fingerprint,
        source_fingerprint=job.manifest.fingerprint,
        adapter_sha256=plan.adapter_sha256,
        errors=errors,
        backbone_bytes=plan.backbone_bytes,
    )


def _architecture(job: Merge, plan: MergePlan) -> str | None:
    """Return the model class of the result, which another head changes."""
    names, before = plan.config.get("architectures"), job.checkpoint.config.get("architectures")
    if names == before or not isinstance(names, list) or not names:
        return job.manifest.architecture
    return str(names[0])


def _finish(job: Merge, plan: MergePlan, report: MergeReport, hashes: dict[str, str], lock: Lock) -> None:
    """Read the weights back, write every other file, and publish all of them."""
    output, index = Path(report.output), plan.weights.index
    texts = {
        "config.json": merged.config_of(plan.config, report),
        merged.CARD: merged.card_of(job.manifest, report, _architecture(job, plan)),
        **({INDEX: index_text(report.backbone_bytes, index)} if index else {}),
    }
    files: dict[str, FileRecord] = read_back(output, plan.weights.files, hashes)
    files |= write_files(output, texts, plan.side_files)
    files |= write_files(output, {merged.RECORD: merged.record_of(report, files)})
    if job.way in ("zeros", "requantize"):
        files |= write_files(output, {MANIFEST: merged.manifest_of(job.manifest, report, files)})
    lock.check()
    publish(output, files)
