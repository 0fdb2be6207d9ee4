"""`loftq merge`: fold a trained adapter into the backbone, one matrix at a time.

Four ways:

* `dense`: W = Q + ΔW in the model's dtype, for any container and any LoRA or QA-LoRA adapter.
* `zeros`: QA-LoRA over integers with float zeros (`packed`). ΔW is constant within groups, so it is added to the
  groups' zeros; codes, scales and bits stay as they are (QA-LoRA section 3.3).
* `gguf`: the same into a GGUF file's Q4_1 blocks, whose scales and zeros are float16.
* `requantize`: W = Q + ΔW is quantized anew on the container's own grid; what that costs is measured.

Experts that share a parameter in the running model are merged one at a time, under the names they have on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import read_manifest
from loftq_cli.checkpoint.safetensors import open_safetensors
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.engine.output.directory import STATE, locate, partial_folder, publish, write_file
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import get_container
from loftq_cli.formats.base import DTYPES
from loftq_cli.machine.precision import full_precision
from loftq_cli.merging import texts as merged
from loftq_cli.merging.choose import choose_way
from loftq_cli.merging.into_gguf import lay_out_gguf
from loftq_cli.merging.job import Merge, Piece
from loftq_cli.merging.pieces import merge_piece, pieces_of
from loftq_cli.merging.places import find_places
from loftq_cli.merging.texts import MergeReport
from loftq_cli.merging.trained_adapter import WEIGHTS, read_adapter
from loftq_cli.planning.plan import INDEX, index_text
from loftq_cli.recipe.model import DTYPE_CHOICES, parse_size
from loftq_cli.tensorfile.hashing import hash_file
from loftq_cli.tensorfile.layout import lay_out, shard, shard_names
from loftq_cli.tensorfile.tensors import TensorFile
from loftq_cli.tensorfile.writer import ShardWriter


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write the backbone in `directory` with the trained adapter folded in; no adapter is left.

    Args:
        directory: a finished output of `quantize`.
        adapter: a folder that PEFT's `save_pretrained` wrote.
        to: `dense`, `zeros`, `gguf` or `requantize`; `auto` takes `zeros` where that is exact, else `dense`.
        dtype: of dense weights; `auto` is the model's own. `float32` keeps every digit.
        progress: called with how many tensors are done, of how many.

    Raises:
        UsageError: the way cannot be gone with this backbone and adapter, or the output is not free.
        LoftqError: backbone or adapter is missing, damaged, or they do not belong together.
    """
    if dtype not in DTYPE_CHOICES:
        raise UsageError(f"--dtype cannot be '{dtype}': choose one of {', '.join(DTYPE_CHOICES)}.")
    source, target = Path(directory).expanduser().resolve(), Path(output).expanduser().resolve()
    manifest, trained = read_manifest(source), read_adapter(Path(adapter).expanduser())
    if get_container(manifest.format).unmergeable:
        choose_way(to, manifest, trained, {}, lambda name: torch.empty(0))  # refuses
    checkpoint = open_safetensors(source)
    try:
        places = find_places(trained, manifest)
        way = choose_way(to, manifest, trained, places, checkpoint.read)
        kind = DTYPES[manifest.dtype if dtype == "auto" else dtype]
        job = Merge(manifest, source, checkpoint, trained, places, way, kind, cast=dtype != "auto")
        _claim(target, [source, trained.folder.resolve()], overwrite)
        return _run(job, target, parse_size(max_shard_size), progress)
    except OSError as error:
        raise LoftqError(f"merging into {target} failed ({error.strerror}): make room and try again.") from error
    finally:
        checkpoint.close()


def _claim(output: Path, others: list[Path], overwrite: bool) -> None:
    """Make the output directory ours; what a stopped merge left there is dropped.

    Raises:
        UsageError: it overlaps with what is read, or holds something.
    """
    if any(output == other or other in output.parents or output in other.parents for other in others):
        raise UsageError(f"the output {output} overlaps with the backbone or the adapter: choose another -o.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file: choose another -o.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names - {STATE}:
        if not overwrite or merged.RECORD not in names:
            hint = "give --overwrite to replace it" if merged.RECORD in names else "choose another -o"
            raise UsageError(f"{output} is not empty: {hint}.")
        shutil.rmtree(output)
    shutil.rmtree(output / STATE, ignore_errors=True)
    partial_folder(output).mkdir(parents=True)


def _run(job: Merge, output: Path, max_bytes: int, progress: Callable[[int, int], None]) -> MergeReport:
    adapter_sha = hash_file(job.trained.folder / WEIGHTS).sha256
    identity = merged.fingerprint(job.manifest, adapter_sha, job.way, str(job.dtype))
    pieces = list(pieces_of(job))
    files, index = lay_out_gguf(job, pieces, identity) if job.way == "gguf" else _lay_out(pieces, max_bytes, identity)
    errors: dict[str, float] = {}
    writer = ShardWriter(lambda name: locate(output, name), tuple(files))
    writer.prepare()
    try:
        for i, piece in enumerate(pieces):
            progress(i, len(pieces))
            tensors, error = merge_piece(job, piece)
            writer.write(tensors)
            if piece.module is not None:
                errors[piece.module] = float(f"{error:.6g}")
    finally:
        writer.close()
    dense = job.way == "dense"
    report = MergeReport(
        output=str(output),
        way=job.way,
        format={"dense": "dense", "gguf": "gguf"}.get(job.way, job.manifest.format),
        dtype=str(job.dtype).removeprefix("torch.") if dense else job.manifest.dtype,
        fingerprint=identity,
        source_fingerprint=job.manifest.fingerprint,
        adapter_sha256=adapter_sha,
        errors=errors,
        backbone_bytes=sum(tensor.nbytes for piece in pieces for tensor in piece.outputs),
    )
    _finish(job, output, report, [file.name for file in files], index)
    return report


def _lay_out(pieces: list[Piece], max_bytes: int, identity: str) -> tuple[list[TensorFile], dict[str, str]]:
    shards = shard((piece.outputs for piece in pieces), max_bytes)
    names = shard_names(len(shards))
    metadata = {"format": "pt", "loftq_fingerprint": identity}
    files = [lay_out(name, tensors, metadata) for name, tensors in zip(names, shards)]
    index = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    return files, index if len(shards) > 1 else {}


def _finish(job: Merge, output: Path, report: MergeReport, weights: list[str], index: dict[str, str]) -> None:
    """Everything but the weights, then the moves that make the directory a model."""
    texts = {
        "config.json": merged.config_of(job.source, report),
        merged.RECORD: merged.record_of(report),
        merged.CARD: merged.card_of(job.manifest, report),
        **({INDEX: index_text(report.backbone_bytes, index)} if index else {}),
    }
    for side in find_side_files(job.source):
        if side.name not in texts and side.name != merged.RECORD:
            texts[side.name] = side.read()
    for name, content in texts.items():
        write_file(output, name, content)
    names = [*weights, *texts]
    if job.way in ("zeros", "requantize"):
        files = {name: hash_file(locate(output, name)) for name in names}
        write_file(output, MANIFEST, merged.manifest_of(job.manifest, report, files))
        names.append(MANIFEST)
    publish(output, names)
    shutil.rmtree(output / STATE, ignore_errors=True)
