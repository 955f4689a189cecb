#!/bin/bash
# Start one torchrun on each node of a Slurm job:
#
#     sbatch training/launch/slurm.sh RECIPE.yaml [training.seed=1 ...]
#
# Adapt the #SBATCH lines to the cluster. The recipe's global batch does not change, so it must be
# divisible by nodes x GPUs. After a failed node or a preemption Slurm queues the job again, and it
# resumes from the last checkpoint in the recipe's output_dir. All nodes must see that folder, and
# the recipe must write checkpoints, as by default. After the time limit, submit the job again.
#SBATCH --job-name=vljepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
recipe=${1:?give a recipe, such as training/recipes/paper/stage1_images.yaml}
shift

# The nodes meet at the first one. A job that was queued again needs a new rendezvous id.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
meeting="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it from sbatch
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first:29500" \
    --rdzv_id "$meeting" \
    -m training.train "$recipe" training.resume_from_checkpoint=true "$@"
