"""Mixed precision: budgets are met, the paper's recipe is the paper's, and loftq.yaml repeats what was allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence

import loftq_cli
from loftq_cli.api import default_output
from loftq_cli.cli.plan import mean_bits, output_sizes, widths
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.planning.plan import Plan
from loftq_cli.recipe.model import Recipe, exact_rule, make_recipe, parse_rule


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loftq" / "curves"


def make_llama(path: Path, layers: int) -> Path:
    """Random layers with errors of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2:  # heavier tails quantize worse
            parameter.data = parameter.data.sign() * parameter.data.abs() ** (1 + (i % 5) / 2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers: matrices enough to meet a mean."""
    return make_llama(tmp_path_factory.mktemp("eight") / "llama", 8)


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers as the paper's Llama-2-7b has."""
    return make_llama(tmp_path_factory.mktemp("deep") / "llama", 32)


def bits_of(plan: Plan) -> dict[str, int]:
    return {unit.module or "": unit.matrix.grid.bits for unit in plan.matrices if unit.matrix}


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.3, 6.5])
def test_the_mean_is_met(bits: float, llama: Path) -> None:
    plan = loftq_cli.plan(llama, bits=bits)
    assert plan.recipe.mix == "optimal" and plan.recipe.format == "packed"
    assert bits * 0.995 <= mean_bits(plan) <= bits
    assert set(widths(plan)) <= {2, 3, 4, 8} and len(widths(plan)) > 1
    assert not any("the mean is" in note for note in plan.notes)


@pytest.mark.parametrize(("bits", "layers"), [(2.25, 4), (2.5, 8), (3, 16), (4, 32), (2, 0)])
def test_the_papers_recipe(bits: float, layers: int, deep_llama: Path) -> None:
    plan = loftq_cli.plan(deep_llama, bits=bits, mix="paper")
    assert mean_bits(plan) == bits and not plan.notes
    assert all(width == (4 if int(name.split(".")[2]) < layers else 2) for name, width in bits_of(plan).items())


def test_the_papers_recipe_says_which_mean_it_gives(random_llama: Path) -> None:
    plan = loftq_cli.plan(random_llama, bits=2.4, mix="paper")
    assert mean_bits(plan) == 2
    assert any("the mean is 2.000 bits, not 2.4" in note and "whole layers" in note for note in plan.notes)


def test_the_target_size_is_met(llama: Path, tmp_path: Path) -> None:
    small, large = (loftq_cli.plan(llama, bits=bits, format="packed").files[0].nbytes for bits in (2, 4))
    target = (small + large) // 2
    plan = loftq_cli.plan(llama, target_size=str(target))
    assert 0.995 * target <= plan.files[0].nbytes <= target
    assert plan.recipe.mix == "optimal"
    made = loftq_cli.quantize(llama, target_size=str(target), method="qlora", output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= target
    assert made.totals.bits_effective == round(plan.bits_effective, 4)


def test_the_objective_is_below_the_papers_at_equal_bytes(llama: Path) -> None:
    from loftq_cli.kernels import block_quantizer

    weights = load_file(llama / "model.safetensors")

    def objective(plan: Plan) -> float:
        total = 0.0
        for unit in plan.matrices:
            assert unit.matrix is not None
            weight = weights[unit.tensor].float()
            left = block_quantizer(unit.matrix.grid, "cpu").quantize_residual(weight, weight).residual
            total += float(left.norm() / weight.norm()) ** 2 * unit.matrix.weights
        return total

    paper = loftq_cli.plan(llama, bits=2.5, mix="paper")
    best = loftq_cli.plan(llama, target_size=str(paper.files[0].nbytes))
    assert best.backbone_bytes <= paper.backbone_bytes and objective(best) < objective(paper)


def test_absolute_errors_weigh_large_weights(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "scaled"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    loud = "model.layers.3.mlp.up_proj.weight"
    save_file({**tensors, loud: tensors[loud] * 1000}, source / "model.safetensors", metadata={"format": "pt"})
    relative = bits_of(loftq_cli.plan(llama, bits=2.5))
    assert bits_of(loftq_cli.plan(source, bits=2.5)) == relative, "a scale changes no relative error"
    assert bits_of(loftq_cli.plan(source, bits=2.5, weigh="absolute"))[loud.removesuffix(".weight")] == 8


def test_loftq_yaml_repeats_it_and_measures_nothing(
    llama: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"bits": 2.5, "rank": 2, "iters": 1, "rule": ("o_proj=3", "layers.7.*q_proj=skip"), "rank_budget": 2.0}
    first = loftq_cli.quantize(llama, output=tmp_path / "a", **recipe)
    assert len({record.rank for record in first.matrices}) > 1
    assert {r.bits for r in first.matrices if "o_proj" in r.module} == {3}
    assert not any(r.module.endswith("layers.7.self_attn.q_proj") for r in first.matrices)
    (cached,) = own_cache.iterdir()
    cached.unlink()
    again = loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    assert not list(own_cache.iterdir()), "a resolved recipe needs no numbers"
    assert again.fingerprint == first.fingerprint
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "loftq.yaml", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "--bits 2.5 --mix optimal" in card and "--rule o_proj=3" in card and "^model" not in card


def test_plan_and_quantize_measure_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.checkpoint.safetensors import SafetensorsCheckpoint

    reads: list[str] = []
    read = SafetensorsCheckpoint.read
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda self, name: reads.append(name) or read(self, name))
    planned = loftq_cli.plan(llama, bits=2.25, output=tmp_path / "out")
    assert len(reads) == len(set(reads)) == 8 * 7
    reads.clear()
    made = loftq_cli.quantize(llama, bits=2.25, output=tmp_path / "out", method="qlora")
    assert len(reads) == len(set(reads)), "every tensor is read once, to be converted"
    assert {r.module: r.bits for r in made.matrices} == bits_of(planned)
    weights = llama / "model.safetensors"
    state = weights.stat()
    try:
        import os

        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        reads.clear()
        loftq_cli.plan(llama, bits=2.25)
        assert len(reads) == 8 * 7, "changed files are measured anew"
    finally:
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_ranks_meet_their_budget(llama: Path) -> None:
    plan = loftq_cli.plan(llama, bits=2, rank_budget=4.5)
    assert plan.recipe.mix == "" and {*bits_of(plan).values()} == {2}
    sizes = [(unit.target.rank, sum(unit.matrix.shape)) for unit in plan.matrices if unit.target and unit.matrix]
    mean = sum(rank * size for rank, size in sizes) / sum(size for _, size in sizes)
    assert 4.5 * 0.995 <= mean <= 4.5 and len({rank for rank, _ in sizes}) > 1
    assert min(rank for rank, _ in sizes) >= 1


def test_only_widths_that_the_container_holds(llama: Path) -> None:
    plan = loftq_cli.plan(llama, bits=2.5, format="bnb")
    assert set(widths(plan)) == {2, 4} and mean_bits(plan) == pytest.approx(2.5, rel=0.005)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"bits": 2.5, "rule": ("proj=4",)}, None),
        ({"bits": 2.5, "rule": ("mlp=8",)}, "below the lowest possible mean"),
        ({"target_size": "1KB"}, "--target-size 1KB is too small"),
        ({"bits": 5}, "--bits cannot be 5"),
        ({"bits": 1.5}, "--bits cannot be 1.5"),
        ({"bits": 9.5}, "--bits cannot be 9.5"),
        ({"bits": 2.5, "mix": "best"}, "--mix cannot be 'best'"),
        ({"bits": 5, "mix": "paper"}, "4 and 2 bits"),
        ({"rank_budget": 0.5}, "--rank-budget"),
        ({"weigh": "both", "bits": 2.5}, "--weigh"),
        ({"target_size": "large"}, "invalid size"),
        ({"bits": 2.5, "format": "bnb", "data_type": "uniform"}, "use --format packed"),
        ({"bits": 2.5, "format": "gptq", "group_size": 32}, "one bit width"),
    ],
)
def test_what_cannot_be_is_refused(recipe: dict, said: str | None, llama: Path) -> None:
    if said is None:
        assert any("the mean is 4.000 bits, not 2.5" in note for note in loftq_cli.plan(llama, **recipe).notes)
        return
    with pytest.raises(UsageError, match=said):
        loftq_cli.plan(llama, **recipe)


def test_broken_weights_are_named_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoftqError, match=r"model.layers.1.mlp.up_proj.weight .*not finite|holds a NaN or an infinity"):
        loftq_cli.quantize(source, bits=2.5, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_rules() -> None:
    assert default_output(Recipe("a/m", bits=2.5, rank=8)).name == "m-loftq-2.5bit-r8"
    assert default_output(Recipe("a/m", bits=3.0)).name == "m-loftq-3bit-r16"
    assert default_output(Recipe("a/m", target_size="6 GB", rank_budget=12.5)).name == "m-loftq-6GB-r12.5"
    rule = parse_rule(exact_rule("model.layers.1.q-proj", 3, 8))
    assert rule.exact and (rule.bits, rule.rank) == (3, 8)
    assert rule.matches("model.layers.1.q-proj") and not rule.matches("model.layers.1.q-projx")
    assert not parse_rule("q_proj=4").exact and not parse_rule("^a.b$=4").exact
    assert make_recipe({"model": "m", "bits": 3.0}).mix == "" and make_recipe({"model": "m", "bits": 2.75}).mix


def test_the_commands(llama: Path, tmp_path: Path) -> None:
    shown = loftq("plan", llama, "--bits", 2.5)
    assert "optimal mix:" in shown.stdout and "mean 2.500 bits" in shown.stdout
    assert "model.layers.7.mlp.up_proj" in shown.stdout, "every matrix has its line"
    values = json.loads(loftq("plan", llama, "--bits", 2.5, "--mix", "paper", "--json").stdout)
    assert values["widths"] == {"2": 42, "4": 14} and values["bits_mean"] == 2.5
    loftq("quantize", llama, "--bits", 3, "--mix", "optimal", "--iters", 0, "-o", tmp_path / "out", "-q")
    assert json.loads(loftq("inspect", tmp_path / "out", "--json").stdout)["recipe"]["mix"] == "optimal"
    assert "--target-size" in sentence(loftq("plan", llama, "--target-size", "1KB", code=2))


def test_every_file_has_the_planned_size(llama: Path, tmp_path: Path) -> None:
    from loftq_cli.artifacts.summary import text_sizes

    plan = loftq_cli.plan(llama, output=tmp_path / "out", bits=2.5, rank_budget=2, max_shard_size="100KB")
    loftq_cli.quantize(llama, output=tmp_path / "out", bits=2.5, rank_budget=2, max_shard_size="100KB")
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: path.stat().st_size for name, path in files.items()} == output_sizes(plan, text_sizes(plan))
