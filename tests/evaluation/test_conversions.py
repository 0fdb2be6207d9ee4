"""`loftq eval`: the four models block by block, held against transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.family_checkpoints import saved
from support.perplexity import TOKENS, WINDOW, plain_perplexity, runner, write_tokenizer

import loftq_cli
import loftq_cli.runtime
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.forward.opening import open_model
from loftq_cli.forward.text import Text, make_windows, open_tokenizer, read_text
from loftq_cli.forward.weights import SourceWeights

STREAMED = (
    *("llama", "llama_tied", "gemma2", "gemma3_text", "opt", "phi3", "gpt2", "gpt_neox", "falcon", "mamba", "gpt_oss"),
    *("mixtral", "qwen3_moe", "deepseek_v3"),  # experts stacked while loading
    *("t5", "bart", "bert", "bert_mlm", "roberta", "deberta_v2", "distilbert", "qwen2_vl"),
)
WHOLE = ("bloom",)  # positions folded with heads


@pytest.mark.parametrize("name", (*STREAMED, *WHOLE))
def test_block_by_block_is_the_model_itself(name: str) -> None:
    """Logits, or hidden states where there are none, of windows that go through the blocks two at a time."""
    reference = saved(name)
    checkpoint = open_checkpoint(reference.folder)
    model = open_model(checkpoint, torch.device("cpu"))
    assert bool(model.blocks) == (name in STREAMED)
    model.piece = 2
    model.load(SourceWeights(checkpoint))
    ids = torch.randint(1, 90, (5, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    if reference.model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :7]
    with torch.no_grad():
        expected = reference.model(**batch, return_dict=True)
        if getattr(expected, "logits", torch.empty(0)).ndim == 3:
            pieces = dict((cut.start, logits) for cut, logits in model.logits(batch))
            found, expected = torch.cat([pieces[start] for start in sorted(pieces)]), expected.logits.flatten(0, 1)
        else:
            found, expected = model.features(batch), reference.model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if model.blocks:  # nothing of a block stays
        assert all(p.is_meta for block in model.blocks.values() for p in block.parameters())


@pytest.fixture(scope="module")
def text_file(wikitext: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(wikitext[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "start"
    loftq_cli.quantize(small_llama, output=out, bits=2, rank=8, iters=1)
    return out


def test_agrees_with_transformers_and_peft(converted: Path, small_llama: Path, text_file: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = loftq_cli.evaluate(converted, text_file, max_tokens=TOKENS, window=WINDOW)
    ids = AutoTokenizer.from_pretrained(small_llama)(text_file.read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    loftq_cli.quantize(small_llama, output=tmp_path / "plain", bits=2, method="qlora", rank=8)

    def load(path: Path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    expected = {
        "source": plain_perplexity(load(small_llama), ids),
        "plain": plain_perplexity(load(tmp_path / "plain"), ids),
        "backbone": plain_perplexity(load(converted), ids),
        "start": plain_perplexity(PeftModel.from_pretrained(load(converted), converted, subfolder="loftq_init"), ids),
    }
    assert {score.model for score in found.scores} == set(expected)
    for name, perplexity in expected.items():
        assert found.score(name).perplexity == pytest.approx(perplexity, rel=2e-4), name
    assert found.metric == "perplexity" and found.blocks == 6
    assert found.tokens == len(ids) // WINDOW * (WINDOW - 1)
    assert expected["source"] < expected["start"] < expected["plain"]
    gap = math.log(expected["start"] / expected["source"]) / math.log(expected["plain"] / expected["source"])
    assert found.score("start").gap == pytest.approx(gap, rel=1e-2)


def test_table_and_json(converted: Path, text_file: Path) -> None:
    words = ["eval", str(converted), "--text", str(text_file), "--max-tokens", "300", "--window", "64"]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0 and shown.stderr == "", shown.stderr
    for expected in ("perplexity", "source", "plain", "backbone", "start", "252 tokens", "6 blocks", "peak memory"):
        assert expected in shown.stdout
    values = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert [score["model"] for score in values["scores"]] == ["source", "plain", "backbone", "start"]
    assert values["tokens"] == 4 * 63 and values["peak_memory_bytes"] > 0
    again = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert [score["loss"] for score in again["scores"]] == [score["loss"] for score in values["scores"]]


@pytest.mark.parametrize(
    ("family", "metric"),
    [
        ("bert_mlm", "masked loss"),
        ("bart", "sequence loss"),
        ("t5", "sequence loss"),
        ("bert", "representation error"),
        ("gpt2", "perplexity"),
    ],
)
def test_other_kinds_of_models(family: str, metric: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(i * i + 3 * i) % 91}" for i in range(200)))
    out = tmp_path / "out"
    loftq_cli.quantize(saved(family).folder, output=out, bits=2, rank=4, iters=1, format="packed")
    write_tokenizer(out)
    found = loftq_cli.evaluate(out, text, window=20)
    assert found.metric == metric and found.windows == 11
    losses = {score.model: score.loss for score in found.scores}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses["plain"] != losses["source"] != losses["start"] != losses["backbone"]
    if metric == "representation error":
        assert losses["source"] == 0.0 < losses["start"] < losses["plain"]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_mixtures_of_experts_agree_with_transformers(name: str, form: str, tmp_path: Path) -> None:
    """Experts stacked by the checkpoint or while loading: source, plain quantization and backbone."""
    from transformers import AutoModelForCausalLM

    text, out, plain = tmp_path / "text.txt", tmp_path / "out", tmp_path / "plain"
    text.write_text(" ".join(f"w{(i * i + 3 * i) % 91}" for i in range(200)))
    loftq_cli.quantize(saved(name).folder, output=out, bits=2, rank=4, iters=2, format=form)
    loftq_cli.quantize(saved(name).folder, output=plain, bits=2, rank=4, method="qlora", format="dense")
    write_tokenizer(out)
    found = loftq_cli.evaluate(out, text, window=20)
    windows = make_windows(read_text(text, "--text"), open_tokenizer(out), positions=64, max_tokens=None, window=20)
    folders = {"source": saved(name).folder, "plain": plain} | ({"backbone": out} if form == "dense" else {})
    for model, folder in folders.items():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = loaded(input_ids=windows.ids).logits[:, :-1]
        expected = float(F.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten()))
        assert found.score(model).loss == pytest.approx(expected, rel=1e-4), model
    assert len({score.loss for score in found.scores}) == 4 and found.blocks


@pytest.mark.parametrize("levels", ["fitted", "nf4-subset"])
def test_plain_quantization_is_the_same_whatever_the_levels(
    levels: str, small_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {"bits": 2, "rank": 4, "format": "packed"}
    loftq_cli.quantize(small_llama, output=tmp_path / "nf", method="qlora", **options)
    loftq_cli.quantize(small_llama, output=tmp_path / "own", method="refined", iters=1, levels=levels, **options)
    scores = [loftq_cli.evaluate(tmp_path / out, text_file, max_tokens=200, window=64) for out in ("nf", "own")]
    assert scores[0].score("plain").loss == scores[1].score("plain").loss
    assert scores[0].score("start").loss != scores[1].score("start").loss


@pytest.mark.parametrize("form", ["packed", "gptq", "compressed-tensors", "gguf"])
def test_integer_containers(form: str, small_llama: Path, text_file: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(small_llama, output=tmp_path / "out", bits=4, rank=4, iters=1, format=form, data_type="int")
    found = loftq_cli.evaluate(tmp_path / "out", text_file, max_tokens=200, window=64)
    losses = {score.model: score.loss for score in found.scores}
    assert losses["plain"] == losses["backbone"], "the first step quantizes the weight itself"
    assert len(set(losses.values())) == 3 and losses["plain"] == pytest.approx(losses["source"], rel=0.1)


def test_masked_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    from loftq_cli.forward.objectives import choose_objective

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(i * i + 3 * i) % 91}" for i in range(200)))
    write_tokenizer(tmp_path)
    model = BertForMaskedLM.from_pretrained(saved("bert_mlm").folder).eval()
    tokenizer = open_tokenizer(tmp_path)
    windows = make_windows(read_text(text, "--text"), tokenizer, positions=64, max_tokens=None, window=20)
    assert (windows.ids[:, 0] == 1).all() and (windows.ids[:, -1] == 2).all()
    objective = choose_objective(model, tokenizer, windows)
    ids, labels = objective.batch["input_ids"], objective.labels
    assert labels is not None
    scored = labels != -100
    assert (ids[scored] == tokenizer.mask_token_id).all() and torch.equal(ids[~scored], windows.ids[~scored])
    assert not scored[:, 0].any() and not scored[:, -1].any()
    assert 0.05 < scored[:, 1:-1].float().mean() < 0.25
    checkpoint = open_checkpoint(saved("bert_mlm").folder)
    streamed = open_model(checkpoint, torch.device("cpu"))
    streamed.load(SourceWeights(checkpoint))
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert streamed.loss(objective.batch, labels) == pytest.approx(float(expected), rel=1e-5)


def test_records_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"question": "one?", "answer": "two", "n": 3}\n{"text": "only this", "id": "x"}\n'
    )
    (tmp_path / "b.json").write_text('["first", {"text": "second"}]')
    assert read_text(tmp_path / "a.jsonl", "--text").records == ("one?\ntwo", "only this")
    both = read_text(tmp_path, "--text")
    assert both.records == ("one?\ntwo", "only this", "first", "second")
    (tmp_path / "b.json").write_text('["first", {"text": "third"}]')
    assert read_text(tmp_path, "--text").sha256 != both.sha256


def test_only_so_many_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    text = Text(Path("x"), "", (" ".join(f"w{i % 91}" for i in range(500)),))

    def ids(max_tokens: int | None) -> torch.Tensor:
        return make_windows(text, tokenizer, positions=None, max_tokens=max_tokens, window=12).ids[:, 1:-1].flatten()

    assert ids(None).numel() == 500 and ids(35).numel() == 30
    assert torch.equal(ids(None)[:30], ids(35))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"text": "nowhere.txt"}, UsageError, "there is no such file"),
        ({"max_tokens": 0}, UsageError, "--max-tokens cannot be 0"),
        ({"max_tokens": 2}, LoftqError, "give a longer text"),
        ({"window": 5000}, UsageError, "takes 512 tokens"),
        ({"source": "nowhere"}, LoftqError, "nowhere"),
        ({"directory": "nowhere"}, LoftqError, "there is no directory"),
    ],
)
def test_mistakes_are_one_sentence(change: dict, error: type, said: str, converted: Path, text_file: Path) -> None:
    arguments = {"directory": converted, "text": text_file, **change}
    with pytest.raises(error, match=said):
        loftq_cli.evaluate(**arguments)


def test_another_model_is_no_source(converted: Path, random_llama: Path, text_file: Path) -> None:
    with pytest.raises(LoftqError, match="not the model this directory was made from"):
        loftq_cli.evaluate(converted, text_file, source=random_llama)


def test_a_record_that_no_quantizer_can_follow_is_named(random_llama: Path, tmp_path: Path) -> None:
    from loftq_cli.artifacts.manifest import read_manifest
    from loftq_cli.checkpoint import open_checkpoint
    from loftq_cli.forward.weights import PlainWeights

    out = tmp_path / "out"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=2, iters=1, include=("*.layers.0.*",))
    manifest = read_manifest(out)
    record = dataclasses.replace(manifest.matrices[0], block_size=2**62)
    weights = PlainWeights(open_checkpoint(random_llama), out, manifest)
    with pytest.raises(LoftqError, match=rf"loftq\.json does not describe {record.tensor} as the weight files hold it"):
        weights._one(record)
