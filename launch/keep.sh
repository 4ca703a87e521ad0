#!/usr/bin/env bash
# Runs a command again for as long as its exit code asks for that; a run resumes by itself:
#   bash launch/keep.sh python -m beats_jax.main --coordinator=auto --config=… --workdir=…
# Again after 75 (a hang, or another process was lost), 134 and 137 (aborted by JAX, or killed) and
# 143 (told to leave, saved). Any other code ends it: 0 is done, 2 wrong usage or input. SIGTERM or
# SIGINT to this script is passed on to the command as SIGTERM, after which it is not run again.
# KEEP_RESTARTS (100) and KEEP_PAUSE (10, seconds) say how often and after how long.
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: bash launch/keep.sh COMMAND [ARGS...]" >&2
  exit 2
fi
child="" left=""

leave() {
  left=1
  if [[ -n "$child" ]]; then
    kill -TERM "$child" 2>/dev/null
  fi
}
trap leave TERM INT

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  if [[ -n "$left" ]]; then # asked between two runs
    kill -TERM "$child" 2>/dev/null
  fi
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal to this script ended the wait, not the command
    wait "$child"
    code=$?
  done
  child=""
  case $code in
    75 | 134 | 137 | 143) ;;
    *) exit "$code" ;;
  esac
  if [[ -n "$left" ]]; then
    exit "$code"
  fi
  if ((restart >= ${KEEP_RESTARTS:-100})); then
    echo "keep.sh: exit code $code after $restart restarts; no more" >&2
    exit "$code"
  fi
  echo "keep.sh: exit code $code, started again in ${KEEP_PAUSE:-10} s ($((restart + 1)))" >&2
  sleep "${KEEP_PAUSE:-10}" &
  wait $!
  if [[ -n "$left" ]]; then
    exit "$code"
  fi
done
