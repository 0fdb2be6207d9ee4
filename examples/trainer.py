"""Convert a model to 2 bits and fine-tune its adapter with transformers' Trainer.

    pip install 'loftq-cli @ git+https://github.com/loftq/loftq'
    python examples/trainer.py --text my-text.txt

The output holds the conversion in `converted` and the trained adapter in `trained`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

import loftq_cli


def make_rows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[dict[str, list[int]]]:
    """Cut a text into rows of `length` tokens, each with its own tokens as labels."""
    ids = tokenizer(text).input_ids
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a directory, or ORG/NAME on the Hub")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file to train on")
    parser.add_argument("--output", type=Path, default=Path("trainer-output"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    args = parser.parse_args()

    converted = args.output / "converted"
    if not (converted / "config.json").is_file():  # written last, so the conversion is finished
        loftq_cli.quantize(args.model, output=converted, bits=2, rank=args.rank)

    model = loftq_cli.load(converted, trainable=True)
    model.print_trainable_parameters()
    tokenizer = AutoTokenizer.from_pretrained(converted)
    training = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
    )
    rows = make_rows(tokenizer, args.text.read_text(encoding="utf-8"), args.length)
    Trainer(model=model, args=training, train_dataset=rows).train()
    model.save_pretrained(args.output / "trained")  # the adapter alone


if __name__ == "__main__":
    main()
