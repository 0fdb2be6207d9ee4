"""Every benchmark of this folder, in one command; results in scripts/bench/results/ as JSON, tables and a picture.

    python scripts/bench/run.py --work /somewhere/with/10GB
    python scripts/bench/run.py --work /somewhere/with/40GB --large
    python scripts/bench/run.py --work ... --models MODEL_DIR...

Matrices against the full SVD, whole conversions of Llama's shapes against the machine's floor and the plan's own
estimate, residuals of trained models (`--models`) against exact ones, two workers against one; `--large` adds
Llama-2-13b's shapes (26 GB) and 5120 x 13824 against the full SVD; on a GPU conversions run there. Leave the machine
alone meanwhile: the ratios come from one run, but other work changes them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def commands(work: Path, models: list[Path], large: bool) -> list[list[str]]:
    """The scripts to run, with their arguments, shortest first."""
    gpu = torch.cuda.is_available()
    shapes = ["1b", "7b", "13b"] if gpu else ["0.1b", "0.4b-deep", "1b", "3b"]
    found = [["matrix.py", "1024", "4096", "--rank", "16", "64", "--bits", "2", "4"]]
    if models:
        found.append(["quality.py", *map(str, models), "--rank", "16", "64"])
        found.append(["quality.py", *map(str, models), "--rank", "16", "64", "--stack", "2"])
    found.append(["conversion.py", *shapes, "--work", str(work), "--device", "cuda" if gpu else "cpu"])
    found.append(["workers.py", "1b", "--work", str(work)])
    if large:
        found.append(["conversion.py", "13b", "--work", str(work), "--device", "cuda" if gpu else "cpu"])
        found.append(["matrix.py", "5120x13824", "--rank", "64", "16", "--bits", "2", "4", "--full"])
    return [*found, ["plot.py"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="trained models to compare residuals on")
    parser.add_argument("--large", action="store_true", help="Llama-2-13b's shapes too")
    asked = parser.parse_args()
    for script, *arguments in commands(asked.work, asked.models, asked.large):
        print(f"==> {script} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
