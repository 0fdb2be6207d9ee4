"""`loftq merge`: fold a trained adapter into the backbone, one matrix at a time.

Four ways:

* `dense`: W = Q + ΔW in the model's dtype, for any container and any LoRA or QA-LoRA adapter.
* `zeros`: QA-LoRA over integers with float zeros (`packed`). ΔW is constant within groups, so it is added to the
  groups' zeros; codes, scales and bits stay as they are (QA-LoRA section 3.3).
* `gguf`: the same into a GGUF file's Q4_1 blocks, whose scales and zeros are float16.
* `requantize`: W = Q + ΔW is quantized anew on the container's own grid; what that costs is measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.artifacts import merged
from loftq_cli.artifacts.decode import quantized_matrix
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord, read_manifest
from loftq_cli.artifacts.merged import MergeReport
from loftq_cli.artifacts.trained import WEIGHTS, TrainedAdapter, read_adapter
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.checkpoint.safetensors import open_safetensors
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.engine.merge_gguf import blocks_of_record, copied, into_gguf, lay_out_gguf
from loftq_cli.engine.merge_way import choose_way
from loftq_cli.engine.output import STATE, hash_file, locate, partial_folder, publish, write_file
from loftq_cli.engine.writer import ShardWriter
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.files import TensorFile, lay_out, shard, shard_names
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPES, OutputTensor
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.lowrank import frobenius
from loftq_cli.planner import INDEX, index_text
from loftq_cli.recipe import DTYPE_CHOICES, parse_size


@dataclass(frozen=True)
class Piece:
    """A matrix in its container, or a tensor in full precision.

    Attributes:
        record: None for a tensor in full precision; `turned` then says that it lies [in, out].
        inputs: its tensors in the backbone; `outputs`: in the result.
        module: its path, where the adapter changes it.
    """

    record: MatrixRecord | None
    inputs: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    module: str | None
    turned: bool = False


@dataclass(frozen=True)
class Merge:
    """What the steps of one merge share."""

    manifest: Manifest
    source: Path
    checkpoint: Checkpoint
    trained: TrainedAdapter
    places: dict[str, str]
    way: str
    dtype: torch.dtype
    cast: bool  # tensors in full precision too, because the user named a dtype

    def update(self, module: str, in_features: int) -> Tensor:
        return self.trained.update(self.places[module], in_features)


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
    stacked = next((record.parameter for record in manifest.matrices if record.parameter), None)
    if stacked is not None:
        raise UsageError(
            f"{source} has adapters of stacked parameters ({stacked}), which merging by file cannot take apart: load "
            "it with loftq_cli.load, then call model.dequantize() and model.merge_and_unload()."
        )
    if manifest.format == "gguf":
        choose_way(to, manifest, trained, {}, lambda name: torch.empty(0))  # refuses
    checkpoint = open_safetensors(source)
    try:
        places = _places(trained, manifest)
        way = choose_way(to, manifest, trained, places, checkpoint.read)
        kind = DTYPES[manifest.dtype if dtype == "auto" else dtype]
        job = Merge(manifest, source, checkpoint, trained, places, way, kind, cast=dtype != "auto")
        _claim(target, [source, trained.folder.resolve()], overwrite)
        return _run(job, target, parse_size(max_shard_size), progress)
    except OSError as error:
        raise LoftqError(f"merging into {target} failed ({error.strerror}): make room and try again.") from error
    finally:
        checkpoint.close()


def _places(trained: TrainedAdapter, manifest: Manifest) -> dict[str, str]:
    """Module of the backbone → module in the adapter, whose class may put a prefix before its paths.

    Raises:
        LoftqError: a module of the adapter is not in the backbone, or has another shape.
    """
    shapes = {record.module: tuple(record.shape) for record in manifest.matrices}
    for kept in manifest.kept:
        if kept.module is not None and len(kept.shape) == 2:
            shapes[kept.module] = kept.shape[::-1] if kept.kind == "conv1d" else kept.shape  # type: ignore[assignment]
    places = {}
    for path in trained.modules:
        near = [m for m in shapes if m == path or m.endswith(f".{path}") or path.endswith(f".{m}")]
        found = path if path in shapes else near[0] if len(near) == 1 else None
        if found is None:
            raise LoftqError(
                f"the adapter changes {path}, which is no matrix of {manifest.output}: is it of this model?"
            )
        n_out, n_in = shapes[found]
        if trained.shape(path) != (n_out, n_in // trained.group):
            raise LoftqError(
                f"the adapter's factors for {path} give {list(trained.shape(path))}, but the matrix is "
                f"{[n_out, n_in]}: is the adapter of this model?"
            )
        places[found] = path
    return places


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
    pieces = list(_pieces(job))
    files, index = lay_out_gguf(job, pieces, identity) if job.way == "gguf" else _lay_out(pieces, max_bytes, identity)
    errors: dict[str, float] = {}
    writer = ShardWriter(lambda name: locate(output, name), tuple(files))
    writer.prepare()
    try:
        for i, piece in enumerate(pieces):
            progress(i, len(pieces))
            tensors, error = _merged(job, piece)
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


def _pieces(job: Merge) -> Iterator[Piece]:
    """The backbone's tensors in their order; those of one matrix come together, where its first one is."""
    owners: dict[str, MatrixRecord] = {}
    for one in job.manifest.matrices:
        for tensor in get_format(job.manifest.format).tensors(quantized_matrix(one)):
            owners[tensor.name] = one
    kept = {one.tensor: one for one in job.manifest.kept}
    seen = set()
    for name, info in job.checkpoint.tensors.items():
        record: MatrixRecord | None = owners.get(name)
        if record is None:
            module = kept[name].module if name in kept else None
            module = module if module in job.places else None
            cast = job.cast and job.way == "dense" and info.dtype.is_floating_point
            dtype = job.dtype if cast else info.dtype
            turned = name in kept and kept[name].kind == "conv1d"
            output = OutputTensor(name, dtype, info.shape)
            yield Piece(None, (name,), (copied(output) if job.way == "gguf" else output,), module, turned)
        elif record.tensor not in seen:
            seen.add(record.tensor)
            inputs = get_format(job.manifest.format).tensors(quantized_matrix(record))
            shape = record.shape[::-1] if record.kind == "conv1d" else record.shape
            outputs = (OutputTensor(record.tensor, job.dtype, shape),) if job.way == "dense" else inputs
            outputs = blocks_of_record(job, record) if job.way == "gguf" else outputs
            module = record.module if record.module in job.places else None
            yield Piece(record, tuple(tensor.name for tensor in inputs), outputs, module)


def _lay_out(pieces: list[Piece], max_bytes: int, identity: str) -> tuple[list[TensorFile], dict[str, str]]:
    shards = shard((piece.outputs for piece in pieces), max_bytes)
    names = shard_names(len(shards))
    metadata = {"format": "pt", "loftq_fingerprint": identity}
    files = [lay_out(name, tensors, metadata) for name, tensors in zip(names, shards)]
    index = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    return files, index if len(shards) > 1 else {}


def _merged(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """The tensors of a piece, and how far they are from Q + ΔW, relatively."""
    read = job.checkpoint.read
    if piece.record is None:
        (output,) = piece.outputs
        weight = read(piece.inputs[0])
        if piece.module is None:
            return {output.name: weight.to(output.dtype)}, 0.0
        update = job.update(piece.module, weight.shape[0 if piece.turned else 1])
        exact = weight.float() + (update.T if piece.turned else update)
        stored = exact.to(output.dtype)
        return {output.name: stored}, _relative(exact, stored.float())
    if job.way == "gguf":
        return into_gguf(job, piece)
    if piece.module is None and job.way != "dense":
        return {name: read(name) for name in piece.inputs}, 0.0
    if job.way == "zeros":
        return _into_zeros(job, piece)
    matrix = quantized_matrix(piece.record)
    container = get_format(job.manifest.format)
    exact = container.decode(matrix, read)
    if piece.module is not None:
        exact += job.update(piece.module, matrix.in_features)
    if job.way == "requantize":
        step = block_quantizer(matrix.grid, exact.device).quantize_residual(exact, exact)
        norm = frobenius(exact)
        encoded = container.encode(matrix, step.quantized)
        return {name: value.cpu() for name, value in encoded.items()}, step.residual_norm() / norm if norm else 0.0
    stored = exact.to(job.dtype)
    error = _relative(exact, stored.float())
    (output,) = piece.outputs
    return {output.name: stored.T.contiguous() if matrix.kind == "conv1d" else stored}, error


def _into_zeros(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """Zeros (the value of code 0) plus the update of their group; everything else as it was."""
    assert piece.record is not None and piece.module is not None
    matrix, container = quantized_matrix(piece.record), get_format(job.manifest.format)
    tensors = {name: job.checkpoint.read(name) for name in piece.inputs}
    exact = container.decode(matrix, tensors.__getitem__) + job.update(piece.module, matrix.in_features)
    compact = job.trained.compact(job.places[piece.module], matrix.in_features)
    name = f"{matrix.prefix}.weight_zeros"
    zeros = tensors[name]
    tensors[name] = zeros + compact.repeat_interleave(zeros.shape[1] // compact.shape[1], dim=1)
    return tensors, _relative(exact, container.decode(matrix, tensors.__getitem__))


def _relative(exact: Tensor, stored: Tensor) -> float:
    norm = frobenius(exact)
    return frobenius(exact - stored) / norm if norm else 0.0


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
