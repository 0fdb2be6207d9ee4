#!/usr/bin/env bash
# Run every check and the whole test suite in .venv, which is created if it does not exist.
#
#   bash scripts/test.sh                 everything
#   bash scripts/test.sh -k formats      arguments go to pytest
#   bash scripts/test.sh --coverage      also measure line coverage and print the total (slower: see CONTRIBUTING.md)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$ROOT"
BIN="$(dirname "$PYTHON")"
# Everything the tests load is on this machine: an accidental request to the Hub must fail at once, not wait.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One process per core: matrices in tests are too small for threads.
export OMP_NUM_THREADS=1

coverage=()
if [ "${1:-}" = "--coverage" ]; then
  shift
  coverage=(--cov --cov-report=term --cov-report=xml)
  export COVERAGE_CORE="${COVERAGE_CORE:-$("$PYTHON" -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')}"
fi

# mypy takes as long as the other checks together, so they run beside it.
types="$(mktemp)"
"$PYTHON" -m mypy >"$types" 2>&1 &
mypy=$!
trap '[ -z "$mypy" ] || kill "$mypy"; rm -f "$types"' EXIT
echo "==> ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
echo "==> import layers"
"$BIN/lint-imports"
echo "==> docs"
"$PYTHON" -m mkdocs build --strict --quiet
echo "==> mypy"
status=0
wait "$mypy" || status=$?
mypy=""
cat "$types"
if [ "$status" != 0 ]; then exit "$status"; fi
echo "==> pytest"
"$PYTHON" -m pytest --numprocesses auto --dist loadfile ${coverage[@]+"${coverage[@]}"} "$@"
