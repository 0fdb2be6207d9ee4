"""Convert a model to 2 bits and fine-tune its adapter with TRL's SFTTrainer.

    pip install 'loftq-cli @ git+https://github.com/loftq/loftq' trl
    python examples/trl_sft.py --data my-examples.jsonl

Each line of the data is a JSON object with the field "text", or with "prompt" and "completion".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loftq_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a directory, or ORG/NAME on the Hub")
    parser.add_argument("--data", required=True, help="a JSON Lines file to train on")
    parser.add_argument("--output", type=Path, default=Path("trl-output"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=512, help="tokens to keep of each example")
    args = parser.parse_args()

    converted = args.output / "converted"
    if not (converted / "config.json").is_file():  # written last, so the conversion is finished
        loftq_cli.quantize(args.model, output=converted, bits=2, rank=args.rank)

    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    training = SFTConfig(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        max_length=args.length,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=loftq_cli.load(converted, trainable=True),  # has its adapter already: pass no peft_config
        args=training,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(args.output / "trained"))  # the adapter and the tokenizer


if __name__ == "__main__":
    main()
