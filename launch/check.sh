#!/usr/bin/env bash
# Formatting, lint and types: bash launch/check.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv test
cd "$ROOT"
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pyright
