"""Meta's format: logits of an independent reference, ids of the original tokenizers, versions, bad input."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.meta_reference import (
    Reference,
    make_reference,
    sentencepiece_model,
    tiktoken_encode,
    tiktoken_file,
    tiktoken_ranks,
    write_meta,
)

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.checkpoint.meta import tokenizer
from loftq_cli.checkpoint.meta.config import MetaParams, MetaShape, infer_version
from loftq_cli.checkpoint.meta.tokenizer import read_tokenizer, special_tokens
from loftq_cli.errors import LoftqError, UsageError

IDS = torch.tensor([3, 17, 99, 4, 60, 5, 5, 280, 33])
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}
SENTENCE = "The lazy fox's 12345 dogs say: «Grüße», 你好!  two blanks\nnext"


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path]:
    """Two ranks, grouped queries, sentencepiece tokenizer."""
    pytest.importorskip("sentencepiece")
    reference = make_reference(vocab=400, **SMALL)
    folder = write_meta(reference, tmp_path_factory.mktemp("meta") / "llama-2-tiny", ranks=2, embedding_dim=1)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(400))
    (folder / "LICENSE.txt").write_text("terms")
    return reference, folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path]:
    """Two ranks that split the embedding by rows, scaled rotary frequencies, tiktoken tokenizer."""
    ranks = tiktoken_ranks(30)
    extra = {"rope_theta": 500000.0, "use_scaled_rope": True, "ffn_dim_multiplier": 1.5}
    reference = make_reference(vocab=len(ranks) + 256, **SMALL, **extra)
    folder = write_meta(reference, tmp_path_factory.mktemp("meta") / "llama3", ranks=2, embedding_dim=0)
    (folder / "tokenizer.model").write_bytes(tiktoken_file(ranks))
    return reference, folder


def converted_logits(model_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    """Load the backbone and the adapter as a user does and return the logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(backbone, model_dir, subfolder="loftq_init").eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_conversion_gives_the_reference_logits(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """At full rank the adapter contains the whole quantization error, so that Q + BA is W."""
    reference, folder = request.getfixturevalue(family)
    expected = reference.logits(IDS)
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(folder, output=out, bits=8, rank=64, format="dense", iters=1)
    assert len(manifest.matrices) == 14
    assert (converted_logits(out, IDS) - expected).abs().max() < 1e-4 < expected.abs().max()
    plan = loftq_cli.plan(folder, output=tmp_path / "out2")
    assert {side.name for side in plan.side_files} >= {"tokenizer.json", "tokenizer_config.json"}
    assert all((out / side.name).stat().st_size == side.nbytes for side in plan.side_files)


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_tensors_alone_give_the_reference_logits(family: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    reference, folder = request.getfixturevalue(family)
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config)).eval()
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors})
    with torch.no_grad():
        difference = model(IDS[None]).logits[0] - reference.logits(IDS)
    assert difference.abs().max() < 1e-4
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).shape == info.shape and checkpoint.read(name).dtype == info.dtype


def test_sentencepiece_ids(llama2: tuple[Reference, Path], tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    source = sentencepiece.SentencePieceProcessor(model_file=str(llama2[1] / "tokenizer.model"))
    loftq_cli.quantize(llama2[1], output=tmp_path / "out", bits=2, method="qlora")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (SENTENCE, "", "x", "a b", " lead", "Unseen: ∮ë\t"):
        ids = [1, *source.encode(text)]
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == source.decode(ids[1:]).strip()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2) and (tmp_path / "out" / "LICENSE.txt").exists()


def test_tiktoken_ids(llama3: tuple[Reference, Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    ranks = tiktoken_ranks(30)
    loftq_cli.quantize(llama3[1], output=tmp_path / "out", bits=2, method="qlora")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (SENTENCE, "x", "they'll", "\n\n  a", "Zürich…"):
        ids = [len(ranks), *tiktoken_encode(text, ranks)]
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    start = len(ranks)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == start + 9 and tokenizer.eos_token_id == start + 1
    assert tokenizer("<|eot_id|>").input_ids == [start, start + 9] and len(tokenizer) == start + 256
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [start + 1, start + 8, start + 9]
    assert AutoConfig.from_pretrained(tmp_path / "out").bos_token_id == start
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_special_tokens_are_metas() -> None:
    three, later = special_tokens("3", 256), special_tokens("3.1", 256)
    assert len(set(three)) == len(set(later)) == 256
    assert three[9] == later[9] == "<|eot_id|>" and later[8] == "<|eom_id|>" and later[10] == "<|python_tag|>"
    assert three[-1] == "<|reserved_special_token_250|>" and later[-1] == "<|reserved_special_token_247|>"


PUBLISHED = {
    "llama 7B": ("1", {"dim": 4096, "norm_eps": 1e-6}, {}),
    "llama 65B": ("1", {"dim": 8192, "n_heads": 64, "norm_eps": 1e-5}, {}),
    "llama 2 13B": ("2", {"dim": 5120, "n_heads": 40, "norm_eps": 1e-5}, {}),
    "llama 2 7B chat": ("2", {"dim": 4096, "norm_eps": 1e-6}, {"folder": "Llama-2-7b-chat"}),
    "llama 2 70B": ("2", {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5}, {}),
    "code llama 7B": ("code", {"dim": 4096, "rope_theta": 1e6, "norm_eps": 1e-5}, {"vocab": 32016}),
    "llama 3 8B": ("3", {"dim": 4096, "n_kv_heads": 8, "rope_theta": 5e5}, {"vocab": 128256, "tiktoken": True}),
    "llama 3.1 8B": (
        "3.1", {"dim": 4096, "n_kv_heads": 8, "rope_theta": 5e5, "use_scaled_rope": True}, {"tiktoken": True},
    ),
    "llama 3.2 1B": (
        "3.2", {"dim": 2048, "rope_theta": 5e5, "use_scaled_rope": True}, {"tiktoken": True, "tied": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_version_is_inferred(name: str) -> None:
    version, params, shape = PUBLISHED[name]
    heads = params.get("n_heads", 32)
    defaults = {"n_heads": heads, "n_kv_heads": heads, "n_layers": 32, "norm_eps": 1e-5}
    rope = {"rope_theta": None, "rope_scaling_factor": None, "use_scaled_rope": False}
    described = {"vocab": 32000, "intermediate": 11008, "tied": False, "tiktoken": False, "folder": "x", **shape}
    assert infer_version(MetaParams(**{**defaults, **rope, **params}), MetaShape(**described)) == version


def test_version_can_be_given(
    llama2: tuple[Reference, Path], llama3: tuple[Reference, Path], random_llama: Path
) -> None:
    assert open_checkpoint(llama2[1]).config["max_position_embeddings"] == 4096
    assert open_checkpoint(llama2[1], "1").config["max_position_embeddings"] == 2048
    rope = open_checkpoint(llama3[1]).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)
    assert open_checkpoint(llama3[1], "3").config["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(UsageError, match="--meta-version 2 does not match"):
        open_checkpoint(llama3[1], "2")
    with pytest.raises(UsageError, match="--meta-version is for Meta's"):
        open_checkpoint(random_llama, "3")
    with pytest.raises(UsageError, match="--meta-version cannot be 4: choose one of auto, 1, 2,"):
        loftq_cli.plan(llama3[1], meta_version=4)
    assert loftq_cli.plan(llama3[1], meta_version=3.1).recipe.meta_version == "3.1"


def test_repeated_embedding_is_tied(tmp_path: Path) -> None:
    ranks = tiktoken_ranks(0)
    extra = {"rope_theta": 500000.0, "use_scaled_rope": True}
    reference = make_reference(vocab=len(ranks) + 256, tied=True, **SMALL, **extra)
    folder = write_meta(reference, tmp_path / "tied", ranks=1, embedding_dim=0)
    (folder / "tokenizer.model").write_bytes(tiktoken_file(ranks))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["tie_word_embeddings"] and checkpoint.config["rope_parameters"]["factor"] == 32.0
    assert "lm_head.weight" not in checkpoint.tensors
    del reference.state["output.weight"]
    write_meta(reference, folder, ranks=1, embedding_dim=0)
    assert open_checkpoint(folder).fingerprint == checkpoint.fingerprint


def test_key_and_value_heads_repeated_on_neighbouring_ranks(tmp_path: Path) -> None:
    """Four ranks of a model with two key heads contain each head twice."""
    reference = make_reference(vocab=512, **SMALL)
    folder = write_meta(reference, tmp_path / "mp4", ranks=4, embedding_dim=0)
    (folder / "tokenizer.model").write_bytes(tiktoken_file(tiktoken_ranks(0)))
    whole = open_checkpoint(folder).read("model.layers.0.self_attn.k_proj.weight")
    for rank in range(4):
        state = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
        for name in [name for name in state if name.endswith(("wk.weight", "wv.weight"))]:
            state[name] = reference.state[name].chunk(2)[rank // 2].clone()
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    assert torch.equal(open_checkpoint(folder).read("model.layers.0.self_attn.k_proj.weight"), whole)


def test_the_original_folder_is_used_if_the_root_has_no_weights(
    llama2: tuple[Reference, Path], random_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    shutil.copytree(llama2[1], tmp_path / "original")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "llama" and len(checkpoint.tensors) == 21
    for path in random_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_checkpoint(tmp_path).tensors["lm_head.weight"].file == "model.safetensors"


def test_an_original_folder_that_is_a_link_is_refused(llama2: tuple[Reference, Path], tmp_path: Path) -> None:
    (tmp_path / "original").symlink_to(llama2[1])
    with pytest.raises(LoftqError, match=r"original is a link, which could lead out of"):
        open_checkpoint(tmp_path)


def test_tokenizers_are_bounded(
    llama2: tuple[Reference, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(base64.b64encode(b"a" * 100_000) + b" 0\n")
    with pytest.raises(LoftqError, match="a token is too long"):
        read_tokenizer(path)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER", 1_000)
    with pytest.raises(LoftqError, match="has more than 1000 bytes"):
        read_tokenizer(path)
    with pytest.raises(LoftqError, match="has 1000000 rows for special tokens, more than any Llama has"):
        special_tokens("3", 1_000_000)
    path.unlink()
    path.symlink_to(llama2[1] / "tokenizer.model")
    with pytest.raises(LoftqError, match="outside of the model"):
        read_tokenizer(path)


def damaged(source: Path, target: Path, **params: object) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((source / "params.json").read_text())
    (target / "params.json").write_text(json.dumps({**values, **params}))
    return target


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"moe_args": {"n": 8}}, "'moe_args', which dense text models of Llama 1 to 3 do not have"),
        ({"dim": 96}, "does not match the sizes in params.json"),
        ({"dim": "x"}, "dim 'x'"),
        ({"n_heads": 7}, "does not match its number of heads"),
        ({"n_layers": 3}, r"does not contain layers\.2\.attention"),
        ({"n_layers": 2**31 - 1}, r"does not contain layers\.2\.attention"),
        ({"n_layers": 1}, r"layers\.1\.\S+, which a Llama 1 to 3 with 1 layers does not have"),
        ({"norm_eps": -1}, "norm_eps -1"),
    ],
)
def test_params_that_contradict_the_weights(
    params: dict, sentence: str, llama2: tuple[Reference, Path], tmp_path: Path
) -> None:
    with pytest.raises(LoftqError, match=sentence):
        open_checkpoint(damaged(llama2[1], tmp_path / "bad", **params))


def test_missing_pieces_are_named(llama2: tuple[Reference, Path], tmp_path: Path) -> None:
    folder = damaged(llama2[1], tmp_path / "bad")
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff nonsense")
    with pytest.raises(LoftqError, match="is not a Llama tokenizer"):
        open_checkpoint(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(LoftqError, match=r"has no tokenizer\.model"):
        open_checkpoint(folder)
    (tmp_path / "tokenizer.model").write_bytes((llama2[1] / "tokenizer.model").read_bytes())
    assert open_checkpoint(folder).side_files()
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(LoftqError, match="which are not all the ranks"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(LoftqError, match="that all consolidated"):
        open_checkpoint(folder)
