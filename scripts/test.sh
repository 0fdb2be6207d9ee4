#!/usr/bin/env bash
# The whole test suite, in .venv (made if need be). Arguments go to pytest: bash scripts/test.sh -k formats
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$ROOT"
# What the tests load is on this machine; a stray look-up of a hub must fail, not wait.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A process for each core: matrices in tests are too small for threads.
export OMP_NUM_THREADS=1
echo "==> ruff and mypy"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
echo "==> pytest"
"$PYTHON" -m pytest --numprocesses auto --dist loadfile "$@"
