#!/usr/bin/env bash
#SBATCH --job-name=beats
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Training under Slurm, requeued when it is preempted or its time is up. From a clone that all nodes
# see, in which `bash launch/local.sh` has made .venv (with `pip install 'jax[cuda12]'` in it):
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh \
#       --config=configs/iter1.py --workdir=/shared/W --config.data.dir=/shared/audioset
# One task for each GPU (--ntasks-per-node = --gpus-per-node), or one for each node
# (--ntasks-per-node=1), which then has all the node's GPUs. Leave --gpus-per-task and --gpu-bind
# out: JAX picks a task's GPU among all of the node's. PYTHON=… is another interpreter.
#
# 300 s before the time limit, and on preemption where the cluster sends it, SIGUSR1 comes to this
# script: all tasks save the same step and leave with 143, and the job goes back into the queue. So
# it does after 75 (a hang, or a process was lost), 134 and 137 (aborted, killed), MAX_REQUEUES (50)
# times at most. Any other code ends the job: 0 is done, 2 wrong usage or input. SIGTERM comes from
# Slurm to the tasks as well, who save: a preempted job is then requeued by Slurm (--requeue), a
# cancelled one is not.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # Slurm runs a copy of this script from elsewhere
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "slurm.sh: not in a job; submit it: sbatch launch/slurm.sh --config=… --workdir=…" >&2
  exit 2
fi
# Under Slurm JAX gives a task the GPU of its number on the node: a task alone takes all of them.
if [[ "${SLURM_NTASKS_PER_NODE:-}" == 1 && "${SLURM_GPUS_ON_NODE:-0}" -gt 1 ]]; then
  JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
  export JAX_LOCAL_DEVICE_IDS
fi

asked="" cancelled=""
# To the tasks of all steps, not to this script; a signal to srun itself would kill them.
trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'cancelled=1' TERM

srun --kill-on-bad-exit=0 --wait=120 \
  "$PYTHON" -m beats_jax.main --coordinator=auto "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal to this script ended the wait, not srun
  wait "$step"
  code=$?
done

if [[ -n "$cancelled" ]]; then
  exit "$code"
fi
case $code in
  143) ;;
  75 | 134 | 137)
    if [[ -z "$asked" && "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-50}" ]]; then
      echo "slurm.sh: exit code $code after $SLURM_RESTART_COUNT requeues; no more" >&2
      exit "$code"
    fi
    ;;
  *) exit "$code" ;;
esac
echo "slurm.sh: exit code $code; job $SLURM_JOB_ID goes back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
