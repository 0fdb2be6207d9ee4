"""Small equal matrices are converted together, with the same result and the same bytes after a stop; others alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_checkpoints import saved
from support.interruptions import StopAfter, tensors
from support.loading import load_plainly

import loftq_cli
from loftq_cli.engine.compute import pipeline
from loftq_cli.engine.compute.convert import Converted
from loftq_cli.engine.compute.lanes import Schedule
from loftq_cli.engine.compute.stacks import Stack, form_stacks, stack_size
from loftq_cli.engine.cost import estimate as estimate_module
from loftq_cli.engine.cost import memory as memory_module
from loftq_cli.engine.cost.memory import peak_memory
from loftq_cli.engine.cost.schedule import choose_schedule
from loftq_cli.errors import LoftqError
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter

RECIPE = {"bits": 2, "rank": 4, "iters": 2}
TOGETHER = Schedule(stack=3)
SOURCES = ("llama", "mixtral", "gpt_oss")  # experts in separate tensors, and in one transposed tensor


class Spy:
    """Records which matrices are converted together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stacks: list[tuple[str, ...]] = []
        real = pipeline.convert_together

        def convert_together(units: Sequence[Unit], *rest) -> list[Converted]:
            self.stacks.append(tuple(unit.tensor for unit in units))
            return real(units, *rest)

        monkeypatch.setattr(pipeline, "convert_together", convert_together)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Treat this machine as one that converts several matrices faster than one."""
    monkeypatch.setattr("loftq_cli.engine.run.choose_schedule", lambda *_: TOGETHER)
    return Spy(monkeypatch)


@pytest.mark.parametrize("form", ["packed", "dense", "bnb"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_model_is_the_one_that_matrices_alone_give(
    name: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if form == "bnb" and name != "llama":
        pytest.skip("bitsandbytes cannot hold experts")
    source = saved(name).folder
    alone = loftq_cli.quantize(source, output=tmp_path / "alone", format=form, **RECIPE)
    spy: Spy = request.getfixturevalue("together")
    manifest = loftq_cli.quantize(source, output=tmp_path / "out", format=form, **RECIPE)
    assert len(spy.stacks) >= 2 and max(map(len, spy.stacks)) == 3
    assert loftq_cli.verify(tmp_path / "out", source=source).ok
    for one, other in zip(manifest.matrices, alone.matrices):
        assert one.tensor == other.tensor and one.best == other.best and one.seconds >= 0
        assert one.residual == pytest.approx(other.residual, rel=1e-4)
        assert one.residuals == pytest.approx(other.residuals, rel=1e-4)
    model = load_plainly(tmp_path / "out", "AutoModelForCausalLM")
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.tensor([[5, 17, 3, 41]])).logits).all())


@pytest.mark.parametrize("units", [1, 7, 11])
@pytest.mark.parametrize("name", SOURCES)
def test_a_stop_within_a_batch_goes_on_to_the_same_bytes(name: str, units: int, tmp_path: Path, together: Spy) -> None:
    source, out = saved(name).folder, tmp_path / "out"
    loftq_cli.quantize(source, output=tmp_path / "whole", **RECIPE)
    whole = list(together.stacks)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(source, output=out, reporter=StopAfter(units), **RECIPE)
    together.stacks.clear()
    finished, done = set(), []

    class Watch(Reporter):
        def start(self, plan: Plan, found) -> None:
            finished.update(found)

        def done(self, unit: Unit, record) -> None:
            done.append(unit.tensor)

    manifest = loftq_cli.quantize(source, output=out, reporter=Watch(), **RECIPE)
    assert finished and not finished & set(done), "what is finished is not written again"
    assert finished | set(done) == {record.tensor for record in (*manifest.matrices, *manifest.kept)}
    assert set(together.stacks) <= set(whole), "stacks are made up as they were"
    assert [stack for stack in whole if not set(stack) <= finished] == together.stacks
    assert tensors(out) == tensors(tmp_path / "whole") and loftq_cli.verify(out, source=source).ok


def test_two_workers_take_whole_batches(tmp_path: Path, together: Spy) -> None:
    source = saved("mixtral").folder
    loftq_cli.quantize(source, output=tmp_path / "one", **RECIPE)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(source, output=tmp_path / "two", reporter=StopAfter(7), **RECIPE)
    loftq_cli.quantize(source, output=tmp_path / "two", num_processes=2, **RECIPE)
    assert tensors(tmp_path / "two") == tensors(tmp_path / "one")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["torch", "cuBLAS", "CPU"],
)
def test_too_little_memory_for_a_batch_is_enough_for_one(
    error: RuntimeError, tmp_path: Path, together: Spy, monkeypatch
) -> None:
    source = saved("mixtral").folder
    alone = tmp_path / "alone"
    with monkeypatch.context() as patch:
        patch.setattr("loftq_cli.engine.run.choose_schedule", lambda *_: Schedule())
        loftq_cli.quantize(source, output=alone, **RECIPE)

    def too_large(*_: object) -> list[Converted]:
        raise error

    monkeypatch.setattr(pipeline, "convert_together", too_large)
    loftq_cli.quantize(source, output=tmp_path / "out", **RECIPE)
    assert tensors(tmp_path / "out") == tensors(alone)
    monkeypatch.setattr(pipeline, "convert", too_large)
    with pytest.raises(LoftqError, match=r"cpu has too little memory for lm_head.weight \[96, 64\]: .*--max-memory"):
        loftq_cli.quantize(source, output=tmp_path / "none", **RECIPE)


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda weight: weight.index_fill(0, torch.tensor([1]), torch.nan),
    "zeros": torch.zeros_like,
    "huge": lambda weight: weight * 1e17,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_odd_matrix_in_a_batch_fares_as_it_does_alone(damage: str, tmp_path: Path, together: Spy) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("mixtral").folder, source)
    weights = load_file(source / "model.safetensors")
    name = next(name for name in sorted(weights) if "experts.2." in name)
    weights[name] = DAMAGE[damage](weights[name])
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    if damage == "nan":
        with pytest.raises(LoftqError, match=f"{name.replace('.', '[.]')} in model.safetensors holds nan"):
            loftq_cli.quantize(source, output=tmp_path / "out", **RECIPE)
        return
    manifest = loftq_cli.quantize(source, output=tmp_path / "out", **RECIPE)
    (odd,) = [record for record in manifest.matrices if record.tensor == name]
    assert any(name in stack for stack in together.stacks) and loftq_cli.verify(tmp_path / "out", source=source).ok
    assert odd.residual == 0.0 if damage == "zeros" else 0 < odd.residual < odd.plain_residual


def sizes(stacks: Sequence[Stack]) -> list[int]:
    """Return the number of matrices in stacks of several."""
    return [len(stack.units) for stack in stacks if len(stack.units) > 1]


def test_batches_are_of_equal_small_matrices_in_the_order_of_the_files() -> None:
    plan = loftq_cli.plan(saved("mixtral").folder, **RECIPE)
    stacks = form_stacks(plan.units, plan.recipe, 5)
    assert {unit.tensor for stack in stacks for unit in stack.units} == {unit.tensor for unit in plan.units}
    assert sum(len(stack.units) for stack in stacks) == len(plan.units)
    for stack in stacks:
        assert len(stack.units) <= 5 and len({unit.matrix and unit.matrix.shape for unit in stack.units}) == 1
    alone = form_stacks(plan.units, plan.recipe, 1)
    assert not sizes(alone)
    starts = [(stack.units[0].source.file, stack.units[0].source.start) for stack in alone]
    assert starts == sorted(starts)
    finished = {unit.tensor for unit in plan.units} - {stacks[0].units[0].tensor}
    assert form_stacks(plan.units, plan.recipe, 5, finished) == [Stack(stacks[0].units, stacks[0].units[:1])]


@pytest.mark.parametrize(
    "recipe",
    [{"svd": "exact"}, {"iters": 0}, {"method": "refined"}, {"method": "qlora"}, {"method": "qa-lora", "rank": 4}],
    ids=str,
)
def test_other_courses_are_not_batched(recipe: dict, random_llama: Path) -> None:
    more = {"data_type": "int", "format": "packed"} if recipe.get("method") == "qa-lora" else {}
    plan = loftq_cli.plan(random_llama, **{**RECIPE, **more, **recipe})
    assert not sizes(form_stacks(plan.units, plan.recipe, 32))


def test_large_matrices_and_nested_scales_are_not_batched(random_llama: Path, monkeypatch) -> None:
    plan = loftq_cli.plan(random_llama, format="bnb", double_quant=True, **RECIPE)
    assert not sizes(form_stacks(plan.units, plan.recipe, 32))
    plan = loftq_cli.plan(random_llama, format="bnb", **RECIPE)
    assert sizes(form_stacks(plan.units, plan.recipe, 32))
    monkeypatch.setattr("loftq_cli.engine.compute.stacks._STACK_WEIGHTS", 3 * 64 * 160)
    assert max(stack_size(unit, plan.recipe, 32) for unit in plan.matrices if unit.matrix.weights == 64 * 160) == 3
    monkeypatch.setattr("loftq_cli.engine.compute.stacks._SMALL_WEIGHTS", 1000)
    assert not sizes(form_stacks(plan.units, plan.recipe, 32))


def test_experts_are_stacked_under_calibration_too(tmp_path: Path) -> None:
    """Calibration does not see their inputs, so their errors are not weighted."""
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    plan = loftq_cli.plan(saved("mixtral").folder, calibrate=text, **RECIPE)
    together = [stack for stack in form_stacks(plan.units, plan.recipe, 5) if len(stack.units) > 1]
    assert together and {unit.kind for stack in together for unit in stack.units} == {"expert"}


def test_a_gpu_gets_stacks_and_its_estimate_counts_them() -> None:
    plan, gpu = loftq_cli.plan(saved("mixtral").folder, **RECIPE), torch.device("cuda", 0)
    schedule = choose_schedule(plan, gpu, None)
    assert schedule.stack > 1 and schedule.read_ahead and choose_schedule(plan, torch.device("cpu"), None).stack == 1
    one, several = peak_memory(plan, gpu, Schedule()), peak_memory(plan, gpu, schedule)
    matrix = max(unit.matrix.weights for unit in plan.matrices)
    assert one > 33 * matrix and several - one > 33 * matrix
    assert one - peak_memory(plan, gpu, Schedule(read_ahead=False)) == max(unit.source.nbytes for unit in plan.matrices)


def test_max_memory_on_a_gpu_bounds_what_passes_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "resident_memory", lambda: 0)
    plan, gpu = loftq_cli.plan(saved("mixtral").folder, **RECIPE), torch.device("cuda", 0)
    schedules, spare = [choose_schedule(plan, gpu, None)], memory_module._SPARE
    for limit in range(spare + 1_000_000, spare, -1000):  # outputs are a few tensors of some kilobytes
        try:
            schedules.append(choose_schedule(plan, gpu, limit))
        except LoftqError as error:
            assert "--max-memory" in str(error)
            break
    chosen = list(dict.fromkeys(schedules))
    assert len(schedules) < 1000, "the least was refused"
    assert [schedule.stack for schedule in chosen] == sorted((schedule.stack for schedule in chosen), reverse=True)
    assert chosen[0].stack > 1 and chosen[-1] == Schedule(read_ahead=False)


def test_a_trial_converts_a_stack_if_the_plan_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(estimate_module, "choose_schedule", lambda *_: TOGETHER)
    tried: list[int] = []
    real = estimate_module.convert_together

    def convert_together(units: Sequence[Unit], *rest) -> list[Converted]:
        tried.append(len(units))
        return real(units, *rest)

    monkeypatch.setattr(estimate_module, "convert_together", convert_together)
    plan = loftq_cli.plan(saved("mixtral").folder, output=tmp_path / "out", **RECIPE)
    found = estimate_module.estimate(plan, torch.device("cpu"))
    assert tried and set(tried) == {3} and found.seconds > 0
