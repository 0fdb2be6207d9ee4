#!/usr/bin/env bash
# Build the source distribution and the wheel, check their metadata, install the wheel in an empty virtual environment,
# and use it from there. LOFTQ_PYTHON is an interpreter with `build` and `twine`; by default that of .venv.
#
#   bash scripts/check_wheel.sh [DIRECTORY]     writes to DIRECTORY (default: dist/)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${LOFTQ_PYTHON:-$ROOT/.venv/bin/python}"
OUT="$(mkdir -p "${1:-$ROOT/dist}" && cd "${1:-$ROOT/dist}" && pwd)"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

echo "==> building"
rm -f "$OUT"/loftq_cli-*.whl "$OUT"/loftq_cli-*.tar.gz
"$PYTHON" -m build --outdir "$OUT" "$ROOT" > "$WORK/build.log" 2>&1 || { cat "$WORK/build.log" >&2; exit 1; }
"$PYTHON" -m twine check --strict "$OUT"/loftq_cli-*

echo "==> installing the wheel in an empty environment"
"$PYTHON" -m venv "$WORK/venv"
VENV="$WORK/venv/bin"
"$VENV/python" -m pip install --quiet --disable-pip-version-check --constraint "$ROOT/scripts/constraints.txt" torch
"$VENV/python" -m pip install --quiet --disable-pip-version-check --constraint "$ROOT/scripts/constraints.txt" \
  "$OUT"/loftq_cli-*.whl

echo "==> using it"
cd "$WORK" # not in the checkout, whose loftq_cli would be imported
export HF_HUB_OFFLINE=1
"$VENV/python" "$ROOT/scripts/check_imports.py"
"$VENV/loftq" --help > /dev/null
"$VENV/loftq" schema > schema.json
"$VENV/python" - << 'END'
from importlib.resources import files
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

shipped = files("loftq_cli.configs").joinpath("recipe.schema.json").read_text(encoding="utf-8")
assert shipped == Path("schema.json").read_text(encoding="utf-8"), "the shipped schema is not the one that is printed"
text = files("loftq_cli.calibration").joinpath("default", "text.txt").read_bytes()
assert 100_000 < len(text) < 200_000, "the text of --calibrate default is not shipped"
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 128}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained("tiny")
END
"$VENV/loftq" quantize tiny --bits 2 --rank 8 -o converted
"$VENV/loftq" verify converted --source tiny
echo "==> $(ls "$OUT"/loftq_cli-*.whl) works"
