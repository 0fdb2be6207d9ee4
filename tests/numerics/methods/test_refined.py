"""The refined method: the claims of its docstring, on odd matrices and on trained ones, and end to end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.loading import check_matrices, load_plainly, source_weights
from support.matrices import weight

import loftq_cli
from loftq_cli.errors import UsageError
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid, dequantize
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.methods import refined as module
from loftq_cli.numerics.methods.loftq import LoftQResult, exact_step, loftq
from loftq_cli.numerics.methods.refined import refined
from loftq_cli.numerics.methods.refined_steps import LowRankSteps, shallow_steps

F32, BF16 = torch.float32, torch.bfloat16


def grid(bits: int, data_type: str = "nf", dtype: torch.dtype = F32, signed: bool = False) -> BlockGrid:
    return BlockGrid(codebook(data_type, bits), 64, "rows", dtype, dtype, signed)


def run(w: torch.Tensor, kind: BlockGrid, rank: int = 8, **options) -> LoftQResult:
    steps = shallow_steps(rank, torch.Generator().manual_seed(0)) if rank else None
    levels = kind.levels() if kind.codebook.fitted else None
    return refined(w, block_quantizer(kind, "cpu"), low_rank=steps, levels=levels, **options)


def left(w: torch.Tensor, result: LoftQResult, kind: BlockGrid) -> float:
    q = dequantize(result.quantized, kind)
    return float((w - q - result.lora_b @ result.lora_a).double().norm() / w.double().norm())


@pytest.mark.parametrize("init", ["svd", "zero"])
@pytest.mark.parametrize("data_type", ["nf", "nf4-subset", "fitted", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_result_reports_its_own_residual_and_beats_loftq(bits: int, data_type: str, init: str) -> None:
    w, kind = weight(), grid(bits, data_type, signed=data_type == "fitted")
    result = run(w, kind, init=init)
    assert left(w, result, kind) == pytest.approx(result.residual, rel=1e-5)
    assert result.residual == min(result.residuals) and len(result.residuals) <= module.DEFAULT_ITERS
    same = "nf" if data_type in ("nf4-subset", "fitted") else data_type
    assert (
        result.residual < loftq(w, block_quantizer(grid(bits, same), "cpu"), iters=5, low_rank=exact_step(8)).residual
    )


@pytest.mark.parametrize(("dtype", "rounding"), [(F32, 1e-6), (BF16, 2e-4)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("init", ["svd", "zero"])
def test_plain_steps_never_raise_the_residual(init: str, bits: int, dtype: torch.dtype, rounding: float) -> None:
    exact = LowRankSteps(exact_step(8), exact_step(8))
    for seed in range(3):
        w = weight(seed=seed)
        for signed in (False, True):
            quantizer = block_quantizer(grid(bits, dtype=dtype, signed=signed), "cpu")
            steps = refined(w, quantizer, iters=15, low_rank=exact, init=init, feedback=False).residuals
            assert len(steps) > 3 and all(b <= a * (1 + rounding) for a, b in itertools.pairwise(steps))


def test_feedback_improves_on_stalled_plain_steps() -> None:
    w = weight(256, 256)
    assert run(w, grid(2), rank=16).residual < 0.97 * run(w, grid(2), rank=16, feedback=False, iters=40).residual


def test_a_diverging_run_falls_back_to_plain_steps_from_the_best_iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USUAL_FEEDBACK", replace(module.USUAL_FEEDBACK, added=4.0))
    w, kind = weight(), grid(2)
    result = run(w, kind, iters=10)
    peak = max(range(len(result.residuals)), key=lambda i: result.residuals[i])
    assert result.residuals[peak] > 1.5 * min(result.residuals[:peak])
    after = result.residuals[peak + 1 :]
    assert after and max(after) <= min(result.residuals[:peak]) * 1.001
    assert left(w, result, kind) == pytest.approx(result.residual, rel=1e-5)


def test_kept_estimates_are_made_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices use bfloat16 in steps with feedback, but the stored and reported results do not."""
    w, usual = weight(640, 576), module.USUAL_FEEDBACK
    for added in (0.28, 4.0):  # ends on its best iterate, or falls back to an early one
        monkeypatch.setattr(module, "USUAL_FEEDBACK", replace(usual, added=added))
        for kind in (grid(2), grid(4, "fitted", signed=True)):
            for options in ({"iters": 3}, {"iters": 8}, {"iters": 8, "keep_last": True}):
                result = run(w, kind, rank=16, **options)
                assert left(w, result, kind) == pytest.approx(result.residual, rel=1e-5)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    w, before, found = weight(1100, 1024), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(run(w, grid(2), rank=16, iters=5))
        finally:
            torch.set_num_threads(before)
    one, two = found
    assert torch.equal(one.lora_a, two.lora_a) and torch.equal(one.lora_b, two.lora_b)
    assert torch.equal(one.quantized.codes, two.quantized.codes) and one.residuals == two.residuals


def test_a_nearly_exact_matrix_is_not_spoilt_by_rounding() -> None:
    """If BA captures all but a thousandth of W, errors of bfloat16 would exceed the rest."""
    generator = torch.Generator().manual_seed(0)
    leading = torch.randn(640, 16, generator=generator) @ torch.randn(16, 576, generator=generator)
    w, kind = leading + 1e-4 * torch.randn(640, 576, generator=generator), grid(4)
    exact = refined(w, block_quantizer(kind, "cpu"), low_rank=LowRankSteps(exact_step(16), exact_step(16)))
    assert run(w, kind, rank=16).residual < 1.02 * exact.residual < 4e-6


def test_an_unchanged_residual_ends_the_run() -> None:
    assert len(run(weight(), grid(4), rank=8, iters=200, feedback=False).residuals) < 100
    assert len(run(torch.zeros(64, 128), grid(4), iters=50).residuals) < 10


def test_keep_last_keeps_the_last() -> None:
    w = weight()
    last, best = run(w, grid(2), iters=5, keep_last=True), run(w, grid(2), iters=5)
    assert last.best == len(last.residuals) and last.residuals == best.residuals
    assert left(w, last, grid(2)) == pytest.approx(last.residual, rel=1e-5)


def test_without_an_adapter_scales_alone_are_fitted() -> None:
    w = weight()
    for kind, share in ((grid(2), 0.8), (grid(2, "fitted", signed=True), 0.75)):
        result = run(w, kind, rank=0)
        assert result.lora_a.shape == (0, 160) and result.lora_b.shape == (96, 0)
        assert left(w, result, kind) == pytest.approx(result.residual, rel=1e-5)
        assert result.residual < share * result.plain_residual


@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(64, 128), torch.ones(64, 128), torch.full((64, 128), 1e-30), weight(64, 128) * 1e30,
        torch.eye(64) * 5, weight(3, 64), weight(64, 1),
    ],
    ids=["zero", "constant", "tiny", "huge", "identity", "three rows", "one column"],
)  # fmt: skip
def test_odd_but_valid_matrices(w: torch.Tensor) -> None:
    rank = min(8, *w.shape)
    for kind in (grid(4, signed=True), grid(2, "fitted")):
        result = run(w, kind, rank=rank)
        assert result.lora_a.isfinite().all() and result.lora_b.isfinite().all()
        assert result.lora_a.shape == (rank, w.shape[1]) and 0 <= result.residual <= 1


def test_shallow_steps_cost_nothing() -> None:
    """One power per step and three at the end, compared with exact SVDs throughout."""
    w = weight(600, 640)
    exact = LowRankSteps(exact_step(16), exact_step(16))
    best = refined(w, block_quantizer(grid(2), "cpu"), low_rank=exact)
    assert run(w, grid(2), rank=16).residual <= 1.002 * best.residual


@pytest.mark.parametrize(("bits", "data_type", "rank"), [(2, "nf", 16), (2, "nf4-subset", 64), (4, "nf", 64)])
@pytest.mark.parametrize("model", ["minilm", "small_llama"])
def test_below_loftq_on_every_trained_matrix(
    model: str, bits: int, data_type: str, rank: int, request: pytest.FixtureRequest
) -> None:
    weights = {}
    for file in request.getfixturevalue(model).glob("*.safetensors"):
        weights |= load_file(file)
    chosen = [name for name, w in weights.items() if w.ndim == 2 and ("layers.2." in name or "layer.3." in name)][:3]
    assert chosen
    for name in chosen:
        w = weights[name].float()
        base = loftq(w, block_quantizer(grid(bits), "cpu"), iters=5, low_rank=exact_step(rank))
        assert run(w, grid(bits, data_type), rank=rank).residual < 0.85 * base.residual, name


CASES = [
    ("packed", 2, "fitted"), ("packed", 3, "nf"), ("bnb", 2, "nf4-subset"), ("bnb", 3, "nf4-subset"), ("bnb", 4, "nf"),
    ("dense", 2, "nf4-subset"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bits", "levels"), CASES)
def test_what_is_optimised_is_what_loads(name: str, bits: int, levels: str, random_llama: Path, tmp_path: Path) -> None:
    """With transformers and PEFT as loaders: the backbone is Q bit for bit, and the adapter is the recorded one."""
    if name == "bnb":
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    options = {"bits": bits, "format": name, "levels": levels, "rank": 4, "exclude": "*down_proj"}
    manifest = loftq_cli.quantize(random_llama, output=out, method="refined", **options)
    assert {record.data_type for record in manifest.matrices} == {levels}
    assert manifest.recipe["levels"] == levels and manifest.recipe["init"] == "svd" and manifest.recipe["iters"] == 16
    assert f"--levels {levels}" in (out / "README.md").read_text() and "--iters" not in (out / "README.md").read_text()
    check_matrices(out, manifest, load_plainly(out, "AutoModelForCausalLM"), source_weights(random_llama))
    if name == "packed" and levels == "fitted":
        plain = loftq_cli.plan(
            random_llama, output=tmp_path / "nf", bits=bits, format=name, rank=4, exclude="*down_proj"
        )
        assert manifest.totals.backbone_bytes - plain.backbone_bytes == 4 * 2**bits * len(manifest.matrices)


def test_fitted_levels_survive_casting_training_and_saving(random_llama: Path, tmp_path: Path) -> None:
    from loftq_cli.runtime.linear import LoftqLinear

    out = tmp_path / "out"
    loftq_cli.quantize(
        random_llama,
        output=out,
        method="refined",
        bits=3,
        levels="fitted",
        rank=4,
        embeddings="quantize",
        lm_head="quantize",
    )
    model = loftq_cli.load(out, trainable=True)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    backbone = loftq_cli.load(out, adapter=False)
    before = backbone(ids).logits
    own = {name: m.weight_levels for name, m in backbone.named_modules() if isinstance(m, LoftqLinear)}
    assert len({tuple(levels.tolist()) for levels in own.values()}) == len(own), "every matrix has its own levels"
    backbone.save_pretrained(tmp_path / "again")
    assert torch.equal(type(backbone).from_pretrained(tmp_path / "again")(ids).logits, before)
    layers = [module.half() for module in backbone.modules() if isinstance(module, LoftqLinear)]
    assert all(layer.weight_levels.dtype == F32 for layer in layers)
    assert torch.equal(loftq_cli.load(out, adapter=False).dequantize()(ids).logits, before)


def test_the_same_recipe_gives_the_same_bytes(random_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        loftq_cli.quantize(random_llama, output=tmp_path / name, method="refined", bits=2, levels="fitted", rank=4)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"levels": "fitted"}, "needs --method refined"),
        ({"init": "zero", "method": "qlora"}, "needs --method refined"),
        ({"method": "refined", "levels": "lloyd"}, "--levels"),
        ({"method": "refined", "init": "random"}, "--init"),
        ({"method": "refined", "levels": "fitted", "data_type": "uniform"}, "one of the two"),
        ({"method": "refined", "levels": "fitted", "format": "bnb"}, "only packed"),
        ({"method": "refined", "levels": "fitted", "format": "dense"}, "only packed"),
    ],
)
def test_meaningless_options_are_refused(options: dict, named: str, random_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        loftq_cli.plan(random_llama, output=tmp_path / "out", bits=2, **options)
