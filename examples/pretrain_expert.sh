#!/usr/bin/env bash
# Stage 1: go on training a copy of the seed on one domain (default: code; --config for another).
# Usage: bash examples/pretrain_expert.sh [--config FILE] [--section.key value ...]; also under torchrun and srun (launch.sh).
# The head is valid shell and valid Python: `torchrun examples/pretrain_expert.sh` hands this file to Python, whose only
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
launch_train examples/configs/paper/code.yaml "$@"
':'''
