#!/usr/bin/env bash
# Runs a config on this machine, from a fresh clone with nothing but Python >= 3.11:
#   bash launch/local.sh [CONFIG [FLAGS...]]
#   bash launch/local.sh configs/smoke.py --workdir=/tmp/smoke --config.pretrain.steps=40
# CONFIG is configs/smoke.py if not given; --workdir is runs/<config name> in the clone. Interrupted,
# the same command goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

config=configs/smoke.py
if [[ $# -gt 0 && "$1" != -* ]]; then
  config="$1"
  shift
fi
if [[ ! -e "$config" && -e "$ROOT/$config" ]]; then
  config="$ROOT/$config" # started from another folder
fi
flags=("--config=$config")
if [[ " $*" != *" --workdir"* && " $*" != *" -workdir"* ]]; then
  flags+=("--workdir=$ROOT/runs/$(basename "$config" .py)")
fi
ensure_venv
exec "$PYTHON" -m beats_jax.main "${flags[@]}" "$@"
