"""The numbers of a report, collected from manifests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.reporting.places import find_places
from loftq_cli.reporting.spectra import Spectrum

_WORST = 8


@dataclass(frozen=True)
class Cell:
    """The matrices at one place of a layer; several where experts share it.

    Attributes:
        module: the full name of the module, or of the parameter that experts share.
        stack, layer, place: as in `places.Place`.
        plain, kept, bits, rank: means over the matrices; `low` and `high` are the extremes of the kept residual.
        types: the data types, such as `nf`.
    """

    module: str
    stack: str
    layer: int | None
    place: str
    count: int
    plain: float
    kept: float
    low: float
    high: float
    bits: float
    rank: float
    types: tuple[str, ...]


@dataclass(frozen=True)
class StepPoint:
    """Residuals after one LoftQ step (0 is plain quantization): the mean, and the middle 80 % of the matrices."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Share:
    """Bytes of one part of the output; `note` says more about it."""

    label: str
    nbytes: int
    note: str


@dataclass(frozen=True)
class Conversion:
    """Everything that the page shows of one directory.

    Attributes:
        name: of the directory, with a number if several have the same.
        best: how many matrices kept the step of this index; 0 is the start without iterations.
    """

    name: str
    manifest: Manifest
    cells: tuple[Cell, ...]
    steps: tuple[StepPoint, ...]
    best: tuple[int, ...]
    shares: tuple[Share, ...]
    worst: tuple[MatrixRecord, ...]
    spectra: tuple[Spectrum, ...] = ()
    no_spectra: str = ""

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of layers in the order of the checkpoint."""
        return tuple(dict.fromkeys(cell.stack for cell in self.cells if cell.layer is not None))

    @property
    def embedding_share(self) -> float:
        """The embedding's share of all tensors, 0 to 1."""
        embedding = sum(share.nbytes for share in self.shares if share.label.startswith("embedding"))
        return embedding / (sum(share.nbytes for share in self.shares) or 1)

    @property
    def loose(self) -> tuple[Cell, ...]:
        """The matrices outside of all layers, such as the head."""
        return tuple(cell for cell in self.cells if cell.layer is None)


def collect(name: str, manifest: Manifest, spectra: tuple[Spectrum, ...] = (), no_spectra: str = "") -> Conversion:
    """Return what the page shows of a directory."""
    steps = max((len(record.residuals) for record in manifest.matrices), default=0)
    return Conversion(
        name=name,
        manifest=manifest,
        cells=_cells(manifest.matrices),
        steps=_steps(manifest.matrices),
        best=tuple(sum(record.best == step for record in manifest.matrices) for step in range(steps + 1)),
        shares=_shares(manifest),
        worst=tuple(sorted(manifest.matrices, key=lambda record: (-record.residual, record.module))[:_WORST]),
        spectra=spectra,
        no_spectra=no_spectra,
    )


def _cells(records: Sequence[MatrixRecord]) -> tuple[Cell, ...]:
    names = [record.module if record.expert is None else record.parameter or record.module for record in records]
    places = find_places(names)
    groups: dict[tuple[str, int | None, str], list[tuple[str, MatrixRecord]]] = defaultdict(list)
    for name, record in zip(names, records):
        place = places[name]
        groups[place.stack, place.layer, place.module].append((name, record))
    return tuple(_cell(*key, group) for key, group in groups.items())


def _cell(stack: str, layer: int | None, place: str, group: list[tuple[str, MatrixRecord]]) -> Cell:
    records = [record for _, record in group]
    kept = [record.residual for record in records]
    name = group[0][0] if len({name for name, _ in group}) == 1 else f"{stack}.{layer}.{place}"
    return Cell(
        module=name,
        stack=stack,
        layer=layer,
        place=place,
        count=len(records),
        plain=_mean(record.plain_residual for record in records),
        kept=_mean(kept),
        low=min(kept),
        high=max(kept),
        bits=_mean(record.bits for record in records),
        rank=_mean(record.rank for record in records),
        types=tuple(sorted({record.data_type for record in records})),
    )


def _steps(records: Sequence[MatrixRecord]) -> tuple[StepPoint, ...]:
    """Return the course of the residuals; matrices without steps (QLoRA, or without an adapter) are left out."""
    moving = [record for record in records if record.residuals]
    length = min((len(record.residuals) for record in moving), default=0)
    courses = [(record.plain_residual, *record.residuals[:length]) for record in moving]
    return tuple(_point(step, sorted(values)) for step, values in enumerate(zip(*courses)))


def _point(step: int, values: list[float]) -> StepPoint:
    cut = len(values) // 10
    return StepPoint(step, _mean(values), values[cut], values[len(values) - 1 - cut])


def _shares(manifest: Manifest) -> tuple[Share, ...]:
    """Return the parts of the output, largest first; the embedding is one of them, quantized or not."""
    quantized: Mapping[str, str] = {"embedding": "embedding", "head": "head", "expert": "experts"}
    parts: dict[str, list[int]] = defaultdict(list)
    for record in manifest.matrices:
        parts[f"{quantized.get(record.kind, 'layers')}, quantized"].append(record.backbone_bytes)
    for kept in manifest.kept:
        label = kept.kind if kept.kind in ("embedding", "head") else "other tensors"
        parts[f"{label}, full precision"].append(kept.nbytes)
    shares = [Share(label, sum(sizes), _count(len(sizes))) for label, sizes in parts.items()]
    if manifest.totals.adapter_bytes:
        ranks = [record.rank for record in manifest.matrices] + [kept.rank for kept in manifest.kept]
        adapted = sum(rank > 0 for rank in ranks)
        shares.append(Share("adapter", manifest.totals.adapter_bytes, f"for {_count(adapted)}"))
    return tuple(sorted((share for share in shares if share.nbytes), key=lambda share: (-share.nbytes, share.label)))


def _count(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def by_layer(cells: Sequence[Cell], value: Callable[[Cell], float]) -> tuple[tuple[int, float], ...]:
    """Return the mean of a value over the matrices of each layer, by the layer's number."""
    layers: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.layer is not None:
            layers[cell.layer].append(cell)
    return tuple(
        (layer, sum(value(cell) * cell.count for cell in found) / sum(cell.count for cell in found))
        for layer, found in sorted(layers.items())
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
