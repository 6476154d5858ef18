#!/usr/bin/env bash
# Branch, train and stitch small models on real text, on a CPU, from nothing. Makes .venv and installs on first use.
# Usage: bash examples/quickstart.sh [--out DIR] [--data DIR] [--minutes N] [--seed N] [--no-venv]
set -euo pipefail
# shellcheck source=examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment_parse "$@"
set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}
# A mistyped flag, or --help, is answered before anything is installed; this needs Python alone.
environment_check_version python3
PYTHONPATH="$ENVIRONMENT_ROOT" python3 "$ENVIRONMENT_ROOT/tools/quickstart.py" --parse-only "$@" || exit
case " $* " in *" -h "* | *" --help "*) exit ;; esac
environment_prepare ""
exec python3 "$ENVIRONMENT_ROOT/tools/quickstart.py" "$@"
