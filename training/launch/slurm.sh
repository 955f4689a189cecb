#!/bin/bash
# One torchrun on each node of a Slurm job:
#
#     sbatch training/launch/slurm.sh RECIPE.yaml [training.seed=1 ...]
#
# Fit the lines below to the cluster; the recipe's global batch stays what it is, so it has to
# divide among nodes x GPUs. After a failed node or a preemption Slurm queues the job again, and it
# goes on from the last checkpoint of the recipe's output_dir, which all nodes have to see; the
# recipe needs `save_strategy: steps`. After the time limit, submit it again yourself.
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

# Where the nodes meet: the first of them. A job that was queued again meets under another name.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
meeting="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first:29500" \
    --rdzv_id "$meeting" \
    -m training.train "$recipe" training.resume_from_checkpoint=true "$@"
