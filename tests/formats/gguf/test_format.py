"""The GGUF container: the gguf package's own bytes and values, transformers' loader, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPES, GridRequest, QuantizedMatrix
from loftq_cli.formats.gguf.format import FILE, LORA_FILE, tensor_name
from loftq_cli.formats.gguf.vocabulary import vocabulary_values
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.grid import dequantize

gguf = pytest.importorskip("gguf")

KINDS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}
NAME = "model.layers.1.self_attn.q_proj.weight"


def make_model(kind: str, dtype: torch.dtype, folder: Path, *, vocab_size: int = 128) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    if kind == "Qwen3":
        sizes["head_dim"] = 128
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [0, 4])
def test_the_gguf_package_reads_our_blocks(kind: str, heads: int) -> None:
    bits, symmetric = KINDS[kind]
    form = get_format("gguf")
    grid = form.grid(GridRequest("linear", 64, 96, bits, "int", 32, torch.bfloat16, symmetric=symmetric))
    matrix = QuantizedMatrix(NAME, NAME.removesuffix(".weight"), "linear", 64, 96, grid, heads=heads)
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    quantized = block_quantizer(grid, "cpu").quantize_residual(w, w).quantized
    (tensor,) = form.tensors(matrix)
    encoded = form.encode(matrix, quantized)[tensor.name]
    assert (tensor.name, tensor.dtype, tensor.shape) == ("blk.1.attn_q.weight", encoded.dtype, tuple(encoded.shape))
    q = form.decode(matrix, lambda _name: encoded)
    assert torch.equal(q, dequantize(quantized, grid))
    theirs = torch.from_numpy(gguf.dequantize(encoded.numpy(), gguf.GGMLQuantizationType[kind]))
    if heads:  # ggml's order of a head's rows, back to halves
        theirs = theirs.reshape(heads, -1, 2, 96).transpose(1, 2).reshape(64, 96)
    assert torch.equal(theirs, q)
    grid_minmax = form.grid(
        GridRequest("linear", 64, 96, bits, "int", 32, torch.bfloat16, symmetric=symmetric, scale_rule="minmax")
    )
    own = gguf.dequantize(gguf.quantize(w.numpy(), gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind])
    ours = dequantize(block_quantizer(grid_minmax, "cpu").quantize_residual(w, w).quantized, grid_minmax)
    assert (w - q).norm() < (w - ours).norm() <= (w - torch.from_numpy(own)).norm() * 1.02


def test_what_config_json_leaves_out_is_the_model_types_default(tmp_path: Path) -> None:
    for name in ("whole", "short"):
        source = make_model("Llama", torch.float32, tmp_path / name)
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 2048}
        if name == "short":
            for key in ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "head_dim"):
                config.pop(key, None)
        (source / "config.json").write_text(json.dumps(config))
        loftq_cli.quantize(source, output=tmp_path / f"{name}.out", format="gguf", bits=4, rank=4, iters=1)
    whole, short = (gguf.GGUFReader(tmp_path / f"{name}.out" / FILE) for name in ("whole", "short"))
    own = "loftq.fingerprint"
    values = [{k: v.contents() for k, v in file.fields.items() if k != own} for file in (whole, short)]
    assert values[0] == values[1] and values[1]["llama.context_length"] == 2048


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_gguf_load_exactly(kind: str, dtype: str, tmp_path: Path) -> None:
    bits, symmetric = KINDS[kind]
    for model in ("Llama", "Qwen2", "Qwen3"):
        source, out = make_model(model, DTYPES[dtype], tmp_path / model), tmp_path / f"{model}-out"
        manifest = loftq_cli.quantize(
            source, output=out, bits=bits, format="gguf", symmetric=symmetric, rank=4, iters=2
        )
        reader = gguf.GGUFReader(out / FILE)
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        wrapped = loftq_cli.load(out, trainable=True)
        base = wrapped.base_model.model
        assert base.dtype == DTYPES[dtype] and len(manifest.matrices) == 14
        for record in manifest.matrices:
            assert types[tensor_name(record.tensor)] == kind
            q = decode_matrix(out, manifest, record)
            loaded = base.get_submodule(record.module).base_layer.weight
            assert torch.equal(loaded, q.to(DTYPES[dtype])), record.module
        assert loftq_cli.verify(out, source=source).problems == ()
        from transformers import AutoModelForCausalLM

        dense = AutoModelForCausalLM.from_pretrained(source).state_dict()
        bare = AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE, dtype=DTYPES[dtype])
        quantized = {record.tensor for record in manifest.matrices}
        for name, tensor in bare.state_dict().items():
            if name not in quantized:
                assert torch.equal(tensor, dense[name]), name
        assert bare.config.rope_parameters["rope_theta"] == base.config.rope_parameters["rope_theta"]


def test_the_lora_file_is_the_adapter_once_more(tmp_path: Path) -> None:
    """What llama.cpp adds, alpha / rank · B A in ggml's row order, is what PEFT adds."""
    source, out = make_model("Llama", torch.float32, tmp_path / "source"), tmp_path / "out"
    manifest = loftq_cli.quantize(
        source, output=out, bits=4, format="gguf", rank=4, iters=2, alpha=6.0, rule=["q_proj=4:8", "down=skip"]
    )
    reader = gguf.GGUFReader(out / LORA_FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(manifest.matrices) == 24
    for record in manifest.matrices:
        a, b = (tensors[f"{tensor_name(record.tensor)}.lora_{side}"] for side in "ab")
        product = fields["adapter.lora.alpha"] / record.rank * b @ a
        if record.heads:
            halves = product.reshape(record.heads, -1, 2, record.shape[1]).transpose(1, 2)
            product = halves.reshape(record.shape)
        assert b.shape[1] == record.rank
        assert torch.allclose(product, decode_product(out, manifest, record), atol=1e-6), record.module


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"bits": 2}, "no blocks of 2 bits"),
        ({"bits": 4, "group_size": 64}, "--group-size 32"),
        ({"bits": 8, "symmetric": False}, "drop --asymmetric"),
        ({"bits": 4, "data_type": "nf"}, "not 'nf' levels"),
        ({"bits": 4, "double_quant": True}, "--format bnb"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(recipe: dict, words: str, random_llama: Path) -> None:
    with pytest.raises(UsageError, match=words):
        loftq_cli.plan(random_llama, format="gguf", **recipe)


def test_models_gguf_is_not_written_for_are_refused(minilm: Path) -> None:
    with pytest.raises(UsageError, match=r"only, not 'bert'.*--format packed"):
        loftq_cli.plan(minilm, bits=4, format="gguf")


def tokenizer_file(kind: str, size: int, path: Path) -> None:
    """A small BPE tokenizer trained on this file, byte-level as GPT-2's or with byte tokens as SentencePiece's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = [Path(__file__).read_text()]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    (path / "tokenizer.json").write_text(json.dumps(content))


def test_tokens_without_an_embedding_row_are_left_out(tmp_path: Path) -> None:
    """A [PAD] that was added without resizing the embedding; GGUF has one token for each row."""
    source = make_model("Llama", torch.float32, tmp_path / "source", vocab_size=300)
    tokenizer_file("byte-level", 300, source)
    content = json.loads((source / "tokenizer.json").read_text())
    added = {**content["added_tokens"][0], "content": "[PAD]"}
    content["added_tokens"] += [{**added, "id": 300}, {**added, "id": 10**12}, {**added, "id": -1}]
    (source / "tokenizer.json").write_text(json.dumps(content))
    loftq_cli.quantize(source, output=tmp_path / "out", bits=4, format="gguf", rank=4, iters=1)
    tokens = gguf.GGUFReader(tmp_path / "out" / FILE).fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 300 and "[PAD]" not in tokens


def test_a_vocabulary_beyond_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    source = make_model("Llama", torch.float32, tmp_path / "source", vocab_size=290)
    tokenizer_file("byte-level", 300, source)
    with pytest.raises(
        LoftqError, match=r"tokenizer.json gives the token .* the number 290, .* only 290 embedding rows"
    ):
        loftq_cli.plan(source, output=tmp_path / "out", bits=4, format="gguf")


@pytest.mark.parametrize("vocab", [[["a", 0]], {"a": "0"}, {"a": None}, None])
def test_an_odd_vocabulary_is_left_out(vocab: object) -> None:
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    assert vocabulary_values(json.dumps(tokenizer).encode(), {"vocab_size": 4}) == {}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_file_holds_the_vocabulary(kind: str, tmp_path: Path) -> None:
    """transformers rebuilds the tokenizer from the GGUF file alone, with the same ids."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = make_model("Llama", torch.float32, tmp_path / "source", vocab_size=600)
    tokenizer_file(kind, 590, source)
    loftq_cli.quantize(source, output=tmp_path / "out", bits=4, format="gguf", rank=4, iters=1)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "out" / FILE, alone / FILE)
    fields = gguf.GGUFReader(alone / FILE).fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 600
    if kind == "byte-level":
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    theirs = AutoTokenizer.from_pretrained(alone, gguf_file=FILE)
    ours = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    for text in ("def test(path): return None", "Größe: 12 €\n\tx = 3"):
        wanted = ours(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == wanted


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], "many"])
def test_a_config_that_transformers_refuses_is_named(value: object) -> None:
    from loftq_cli.formats.gguf.format import _with_defaults

    with pytest.raises(LoftqError, match=r"config\.json has a value that transformers refuses \(.*\): correct it"):
        _with_defaults({"model_type": "llama", "num_attention_heads": value})
