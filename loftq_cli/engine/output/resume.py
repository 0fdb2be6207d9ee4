"""How a conversion resumes what an earlier run left in the output directory, or starts afresh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, read_manifest
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.output.directory import STATE, check_place, clear_state, journal_of, partial_folder, remove_files
from loftq_cli.engine.output.finished import find_finished
from loftq_cli.engine.output.journal import Header
from loftq_cli.engine.output.preflight import (
    allocated,
    check_places,
    check_space,
    owned_names,
    published_names,
)
from loftq_cli.engine.output.source_sample import changed_files, file_states, replaced_unit, sample_source
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter

_LONG_LIST = 6


def resume_or_start(plan: Plan, checkpoint: Checkpoint, overwrite: bool, reporter: Reporter, needed: int) -> None:
    """Keep the state of the same conversion, or begin a new one. Call this with the output's lock held.

    Args:
        needed: bytes of all files of the output.

    Raises:
        UsageError: the directory holds foreign files, a finished conversion, or the state of another conversion or
            of a source that has changed since then.
        LoftqError: it holds a finished conversion whose manifest is damaged, or a link where a file will be; or the
            disk has too little room.
    """
    output, files = plan.output, sample_source(checkpoint)
    states = file_states(checkpoint)
    header = journal_of(output).read_header()
    same = header is not None and header.fingerprint == plan.fingerprint and _same_commit(header.recipe, plan)
    if same and header is not None and not changed_files(header.files, files):
        check_places(plan, published_names(plan))
        check_space(plan, needed, allocated(output, published_names(plan)))
        if header.states != states and (replaced := _replaced_unit(plan, checkpoint, reporter)):
            if not overwrite:
                raise UsageError(_another_file(plan, replaced.source.file, f" ({replaced.tensor} differs)"))
        else:
            return
    elif header is not None:
        if not overwrite:
            raise UsageError(_why_not_resumed(header, plan, checkpoint, files))
        check_places(plan, published_names(plan))
        check_space(plan, needed, allocated(output))
    elif (output / MANIFEST).exists():
        _replace_finished(plan, checkpoint, overwrite, needed)
    elif any(path.name != STATE for path in output.iterdir()):
        raise UsageError(_foreign(output))
    else:
        check_space(plan, needed, allocated(output))
    remove_files(output, published_names(plan))
    clear_state(output)
    partial_folder(output).mkdir(parents=True, exist_ok=True)
    header = Header(plan.fingerprint, plan.recipe.as_dict(), checkpoint.fingerprint, files, states)
    journal_of(output).begin(header)


def foresee(plan: Plan, checkpoint: Checkpoint) -> str:
    """Return what `resume_or_start` would do with the output directory as it is; "" to start in an empty one."""
    try:
        return _foreseen(plan, checkpoint)
    except LoftqError as error:  # such as a damaged manifest: the plan is worth printing all the same
        return f"quantize would refuse: {error}"
    except OSError as error:
        reason = error.strerror or str(error)
        return f"quantize would refuse: {plan.output} cannot be read ({reason}): choose another -o."


def _foreseen(plan: Plan, checkpoint: Checkpoint) -> str:
    output = plan.output
    check_place(output, {"the model": plan.source})
    if not output.is_dir():
        return ""
    header = journal_of(output).read_header()
    if header is not None:
        files = sample_source(checkpoint)
        same = header.fingerprint == plan.fingerprint and _same_commit(header.recipe, plan)
        if same and not changed_files(header.files, files):
            return f"{output} holds an unfinished conversion with this recipe: quantize resumes it."
        return f"quantize would refuse: {_why_not_resumed(header, plan, checkpoint, files)}"
    if (output / MANIFEST).exists():
        if find_finished(plan) is not None:
            return f"{output} is finished already, with the same recipe: quantize has nothing to do."
        return f"quantize would refuse: {_why_not_replaced(plan, checkpoint, read_manifest(output))}"
    if any(path.name != STATE for path in output.iterdir()):
        return f"quantize would refuse: {_foreign(output)}"
    return ""


def _why_not_replaced(plan: Plan, checkpoint: Checkpoint, manifest: Manifest) -> str:
    if manifest.fingerprint == plan.fingerprint:
        return (
            f"{plan.output} was finished with the same recipe, but files of it are missing, damaged or of another "
            "size: give --overwrite to repeat it."
        )
    other = "version of loftq" if manifest.source_fingerprint == checkpoint.fingerprint else "source"
    different = _difference(manifest.recipe, plan) or f"another {other}"
    return (
        f"{plan.output} holds a finished conversion with {different}: choose another -o, or give --overwrite to "
        "replace it."
    )


def _foreign(output: Path) -> str:
    return f"{output} holds files that are not loftq's: choose another -o or an empty directory."


def _why_not_resumed(header: Header, plan: Plan, checkpoint: Checkpoint, files: Mapping[str, str]) -> str:
    output, different = plan.output, _difference(header.recipe, plan)
    if different:
        return (
            f"{output} holds an unfinished conversion with {different}: repeat that command to finish it, choose "
            "another -o, or give --overwrite to discard it."
        )
    changed = changed_files(header.files, files)
    if changed:
        return _another_file(plan, changed[0])
    if header.source != checkpoint.fingerprint:
        what = f"the config or the tensors' names, types or shapes in {plan.source} are not those"
    else:
        what = "this version of loftq is not the one"
    return _not_the_source(what, output)


def _another_file(plan: Plan, file: str, where: str = "") -> str:
    return _not_the_source(f"{plan.source / file}{where} is not the file", plan.output)


def _not_the_source(what: str, output: Path) -> str:
    return (
        f"{what} that the unfinished conversion in {output} began with: restore it to go on, or give --overwrite to "
        "start again."
    )


def _replaced_unit(plan: Plan, checkpoint: Checkpoint, reporter: Reporter) -> Unit | None:
    return replaced_unit(plan.units, journal_of(plan.output).entries(), checkpoint, reporter)


def _same_commit(recipe: Mapping[str, Any], plan: Plan) -> bool:
    """Another commit may hold other weights under the same names."""
    return recipe.get("revision") == plan.recipe.revision


def _replace_finished(plan: Plan, checkpoint: Checkpoint, overwrite: bool, needed: int) -> None:
    manifest = read_manifest(plan.output)
    if not overwrite:
        raise UsageError(_why_not_replaced(plan, checkpoint, manifest))
    ours = owned_names(plan.output, manifest)
    check_places(plan, ours)
    check_space(plan, needed, allocated(plan.output, ours))
    remove_files(plan.output, ours)


def _difference(recipe: Mapping[str, Any], plan: Plan) -> str:
    """Return the fields in which another conversion differs from this one: `bits 4 (now 2), rank 16 (now 64)`."""
    now = plan.recipe.as_dict()
    fields = [name for name in now if name != "model" and recipe.get(name) != now[name]]
    return ", ".join(
        f"{name.replace('_', '-')} {_short(recipe.get(name))} (now {_short(now[name])})" for name in fields
    )


def _short(value: object) -> str:
    """Render a recipe's value; allocated bits are a rule for every matrix, too many for a sentence."""
    if value in (None, "", [], ()):
        return "not set"
    if isinstance(value, list):
        return f"{len(value)} rules" if len(value) > _LONG_LIST else ", ".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
