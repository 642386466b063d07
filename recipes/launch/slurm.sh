#!/usr/bin/env bash
# A stage of training on several machines of a Slurm cluster, continued after a lost one:
#
#   sbatch recipes/launch/slurm.sh distill /shared/s --data /shared/train.jsonl -o /shared/d
#
# MODEL, data, OUT, the environment with mambactl and this folder lie where all machines see them.
#SBATCH --job-name=mambactl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# a job whose machine is lost starts again by itself, and goes on from the last state
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this file, so its folder has to be named
launch=${MAMBACTL_LAUNCH:-$SLURM_SUBMIT_DIR/recipes/launch}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
count=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
export launch address count
# one task on each machine starts a process for every GPU there; --resume begins where nothing is
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "$launch/nodes.yaml" --num_machines "$SLURM_NNODES" --num_processes "$count" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$address" --main_process_port 29500 \
    -m mambactl "$@" --resume' mambactl "$@"
