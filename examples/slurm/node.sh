#!/usr/bin/env bash
# One node of a job: torchrun with this node's ranks. Started by srun (requeue.sh): node.sh MARK ARGUMENTS...
# Under torchrun it is a rank: tools/train.py, whose exit code 85 leaves the file MARK, as torchrun's own code is always 1.
set -euo pipefail
trap '' USR1 # inherited: only a rank that is training listens to it
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
environment_activate

if [ -n "${LOCAL_RANK:-}" ]; then
    mark=$1 code=0
    shift
    trap : TERM # the rank's own business: this shell waits for it
    python3 -u "$ENVIRONMENT_ROOT/tools/train.py" "$@" || code=$?
    if [ $code = 85 ]; then touch "$mark"; fi
    exit $code
fi

ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Below the ports the system hands out by itself (from 32768), different for jobs that share a node.
port=$((10000 + SLURM_JOB_ID % 20000))
launch_threads "$ranks"
exec python3 -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "${hosts%%$'\n'*}:$port" --rdzv-id "$SLURM_JOB_ID" \
    --no-python bash "${BASH_SOURCE[0]}" "$@"
