# shellcheck shell=bash
# A training run as a SLURM job that outlives its time limit. Sourced by the .sbatch files, not run.
#
#   SLURM   --SIGUSR1-->  the job script, some minutes before the time limit (--signal=B:USR1@180)
#   script  --SIGUSR1-->  srun, which hands it to all processes of the step, on every node
#   a rank                notes it; all ranks save after the same step and exit with code 85
#   torchrun              ignores it (node.sh), and sees its ranks end
#   script                finds the mark of code 85 in the run's folder, has the job requeued, and ends
#
# The requeued job runs the same script with --checkpoint.resume true. A run that fails is not requeued.

# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# requeue_train ARGUMENTS...: tools/train.py with these arguments on all nodes of the job.
requeue_train() {
    local folder mark step code=0 signalled=no
    trap 'signalled=yes' USR1
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then set -- "$@" --checkpoint.resume true; fi
    environment_activate
    folder=$(requeue_folder "$@") || exit
    mark=$folder/requeue
    rm -f "$mark"
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $folder"

    # srun does not take --cpus-per-task from the job. When one node has ended the others have a minute to do so.
    srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} \
        --wait 60 bash "$ENVIRONMENT_ROOT/examples/slurm/node.sh" "$mark" "$@" &
    step=$!
    wait $step || code=$? # ends with the step, or when the signal comes
    while [ $signalled = yes ] && kill -USR1 $step 2>/dev/null; do
        sleep 5 # and again: a rank that still starts up does not listen yet
    done
    if [ $signalled = yes ]; then wait $step && code=0 || code=$?; fi

    if [ -f "$mark" ]; then
        rm -f "$mark"
        echo "job $SLURM_JOB_ID: saved before its end, requeued"
        scontrol requeue "$SLURM_JOB_ID" ||
            environment_fail "the job cannot be requeued: submit it again with --checkpoint.resume true"
        exit 0
    fi
    exit $code
}

# The run's folder, from the command line or the configuration file; one line on stderr when they are wrong.
requeue_folder() {
    python3 - "$@" <<'PYTHON'
import sys

from megabts.config.load import load_config
from megabts.errors import UsageError, run_tool


def main() -> None:
    folder = load_config(sys.argv[1:]).checkpoint.dir
    if not folder:
        raise UsageError("no checkpoint.dir: a job must save to be continued; give --checkpoint.dir DIR")
    print(folder)


run_tool(main)
PYTHON
}
