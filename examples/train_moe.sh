#!/usr/bin/env bash
# Stage 2, another way: a mixture of experts of the seed and its experts (Branch-Train-MiX), trained whole.
# Usage: bash examples/train_moe.sh [--start DIR [--member NAME=DIR ...] [--upcycle METHOD]] [--config FILE]
#            [--section.key value ...]; also under torchrun and srun (launch.sh).
# With --member the mixture is first made of dense models, the seed first, in the --start folder, unless it is there
# already; METHOD is that of tools/upcycle.py (default: btx). Without --start training begins from the configuration's
# checkpoint.init_from. Several ranks that are running already make nothing: make it before, with tools/upcycle.py.
# The head is valid shell and valid Python: `torchrun examples/train_moe.sh` hands this file to Python, whose only
# act is to start bash on it. Shell takes those lines for an unread document, Python takes the shell for strings.
''':'; : <<'PYTHON'
'''
import os, sys
os.execvp("bash", ["bash", *sys.argv])
'''
PYTHON
set -euo pipefail
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

members=() start="" method=btx rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --member | --start | --upcycle)
            [ $# -gt 1 ] || environment_fail "$1 needs a value"
            set -- "$1=$2" "${@:3}"
            ;;
        --member=*) members+=(--member "${1#*=}"); shift ;;
        --start=*) start=${1#*=}; shift ;;
        --upcycle=*) method=${1#*=}; shift ;;
        *) rest+=("$1"); shift ;;
    esac
done
if [ ${#members[@]} -gt 0 ] && [ -z "$start" ]; then
    environment_fail "--member needs --start DIR, where the mixture is made"
fi
if [ ${#members[@]} -gt 0 ] && [ ! -e "$start" ]; then
    if [ -n "${LOCAL_RANK:-}${SLURM_PROCID:-}" ]; then
        environment_fail "there is no $start yet, and this is one of several ranks; make it with tools/upcycle.py first"
    fi
    (
        environment_activate
        python3 "$ENVIRONMENT_ROOT/tools/upcycle.py" --method "$method" "${members[@]}" --out "$start"
    )
fi
if [ -n "$start" ]; then rest+=(--checkpoint.init_from "$start"); fi
launch_train examples/configs/paper/btx.yaml ${rest[@]+"${rest[@]}"}
':'''
