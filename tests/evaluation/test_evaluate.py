"""`loftq eval` against transformers and PEFT: KL to the source, trained adapters, and any other model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.calibration_text import TEXT, llama
from support.commands import loftq, sentence
from support.family_checkpoints import saved
from support.hub_server import HubServer
from support.perplexity import plain_perplexity, write_tokenizer
from support.trained_llama import CHECKPOINT, held_out_text

import loftq_cli
import loftq_cli.runtime
from loftq_cli.errors import LoftqError
from loftq_cli.evaluation.scores import Score, verdict

TOKENS, WINDOW = 480, 96
WIDE = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "alice.txt"
    path.write_text(held_out_text()[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    loftq_cli.quantize(CHECKPOINT, output=out, bits=2, rank=4, iters=2)
    return out


@pytest.fixture(scope="module")
def adapter(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a few steps by PEFT."""
    model, folder = loftq_cli.load(converted, trainable=True), tmp_path_factory.mktemp("trained") / "adapter"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    rows = torch.tensor(token_ids())[: 7 * 64].view(7, 64)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def token_ids() -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)(held_out_text()[:4000])["input_ids"][:TOKENS]


def source() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, **WIDE)


def plain_kl(model: torch.nn.Module) -> float:
    """Return KL(source ‖ model) a token by its definition, in float64, one window at a time."""
    reference, ids, total = source(), token_ids(), 0.0
    count = len(ids) // WINDOW
    for window in torch.tensor(ids[: count * WINDOW]).view(count, 1, WINDOW):
        with torch.no_grad():
            p, q = (m(input_ids=window).logits[0, :-1].double().log_softmax(-1) for m in (reference, model))
        total += float((p.exp() * (p - q)).sum())
    return total / (count * (WINDOW - 1))


def test_kl_and_perplexity_of_every_model(converted: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = loftq_cli.evaluate(converted, text, adapter=adapter, max_tokens=TOKENS, window=WINDOW)
    loftq_cli.quantize(CHECKPOINT, output=tmp_path / "plain", bits=2, method="qlora", rank=4)

    def backbone(path: Path = converted) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, **WIDE)

    expected = {
        "plain": backbone(tmp_path / "plain"),
        "backbone": backbone(),
        "start": PeftModel.from_pretrained(backbone(), converted, subfolder="loftq_init"),
        "trained": PeftModel.from_pretrained(backbone(), adapter),
    }
    assert [score.model for score in found.scores] == ["source", *expected]
    assert found.score("source").kl == 0.0 and found.adapter == str(adapter)
    for name, model in expected.items():
        score = found.score(name)
        assert score.kl == pytest.approx(plain_kl(model), rel=1e-4), name
        assert score.perplexity == pytest.approx(plain_perplexity(model, token_ids()), rel=1e-4), name
    assert found.notes == () and found.blocks == 6
    assert 0 < found.score("start").kl < found.score("plain").kl  # type: ignore[operator]
    assert found.score("trained").kl != found.score("start").kl


def test_kl_does_not_depend_on_how_the_windows_are_cut(
    converted: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group or several, logits in one piece or many, probabilities at once or in turn."""
    options = {"max_tokens": TOKENS, "window": WINDOW}
    whole = loftq_cli.evaluate(converted, text, **options)
    monkeypatch.setattr("loftq_cli.forward.streamed._HIDDEN_BYTES", 4 * 128 * WINDOW * 2)
    monkeypatch.setattr("loftq_cli.forward.streamed._LOGIT_BYTES", 4 * 512 * 70)
    monkeypatch.setattr("loftq_cli.forward.losses._CHUNK_BYTES", 4 * 512 * 30)
    cut = loftq_cli.evaluate(converted, text, **options)
    for one, other in zip(whole.scores, cut.scores):
        assert other.kl == pytest.approx(one.kl, rel=1e-5) and other.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("head", ["quantize", "keep"])
def test_kl_with_a_quantized_head(head: str, text: Path, tmp_path: Path) -> None:
    """Source and start then have different output layers, whose logits take turns."""
    out = tmp_path / "out"
    loftq_cli.quantize(CHECKPOINT, output=out, bits=4, rank=4, iters=1, format="packed", lm_head=head)
    found = loftq_cli.evaluate(out, text, max_tokens=TOKENS, window=WINDOW)
    assert found.score("start").kl == pytest.approx(plain_kl(loftq_cli.load(out, **WIDE)), rel=1e-3)


@pytest.mark.parametrize("family", ["bert_mlm", "bart", "llama_tied", "bloom"])
def test_other_kinds_have_kl_where_they_have_a_head(family: str, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    loftq_cli.quantize(saved(family).folder, output=out, bits=2, rank=4, iters=1, format="dense")
    write_tokenizer(out)
    found = loftq_cli.evaluate(out, text, window=20)
    kls = [score.kl for score in found.scores]
    assert kls[0] == 0.0 and all(kl is not None and math.isfinite(kl) and kl > 0 for kl in kls[1:])


def test_the_command_says_all_of_it(converted: Path, adapter: Path, text: Path) -> None:
    words = ["eval", converted, "--text", text, "--max-tokens", "200", "--window", "64", "--adapter", adapter]
    shown = loftq(*words)
    for expected in ("KL", "trained", "the backbone with the trained adapter", "nats a token"):
        assert expected in shown.stdout
    values = json.loads(loftq(*words, "--json").stdout)
    assert [score["model"] for score in values["scores"]] == ["source", "plain", "backbone", "start", "trained"]
    assert values["scores"][0]["kl"] == 0.0 and values["scores"][3]["kl"] > 0 and values["notes"] == []


def score(model: str, kl: float | None, perplexity: float | None, loss: float = 1.0) -> Score:
    return Score(model, loss, perplexity, kl, None, 0.0)


@pytest.mark.parametrize(
    ("plain", "start", "said"),
    [
        ((0.03, 35.7), (0.02, 35.0), None),
        ((0.03, 35.7), (0.03, 35.7), None),
        ((0.03, 35.7), (0.02, 37.1), "worse than plain quantization by perplexity (37.1 against 35.7)"),
        ((0.03, 35.7), (0.04, 35.0), "by KL (0.04 against 0.03 nats a token):"),
        ((0.03, 35.7), (0.0300012, 37.1), "by KL (0.030001 against 0.03 nats a token) and perplexity (37.1 against"),
    ],
)
def test_a_start_worse_than_plain_quantization(plain: tuple, start: tuple, said: str | None) -> None:
    found = verdict((score("source", 0.0, 28.7), score("plain", *plain), score("start", *start)))
    assert (found is None) if said is None else (found is not None and said in found and found.count("\n") == 0)


def test_a_worse_start_of_a_real_conversion_is_said(text: Path, tmp_path: Path) -> None:
    """The paper's alternation, kept at its last step, with a rank that gains nothing."""
    out = tmp_path / "out"
    loftq_cli.quantize(CHECKPOINT, output=out, bits=4, rank=1, iters=5, keep_last=True, format="packed")
    shown = loftq("eval", out, "--text", text, "--max-tokens", TOKENS, "--window", WINDOW)
    found = loftq_cli.evaluate(out, text, max_tokens=TOKENS, window=WINDOW)
    start, plain = found.score("start"), found.score("plain")
    worse = start.kl > plain.kl or start.perplexity > plain.perplexity  # type: ignore[operator]
    assert bool(found.notes) == worse == ("note: on this text the start is worse" in shown.stdout)


def test_any_model_by_itself(text: Path) -> None:
    found = loftq_cli.evaluate(CHECKPOINT, text, max_tokens=TOKENS, window=WINDOW)
    (only,) = found.scores
    assert only.perplexity == pytest.approx(plain_perplexity(source(), token_ids()), rel=1e-4)
    assert (only.model, only.kl, only.gap, found.source, found.blocks) == ("model", None, None, None, 6)
    shown = loftq("eval", CHECKPOINT, "--text", text, "--max-tokens", TOKENS, "--window", WINDOW)
    assert f"{only.perplexity:.3f}" in shown.stdout and "the model itself" in shown.stdout and "KL" not in shown.stdout


@pytest.mark.parametrize("to", ["dense", "requantize"])
def test_merged_models(to: str, converted: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    """Block by block where they are dense, and as transformers loads them where they are packed."""
    from transformers import AutoModelForCausalLM

    merged = tmp_path / "merged"
    loftq_cli.merge(converted, adapter, output=merged, to=to, dtype="float32" if to == "dense" else "auto")
    found = loftq_cli.evaluate(merged, text, source=CHECKPOINT, max_tokens=TOKENS, window=WINDOW)
    model = AutoModelForCausalLM.from_pretrained(merged, **WIDE)
    assert [one.model for one in found.scores] == ["source", "model"]
    assert found.score("model").kl == pytest.approx(plain_kl(model), rel=1e-4)
    assert found.score("model").perplexity == pytest.approx(plain_perplexity(model, token_ids()), rel=1e-4)
    assert bool(found.blocks) == (to == "dense")
    if to == "dense":
        trained = loftq_cli.evaluate(converted, text, adapter=adapter, max_tokens=TOKENS, window=WINDOW)
        assert trained.score("trained").kl == pytest.approx(found.score("model").kl, rel=1e-4)


def test_an_adapter_on_a_model_that_was_not_converted(text: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(source(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter", "max_tokens": TOKENS, "window": WINDOW}
    found = loftq_cli.evaluate(CHECKPOINT, text, source=CHECKPOINT, **options)
    assert found.score("model").perplexity == pytest.approx(plain_perplexity(model, token_ids()), rel=1e-4)
    assert found.score("model").kl == pytest.approx(plain_kl(model), rel=1e-4)


def test_models_and_conversions_on_the_hub(converted: Path, text: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/plain", CHECKPOINT)
    hub.add("org/out", converted)
    options = {"max_tokens": TOKENS, "window": WINDOW}
    for name, place in (("org/plain", CHECKPOINT), ("org/out", converted)):
        there, here = loftq_cli.evaluate(name, text, **options), loftq_cli.evaluate(place, text, **options)
        assert [one.loss for one in there.scores] == [one.loss for one in here.scores]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no directory nowhere"),
        (["{text}"], "{text} is a file: give the directory"),
        (["{empty}"], "contains no *.safetensors"),
        (["{converted}", "--adapter", "{empty}"], "holds no adapter_config.json"),
        (["{converted}", "--adapter", "{other}/loftq_init"], "was not trained on {converted}"),
        (["{bert}"], "BertModel has no language head"),
        (["{llama}", "--source", "{bert}"], "so they cannot be compared"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    words: list[str], said: str, converted: Path, text: Path, tmp_path: Path
) -> None:
    places = {"converted": converted, "text": text, "empty": tmp_path / "empty", "other": tmp_path / "other"}
    places |= {"bert": tmp_path / "bert", "llama": tmp_path / "llama"}
    places["empty"].mkdir()
    if "{bert}" in words:
        shutil.copytree(saved("bert").folder, places["bert"])
        write_tokenizer(places["bert"])
    if "{llama}" in words:
        llama(places["llama"])
    if any("{other}" in word for word in words):
        loftq_cli.quantize(CHECKPOINT, output=places["other"], bits=4, rank=4, iters=1)
    result = loftq("eval", *(word.format(**places) for word in words), "--text", text, "--window", "20", code=1)
    assert said.format(**places) in sentence(result)


def test_an_adapter_with_another_vocabulary_has_to_be_merged_first(converted: Path, text: Path, tmp_path: Path) -> None:
    model = loftq_cli.load(converted, trainable=True)
    model.get_base_model().resize_token_embeddings(520)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(LoftqError, match="merge it with `loftq merge` and evaluate the result"):
        loftq_cli.evaluate(converted, text, adapter=tmp_path / "adapter")
