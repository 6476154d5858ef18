# shellcheck shell=bash
# How the launch scripts start tools/train.py. Sourced by them, not run. One script, four ways:
#
#   bash examples/SCRIPT.sh ...                 starts torchrun here: NPROC_PER_NODE (default: the GPUs, or 1), NNODES,
#                                               NODE_RANK, MASTER_ADDR, MASTER_PORT
#   torchrun --no-python ... examples/SCRIPT.sh ...   already a rank (LOCAL_RANK is set): goes straight to Python
#   torchrun ... examples/SCRIPT.sh ...         the same, by way of Python (see the head of each script)
#   srun examples/SCRIPT.sh ...                 one task per rank, or one task per node (then torchrun on each node)
#
# Arguments: --config FILE replaces the script's own; everything else overrides it (--section.key value).
# Python is .venv's where it is there, else the current python3. Nothing is installed. The working folder stays.

# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# launch_train DEFAULT_CONFIG [ARGUMENTS...]: DEFAULT_CONFIG is relative to the repository.
launch_train() {
    local config=$ENVIRONMENT_ROOT/$1 train=$ENVIRONMENT_ROOT/tools/train.py argument has_config=no help=no
    shift
    for argument in "$@"; do
        case $argument in
            --config | --config=*) has_config=yes ;;
            -h | --help) help=yes ;;
        esac
    done
    if [ $has_config = no ]; then set -- --config "$config" "$@"; fi
    environment_activate
    python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
        environment_fail "$(command -v python3) has no torch: run bash examples/quickstart.sh or bash tests/run.sh" \
            "(they make .venv), or pip install -c constraints.txt -e ."

    if [ -n "${LOCAL_RANK:-}" ] || [ $help = yes ]; then
        exec python3 -u "$train" "$@"
    elif [ -n "${SLURM_PROCID:-}" ] && [ -n "${SLURM_NTASKS:-}" ] && [ -n "${SLURM_LOCALID:-}" ]; then
        launch_srun "$train" "$@"
    else
        launch_torchrun "$train" "$@"
    fi
}

# This process is one task of srun: a rank, or the one task of its node.
launch_srun() {
    local tasks=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS} nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
    export MASTER_ADDR=${MASTER_ADDR:-$(launch_first_host "$nodes")}
    [ -n "$MASTER_ADDR" ] || environment_fail "no first host in this job: is scontrol on PATH? Or set MASTER_ADDR"
    # Below the ports the system hands out by itself (from 32768), different for jobs that share a node.
    export MASTER_PORT=${MASTER_PORT:-$((10000 + ${SLURM_JOB_ID:-0} % 20000))}
    if [ "$tasks" = "$nodes" ]; then
        NNODES=$nodes NODE_RANK=${SLURM_NODEID:-$SLURM_PROCID} launch_torchrun "$@"
    fi
    export RANK=$SLURM_PROCID WORLD_SIZE=$tasks LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((tasks / nodes))}
    launch_threads "$LOCAL_WORLD_SIZE"
    exec python3 -u "$@"
}

# The first host of the step; one node needs no name. Prints nothing when scontrol cannot say.
launch_first_host() {
    local hosts=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}}
    if [ -n "$hosts" ] && command -v scontrol >/dev/null; then
        hosts=$(scontrol show hostnames "$hosts") && echo "${hosts%%$'\n'*}"
    elif [ "$1" = 1 ]; then
        echo 127.0.0.1
    fi
}

launch_torchrun() {
    local ranks=${NPROC_PER_NODE:-} nodes=${NNODES:-1} rendezvous=(--standalone)
    if [ -z "$ranks" ]; then
        ranks=1
        # Asked only where there may be GPUs: importing torch takes seconds.
        if command -v nvidia-smi >/dev/null; then
            ranks=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
        fi
    fi
    if ! [[ $ranks =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]]; then
        environment_fail "NPROC_PER_NODE is $ranks; give a number of ranks from 1, or gpu, cpu or auto"
    fi
    if ! [[ $nodes =~ ^[1-9][0-9]*$ ]]; then environment_fail "NNODES is $nodes; give a number of nodes from 1"; fi
    if [ "$nodes" != 1 ]; then
        if [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; then
            environment_fail "NNODES=$nodes needs MASTER_ADDR (the first node) and NODE_RANK (0 to $((nodes - 1))) on every node"
        fi
        rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    launch_threads "$ranks"
    # The signals that torchrun hands on to its ranks (of another it dies and leaves them behind), and the seconds that
    # they get for their last step and save before it kills them.
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
    export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE # torch before the option
    export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
    exec python3 -m megabts.runtime.torchrun --nnodes "$nodes" --nproc-per-node "$ranks" "${rendezvous[@]}" "$@"
}

# launch_threads RANKS: the cores of this node, shared out among its ranks, unless the user has said.
launch_threads() {
    local cores=${SLURM_CPUS_ON_NODE:-}
    if ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then return; fi
    if [ -z "$cores" ]; then cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}
