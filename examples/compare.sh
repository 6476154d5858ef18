#!/usr/bin/env bash
# Train and measure every method of combining a seed and its experts on the same data. Makes .venv on first use.
# Usage: bash examples/compare.sh [--data DIR] [--minutes N] [--seeds 0,1,2] [--preset P] [--ablations] [--out DIR] [--no-venv]
set -euo pipefail
# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment_experiment compare.py "$@"
