#!/usr/bin/env bash
# The paper's three iterations in one go, each a config of its own; resumable: the same command goes
# on wherever it stopped, and what is finished is passed over.
#   bash launch/loop.sh WORKDIR [FLAGS...]
#   bash launch/loop.sh W --config.data.dir=/data/audioset_prepared --config.mesh.fsdp=4
# FLAGS go to every iteration.
set -euo pipefail

if [[ $# -eq 0 || "$1" == -* ]]; then
  echo "usage: bash launch/loop.sh WORKDIR [FLAGS...]" >&2
  exit 2
fi
workdir="$1"
shift
for iteration in iter1 iter2 iter3; do
  bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" "configs/$iteration.py" --workdir="$workdir" "$@"
done
