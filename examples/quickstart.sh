#!/usr/bin/env bash
# Branch, train and stitch small models on real text, on a CPU, from nothing. Makes .venv and installs on first use.
# Usage: bash examples/quickstart.sh [--out DIR] [--data DIR] [--minutes N] [--seed N] [--no-venv]
set -euo pipefail
# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment_experiment quickstart.py "$@"
