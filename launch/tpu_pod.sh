#!/usr/bin/env bash
# A slice of Cloud TPUs, from a clone of this package, with `gcloud` set up:
#   bash launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS of beats_jax.main]
#     create   asks for the slice (a queued resource) and waits until it is there
#     install  copies this clone to every worker and installs it
#     run      starts training on every worker; it goes on when this shell is gone (keep.sh there)
#     log      follows worker 0's log
#     stop     has every worker save and leave
#     delete   gives the slice back
# OPTIONS: --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --project=PROJECT, --spot (create), and
# --dry-run, which prints every command, of a slice that is not there yet, and runs none.
#   bash launch/tpu_pod.sh create --name=beats --zone=us-central1-a --type=v5litepod-64 --spot
#   bash launch/tpu_pod.sh install --name=beats --zone=us-central1-a
#   bash launch/tpu_pod.sh run --name=beats --zone=us-central1-a -- \
#       --config=configs/iter1.py --workdir=gs://beats/W --config.data.dir=/mnt/beats/audioset
# The slice's service account has to write to the bucket; /mnt/beats stands for a disk with prepared
# data on every worker (a copy, one they share, or a bucket through gcsfuse).
# Every command twice does what it does once. A spot slice that was taken away is made anew by
# create; then install and run, and training goes on from its newest checkpoint.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "tpu_pod.sh: $1 (the comment at the top of launch/tpu_pod.sh has examples)" >&2
  exit 2
}

command="${1:-}"
case "$command" in
  create | install | run | log | stop | delete) shift ;;
  *) fail "give create, install, run, log, stop or delete, not '$command'" ;;
esac
name="" zone="" type=v5litepod-16 version=v2-alpha-tpuv5-lite project="" spot="" dry=""
while [[ $# -gt 0 ]]; do
  option="$1"
  shift
  case "$option" in
    --name=*) name="${option#*=}" ;;
    --zone=*) zone="${option#*=}" ;;
    --type=*) type="${option#*=}" ;;
    --version=*) version="${option#*=}" ;;
    --project=*) project="${option#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --) break ;;
    *) fail "no option $option; flags of beats_jax.main come after --" ;;
  esac
done
[[ -n "$name" && -n "$zone" ]] || fail "--name=NAME and --zone=ZONE are both needed"
where=("--zone=$zone")
if [[ -n "$project" ]]; then
  where+=("--project=$project")
fi

# Prints a command, as it could be typed; runs it unless this is a dry run.
exec 3>&2 # the commands are shown also where what they say is kept
call() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&3
  if [[ -z "$dry" ]]; then
    "$@" 3>&-
  fi
}

resource() { # VERB [FLAGS...]
  local verb="$1"
  shift
  call gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

workers() { # WHICH COMMAND
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; nothing where there is no such resource.
state() {
  local answer errors
  errors="$(mktemp)"
  if answer="$(resource describe --format='value(state.state)' 2>"$errors")"; then
    echo "$answer"
  elif ! grep -qi 'not.found' "$errors"; then
    cat "$errors" >&2
    rm "$errors"
    return 1
  fi
  rm "$errors"
}

create() {
  local now flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  if [[ -n "$spot" ]]; then
    flags+=(--spot)
  fi
  now="$(state)"
  if [[ "$now" == FAILED || "$now" == SUSPENDED || "$now" == SUSPENDING ]]; then
    echo "$name is $now: it is made anew" >&2
    resource delete --force --quiet
    now=""
  fi
  if [[ -z "$now" ]]; then
    resource create "${flags[@]}"
  fi
  until [[ -n "$dry" || "$now" == ACTIVE ]]; do
    now="$(state)"
    case "$now" in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "$name is $now; the same command asks again" >&2
        exit 1
        ;;
      *)
        echo "$name: ${now:-asked for}" >&2
        sleep "${TPU_POD_POLL:-30}"
        ;;
    esac
  done
}

# Asked on the workers; `beats.pid` is keep.sh's.
# shellcheck disable=SC2016
RUNNING='test -e beats.pid && kill -0 $(cat beats.pid) 2>/dev/null'

install() {
  local archive
  archive="$(mktemp -d)/beats_jax.tgz"
  call tar -czf "$archive" -C "$ROOT" --exclude=./.git --exclude=./.venv --exclude=./.cache \
    --exclude=./runs .
  call gcloud compute tpus tpu-vm scp "$archive" "$name:beats_jax.tgz" "${where[@]}" --worker=all
  rm -rf "$(dirname "$archive")"
  # uv brings a Python of its own: the images' may be older than 3.11.
  workers all "set -e
if $RUNNING; then echo 'training is running: stop it first' >&2; exit 1; fi
rm -rf beats_jax && mkdir beats_jax && tar -xzf beats_jax.tgz -C beats_jax
python3 -m pip install --quiet --user uv
test -x beats_env/bin/python || python3 -m uv venv --quiet --python 3.12 beats_env
python3 -m uv pip install --quiet --python beats_env/bin/python ./beats_jax 'jax[tpu]'"
}

run() {
  [[ $# -gt 0 ]] || fail "run needs the flags of beats_jax.main after --"
  local quoted
  quoted="$(printf ' %q' "$@")"
  workers all "if $RUNNING; then echo 'already running'; exit 0; fi
cd beats_jax
nohup bash launch/keep.sh ../beats_env/bin/python -m beats_jax.main --coordinator=auto$quoted \
>>../beats.log 2>&1 </dev/null &
echo \$! >../beats.pid"
}

case "$command" in
  create) create ;;
  install) install ;;
  run) run "$@" ;;
  log) workers 0 'tail -n 100 -F beats.log' ;;
  stop) workers all "if $RUNNING; then kill -TERM \$(cat beats.pid)
while $RUNNING; do sleep 1; done; fi" ;;
  delete)
    now="$(state)"
    if [[ -n "$dry" || -n "$now" ]]; then
      resource delete --force --quiet
    else
      echo "$name is not there" >&2
    fi
    ;;
esac
