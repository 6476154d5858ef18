#!/usr/bin/env bash
# Format, lint, types, then all tests. Usage: bash tests/run.sh [--no-venv] [--with-slurm] [pytest arguments...]
# Without arguments everything under tests/ runs; skipped tests are listed with their reasons (-ra). --with-slurm installs
# Debian's SLURM (root, apt-get), on which tests/test_slurm.py starts a cluster of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/environment.sh
source examples/environment.sh

environment_parse "$@"
set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}
arguments=()
for argument in "$@"; do
    if [ "$argument" = --with-slurm ]; then bash tests/slurm/install.sh || exit; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
environment_prepare dev

# The oldest versions that setup.py allows, in a folder beside the newest: tests/convert/test_lowest.py.
lowest="$ENVIRONMENT_VENV/lowest"
if [ "$ENVIRONMENT_USE_VENV" = yes ] && ! cmp -s tests/lowest.txt "$lowest/lowest.txt"; then
    rm -rf "$lowest"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$lowest" \
        -r tests/lowest.txt || environment_fail "pip failed for tests/lowest.txt (above): run this again, or with --no-venv"
    cp tests/lowest.txt "$lowest/"
fi

# The house rules are among the tests, so `make lint` and pytest together are `make checks` and more.
if [ "$ENVIRONMENT_USE_VENV" = no ] && ! python3 -c 'import mypy, ruff' 2>/dev/null; then
    echo "left out: format, lint and types (ruff or mypy is not installed for $(command -v python3))"
else
    command -v make >/dev/null || environment_fail "make not found: install it (Debian: apt-get install make)"
    make --no-print-directory lint PYTHON=python3
fi
if [ $# -gt 0 ] || ! python3 -c 'import xdist' 2>/dev/null; then exec python3 -m pytest -ra "$@"; fi

# All of them: first side by side, a worker on each core; then, by themselves, those that measure time or take all cores.
code=0
python3 -m pytest -ra -n logical --maxprocesses 8 --dist loadfile -m "not alone" || code=$?
python3 -m pytest -ra -m alone || code=$?
exit $code
