#!/usr/bin/env bash
# Train and measure every method of combining a seed and its experts on the same data. Makes .venv on first use.
# Usage: bash examples/compare.sh [--data DIR] [--minutes N] [--seeds 0,1,2] [--preset P] [--ablations] [--out DIR] [--no-venv]
set -euo pipefail
# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment_parse "$@"
set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}
# A mistyped flag, or --help, is answered before anything is installed; this needs Python alone.
environment_check_version python3
PYTHONPATH="$ENVIRONMENT_ROOT" python3 "$ENVIRONMENT_ROOT/tools/compare.py" --parse-only "$@" || exit
case " $* " in *" -h "* | *" --help "*) exit ;; esac
environment_prepare ""
exec python3 "$ENVIRONMENT_ROOT/tools/compare.py" "$@"
