"""Effect of the starting point after training: equal short LoRA fine-tunings from every start, with several seeds.

    python scripts/study/finetune.py --model MODEL --data DIR

DIR holds wikitext2-valid.txt and wikitext2-test.txt, gsm8k.train.jsonl and gsm8k.test.jsonl. Tasks: WikiText-2, trained
on the validation text and scored by test perplexity; GSM8K, trained on and scored by the answers given the questions.
Every run has the same steps, learning rate and, for a seed, the same batches in the same order; a seed also draws
QLoRA's random A. Calibrated starts use the task's own training text. Weights are dequantized to float32 for speed: the
same numbers as the packed layers give. Runs that are in results/finetune.json already, with the same settings, are not
repeated. Writes results/finetune.{json,md,png}, or under another `--name`: starts differ in the size of their factors,
and with it in how fast they learn, so results/finetune-faster.* repeats part of it at three times the learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from study import COLOURS, METHODS, RESULTS, chosen, converted, markdown, save, windows
from torch import Tensor

DEFAULT = ("QLoRA", "LoftQ T5", "refined", "refined, fitted levels", "fitted levels, full calibration")
FULL = "full precision"  # LoRA on the unquantized model
TASKS = {"wikitext": "WikiText-2", "gsm8k": "GSM8K answers"}
FILES = {
    "wikitext": ("wikitext2-valid.txt", "wikitext2-test.txt"),
    "gsm8k": ("gsm8k.train.jsonl", "gsm8k.test.jsonl"),
}
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share."""

    rank: int
    steps: int
    batch: int
    length: int
    learning_rate: float
    test_tokens: int
    calibration_tokens: int


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    task: str
    method: str
    bits: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.task} | {self.method} | {self.bits} | {self.seed}"


@cache
def load_task(model: Path, data: Path, task: str, part: int, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [windows, length]; of GSM8K only the answers' tokens are labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    content = (data / FILES[task][part]).read_text(encoding="utf-8")
    ids: list[int] = []
    labels: list[int] = []
    if task == "wikitext":
        ids = tokenizer(content, verbose=False)["input_ids"]
        labels = ids
    else:
        records = [json.loads(line) for line in content.splitlines()]
        questions = tokenizer([record["question"] + "\n" for record in records])["input_ids"]
        answers = tokenizer([record["answer"] for record in records])["input_ids"]
        for question, answer in zip(questions, answers, strict=True):
            ids += [*question, *answer, tokenizer.eos_token_id]
            labels += [*[IGNORED] * len(question), *answer, tokenizer.eos_token_id]
    return windows(ids, length, tokens), windows(labels, length, tokens)


def load_model(path: Path, model: Path, method: str, rank: int, seed: int) -> torch.nn.Module:
    """Dense float32 backbone with a trainable adapter."""
    import loftq_cli

    if method == FULL:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    loaded = loftq_cli.load(path, trainable=True, dtype=torch.float32)
    loaded.base_model.model.dequantize()  # type: ignore[union-attr, operator]
    return loaded


def score(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Perplexity of the labels."""
    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for rows, wanted in zip(ids.split(8), labels.split(8), strict=True):
            scored = int((wanted[:, 1:] != IGNORED).sum())
            total += float(model(input_ids=rows, labels=wanted).loss) * scored
            count += scored
    return math.exp(total / count)


def train(run: Run, settings: Settings, path: Path, model_path: Path, data: Path) -> dict[str, Any]:
    """One run: perplexity before and after, and the mean training loss of the last tenth."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.perf_counter()
    ids, labels = load_task(model_path, data, run.task, 0, settings.length, 10**9)
    test = load_task(model_path, data, run.task, 1, 2 * settings.length, settings.test_tokens)
    model = load_model(path, model_path, run.method, settings.rank, run.seed)
    before = score(model, *test) if run.seed == 0 else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup))
    )
    order = torch.Generator().manual_seed(run.seed)
    losses = []
    model.train()
    for _ in range(settings.steps):
        rows = torch.randint(len(ids), (settings.batch,), generator=order)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    after = score(model, *test)
    return {
        **asdict(run),
        "before": None if before is None else round(before, 4),
        "after": round(after, 4),
        "train_loss": round(mean(losses[-max(1, len(losses) // 10) :]), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def plan(arguments: argparse.Namespace) -> list[Run]:
    names = [method.name for method in chosen(arguments.methods, DEFAULT)]
    runs = [
        Run(task, name, bits, seed)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
        for bits in arguments.bits
        for name in names
    ]
    return [Run(task, FULL, 16, seed) for seed in range(arguments.seeds) for task in arguments.tasks] + runs


def convert(run: Run, settings: Settings, arguments: argparse.Namespace, work: Path) -> Path:
    """The start of a run; only QLoRA's depends on the seed."""
    method = next(method for method in METHODS if method.name == run.method)
    text = arguments.data / FILES[run.task][0]
    seed = run.seed if run.method == "QLoRA" else 0
    tokens = settings.calibration_tokens
    return converted(work, arguments.model, method, run.bits, settings.rank, text, tokens, seed)[0]


def run_all(arguments: argparse.Namespace, settings: Settings, work: Path) -> dict[str, dict[str, Any]]:
    found = known_runs(arguments.name, settings)
    todo = [run for run in plan(arguments) if run.key not in found]
    # Threads have been used already, so workers cannot be forked and are spawned.
    import multiprocessing

    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {}
        for run in todo:
            path = work if run.method == FULL else convert(run, settings, arguments, work)
            waiting[pool.submit(train, run, settings, path, arguments.model, arguments.data)] = run
        for done in as_completed(waiting):
            found[waiting[done].key] = done.result()
            print(f"{len(found)} runs, {done.result()}", flush=True)
            keep(arguments.name, found, settings)
    return found


def known_runs(name: str, settings: Settings) -> dict[str, dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["runs"] if known.get("settings") == asdict(settings) else {}


def keep(name: str, found: dict[str, dict[str, Any]], settings: Settings) -> None:
    """Save the runs done so far, so that a stopped study can resume."""
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps({"settings": asdict(settings), "runs": found}))
    os.replace(temporary, RESULTS / f"{name}.json")


def groups(found: dict[str, dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    grouped: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in found.values():
        grouped[record["task"], record["bits"], record["method"]].append(record)
    order = [FULL, *(method.name for method in METHODS)]
    return dict(sorted(grouped.items(), key=lambda item: (item[0][0], -item[0][1], order.index(item[0][2]))))


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(found: dict[str, dict[str, Any]], settings: Settings) -> str:
    grouped = groups(found)
    rows = []
    for (task, bits, name), records in grouped.items():
        after = [record["after"] for record in records]
        before = next((record["before"] for record in records if record["before"] is not None), None)
        loftq = {r["seed"]: r["after"] for r in grouped.get((task, bits, "LoftQ T5"), [])}
        pairs = [loftq[r["seed"]] - r["after"] for r in records if r["seed"] in loftq]
        # Seeds are paired: the same batches for both.
        better = f"{mean(pairs):+.2f} ± {spread(pairs):.2f}" if pairs and name != "LoftQ T5" else ""
        start = "" if before is None else f"{before:.2f}"
        rows.append([f"{TASKS[task]}, {bits}", name, start, f"{mean(after):.2f} ± {spread(after):.2f}", better])
    header = ["task, bits", "start", "perplexity before", "after, mean ± s.d.", "below LoftQ T5, paired"]
    seeds = 1 + max(record["seed"] for record in found.values())
    return (
        f"LoRA fine-tuning of the small Llama, rank {settings.rank}: {settings.steps} steps of {settings.batch} × "
        f"{settings.length} tokens, AdamW at {settings.learning_rate:g}, {seeds} seeds; perplexity on "
        f"{settings.test_tokens} tokens of the test text.\n\n" + markdown(header, rows)
    )


def picture(file: str, found: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = groups(found)
    tasks = list(dict.fromkeys(task for task, _, _ in grouped))
    names = [n for n in dict.fromkeys(name for _, _, name in grouped) if n != FULL]
    figure, axes = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 5), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        widths = sorted({bits for t, bits, name in grouped if t == task and name != FULL})
        for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
            for place, bits in enumerate(widths):
                values = [record["after"] for record in grouped.get((task, bits, name), [])]
                if values:
                    at = place + (i - len(names) / 2 + 0.5) * 0.8 / len(names)
                    label = name if place == 0 else None
                    axis.bar(at, mean(values), 0.75 / len(names), yerr=spread(values), color=colour, label=label)
        full = [record["after"] for record in grouped.get((task, 16, FULL), [])]
        if full:
            axis.axhline(mean(full), color="black", linestyle=":", label="LoRA on full precision")
        axis.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
        axis.set(title=f"{TASKS[task]}: test perplexity after fine-tuning", yscale="log")
        axis.get_yaxis().set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
    axes[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{file}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a decoder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="directory of the texts")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", help=f"by default {', '.join(DEFAULT)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--name", default="finetune", help="of the results' files")
    parser.add_argument("--work", type=Path, help="keep the conversions here, for a second run")
    arguments = parser.parse_args()
    names = ("rank", "steps", "batch", "length", "learning_rate", "test_tokens", "calibration_tokens")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        found = run_all(arguments, settings, arguments.work or Path(temporary))
    seconds = round(time.perf_counter() - started, 1)
    save(arguments.name, {"settings": asdict(settings), "seconds": seconds, "runs": found}, table(found, settings))
    picture(arguments.name, found)


if __name__ == "__main__":
    main()
