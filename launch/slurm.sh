#!/usr/bin/env bash
# A training run under SLURM, one process for each GPU. Arguments are those of llave_jax.train:
#
#   sbatch launch/slurm.sh --config configs/gpu_h100.py:7b --workdir runs/llave-7b \
#     --config.mesh.data=2 --config.model.path=models/llava-onevision-7b \
#     --config.data.path=data/MMEB-train
#
# Nodes, time and partition can be given to sbatch before the file's name. Run it from the repository,
# with the environment active in which llave_jax is installed.
#
#SBATCH --job-name=llave
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Ten minutes before the time is up all processes are told to stop. They save a checkpoint and end
# with exit status 143.
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

# jax takes the GPU whose number is the task's on its node, so every task must see all GPUs of the
# node: --gpus-per-node, not --gpus-per-task. It takes 75% of a GPU's memory unless told otherwise.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}

# Two loading processes for each training process: gpu_h100.py's number is for one process on 8 GPUs.
[[ $* == *--config.data.num_workers* ]] || set -- "$@" --config.data.num_workers=2

# Since version 22.05 srun does not take --cpus-per-task from the job by itself.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  python -m llave_jax.train --distributed "$@"
status=$?

if ((status == 143)); then
  echo "told to stop before the last step; job $SLURM_JOB_ID goes back to the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
