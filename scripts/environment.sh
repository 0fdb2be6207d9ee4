# Sourced by the other scripts. `prepare_environment EXTRA` creates a virtual environment in .venv and installs loftq with
# that extra in it, unless an earlier call has done so already. $PYTHON is its interpreter.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

prepare_environment() {
  local extra="$1" constraints="$ROOT/scripts/constraints.txt" stamp="$ROOT/.venv/.loftq-$1"
  if [ -f "$stamp" ] && [ "$stamp" -nt "$ROOT/pyproject.toml" ] && [ "$stamp" -nt "$constraints" ]; then
    echo "==> using $ROOT/.venv"
    return
  fi
  local base
  base="$(find_python)"
  if ! [ -x "$PYTHON" ] || ! "$PYTHON" -c 'import pip' 2>/dev/null; then
    echo "==> creating $ROOT/.venv with $("$base" --version)"
    "$base" -m venv --clear "$ROOT/.venv"
  fi
  echo "==> installing loftq with its '$extra' extra"
  # Modules are compiled when they are first imported: most of what is installed never is.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --constraint "$constraints" \
    --editable "$ROOT[$extra]"
  touch "$stamp"
}

find_python() {
  local name
  for name in "${LOFTQ_PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    if [ -n "$name" ] && "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "loftq needs Python 3.10 or newer with the venv module; none was found (set LOFTQ_PYTHON to one)" >&2
  return 1
}
