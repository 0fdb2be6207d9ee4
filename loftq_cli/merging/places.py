"""Find the factors of a trained adapter that belong to each matrix of the backbone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from loftq_cli.artifacts.manifest import KeptRecord, Manifest, MatrixRecord
from loftq_cli.errors import LoftqError
from loftq_cli.merging.trained_adapter import Place, TrainedAdapter
from loftq_cli.tensorfile.entry_names import expert_name

_NESTED = ".base_layer"


def find_places(
    trained: TrainedAdapter, manifest: Manifest, resized: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Place]:
    """Map modules of the backbone (for experts: parameter and number) to their places in the adapter.

    The adapter's paths may have another prefix, if it was trained on another model class.

    Args:
        resized: module → [out, in], if the adapter replaces its weight by one of another shape.

    Raises:
        LoftqError: the adapter changes a module that is not in the backbone, has another shape, or changes a module
            twice.
    """
    shapes = {**_shapes(manifest), **(resized or {})}
    stacks = _stacks(manifest)
    homes = {parameter.rpartition(".")[0] for parameter in stacks}
    places: dict[str, Place] = {}
    wrapped: dict[str, list[str]] = defaultdict(list)
    for path in trained.modules:
        bare = path.replace(_NESTED, "")
        home = nearest(bare, homes)
        if home is not None:
            wrapped[home].append(path)
            continue
        found = nearest(path, shapes)
        if found is None:
            raise LoftqError(
                f"the adapter changes {path}, which is not a matrix of {manifest.output}: give an adapter that was "
                "trained on this backbone."
            )
        if found in places:
            raise LoftqError(
                f"the adapter changes {found} twice, as {places[found].path} and as {path}: remove one of them."
            )
        places[found] = _place(trained, path, shapes[found])
    for home, paths in wrapped.items():
        ours = {name: stack for name, stack in stacks.items() if name.rpartition(".")[0] == home}
        places |= _experts(trained, manifest, ours, sorted(paths, key=len))
    return places


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes [out, in] of all matrices that are not experts."""
    shapes = {record.module: tuple(record.shape) for record in manifest.matrices if record.expert is None}
    for kept in manifest.kept:
        if kept.module is not None and len(kept.shape) == 2 and kept.kind != "expert":
            shapes[kept.module] = kept.matrix_shape
    return shapes


def _stacks(manifest: Manifest) -> dict[str, list[MatrixRecord | KeptRecord]]:
    """Map parameters of experts to the matrices in them that have adapters."""
    stacks: dict[str, list[MatrixRecord | KeptRecord]] = defaultdict(list)
    records: list[MatrixRecord | KeptRecord] = [*manifest.matrices, *manifest.kept]
    for record in records:
        if record.expert is not None and record.rank:
            stacks[parameter_of(record)].append(record)
    return stacks


def parameter_of(record: MatrixRecord | KeptRecord) -> str:
    """Return the stacked parameter of an expert's matrix."""
    return record.parameter if isinstance(record, MatrixRecord) else record.module or ""


def nearest(path: str, names: Iterable[str]) -> str | None:
    """Return `path` if it is one of the names, else the only name that is a suffix of `path` or has it as a suffix."""
    near = [name for name in names if name == path or name.endswith(f".{path}") or path.endswith(f".{name}")]
    return path if path in near else near[0] if len(near) == 1 else None


def _place(trained: TrainedAdapter, path: str, shape: tuple[int, ...]) -> Place:
    n_out, n_in = shape
    if not trained.rank(path) or trained.shape(path) != (n_out, n_in // trained.group):
        raise _misfit(path, trained.shape(path), (n_out, n_in))
    # PEFT also treats a matrix next to experts as a parameter, and names it so in its patterns.
    name = f"{path}.weight" if trained.targets(f"{path}.weight") else path
    _check_rank(trained, path, name, trained.rank(path))
    return Place(path, name)


def _check_rank(trained: TrainedAdapter, path: str, name: str, rank: int) -> None:
    """Raise unless the factors have the rank by which PEFT scales them."""
    configured = trained.config.rank_of(name)
    if rank != configured:
        raise LoftqError(
            f"the adapter's factors for {path} have rank {rank}, but {trained.config.path} says {configured}: save the "
            "adapter again."
        )


def _experts(
    trained: TrainedAdapter,
    manifest: Manifest,
    stacks: dict[str, list[MatrixRecord | KeptRecord]],
    paths: list[str],
) -> dict[str, Place]:
    """Return the places of all experts of one module. PEFT wraps it once per parameter in the module's order, so the
    last one is outermost and has the shortest path."""
    ordered = sorted((name for name in stacks if trained.targets(name)), key=lambda name: _depth(stacks[name]))
    if len(ordered) != len(paths):
        raise LoftqError(
            f"the adapter changes {len(paths)} parameters of {paths[0]}, and {manifest.output} has adapters for "
            f"{len(ordered)} of them: give the adapter of this model."
        )
    places = {}
    for name, path in zip(ordered, paths):
        for record in stacks[name]:
            assert record.expert is not None
            n_out, n_in = record.matrix_shape if isinstance(record, KeptRecord) else record.shape
            count, parts = record.expert.count, record.expert.parts
            if trained.shape(path) != (n_out * parts, n_in) or trained.rank(path) % count:
                raise _misfit(path, trained.shape(path), (n_out * parts, n_in))
            place = Place(path, f"{path.replace(_NESTED, '')}.{name.rpartition('.')[2]}", record.expert)
            _check_rank(trained, path, place.name, trained.rank(path) // count)
            places[name_of_expert(record)] = place
    return places


def name_of_expert(record: MatrixRecord | KeptRecord) -> str:
    """Return the name of an expert's matrix in its parameter."""
    assert record.expert is not None
    return expert_name(parameter_of(record), record.expert.index, record.expert.part, record.expert.parts)


def _depth(records: list[MatrixRecord | KeptRecord]) -> int:
    assert records[0].expert is not None
    return records[0].expert.depth


def _misfit(path: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> LoftqError:
    return LoftqError(
        f"the adapter's factors for {path} give {list(given)}, but the matrix is {list(wanted)}: give the adapter of "
        "this model."
    )
