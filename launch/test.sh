#!/usr/bin/env bash
# Runs the tests, from a fresh clone with nothing but Python >= 3.11:
#   bash launch/test.sh [PYTEST ARGS...]
#   bash launch/test.sh tests/test_fbank.py -k parity
# Tests marked slow are left out; `-m slow` runs them alone, `-m ""` runs everything. A process a CPU
# core, a file to each; `-n0` is one process, for a debugger.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv test
if ! ensure_venv torch; then
  echo "PyTorch cannot be installed here: the tests marked torch are skipped." >&2
fi
cd "$ROOT"
exec "$PYTHON" -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
