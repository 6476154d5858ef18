# shellcheck shell=bash
# The Python environment of megabts: the one place that makes .venv. Sourced (bash), not run:
#
#   source "$ROOT/examples/environment.sh"
#   environment_parse "$@"                         # takes --no-venv out; the rest is in ENVIRONMENT_ARGS
#   set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}
#   environment_prepare dev                        # extras of setup.py, comma-separated, may be ""
#   python3 ...                                    # is now the right one, and finds megabts from anywhere
#
# With --no-venv nothing is made or installed: the current python3 is used (a container, a machine without network).
# .venv/.megabts-stamp says what was installed; it is written last, so an interrupted installation is never taken for a
# whole one. .venv/.megabts-installing marks an installation that was killed in the middle: .venv is then made anew.

ENVIRONMENT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ENVIRONMENT_VENV="$ENVIRONMENT_ROOT/.venv"
ENVIRONMENT_USE_VENV=yes
ENVIRONMENT_ARGS=()

environment_fail() {
    echo "error: $*" >&2
    exit 1
}

# Take --no-venv out of the arguments.
environment_parse() {
    ENVIRONMENT_ARGS=()
    local argument
    for argument in "$@"; do
        if [ "$argument" = --no-venv ]; then
            ENVIRONMENT_USE_VENV=no
        else
            ENVIRONMENT_ARGS+=("$argument")
        fi
    done
}

# Put the environment first: .venv where it is there (and not refused), and the repository on the import path.
environment_activate() {
    if [ "$ENVIRONMENT_USE_VENV" = yes ] && [ -x "$ENVIRONMENT_VENV/bin/python3" ]; then
        export PATH="$ENVIRONMENT_VENV/bin:$PATH" VIRTUAL_ENV="$ENVIRONMENT_VENV"
    fi
    export PYTHONPATH="$ENVIRONMENT_ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

# environment_prepare EXTRAS: make or renew .venv when needed, then activate it.
environment_prepare() {
    if [ "$ENVIRONMENT_USE_VENV" = yes ]; then
        # The lock is on the repository's folder itself: it leaves no file and goes with the process.
        (
            trap 'exit 130' INT TERM
            if command -v flock >/dev/null && ! flock -n 9; then
                echo "environment: waiting for another installation into .venv to end"
                flock 9
            fi
            environment_update "${1:-}"
        ) 9<"$ENVIRONMENT_ROOT" || exit 1
        environment_activate
    else
        environment_activate
        environment_check_version python3
        echo "environment: the current $(command -v python3) ($(python3 -V)), nothing is installed"
    fi
}

environment_check_version() {
    command -v "$1" >/dev/null || environment_fail "python3 not found: install Python 3.10 or newer"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        environment_fail "$(command -v "$1") is $("$1" -V 2>&1), megabts needs 3.10 or newer: put a newer python3 first on PATH"
}

# What .venv must have been made from: place, Python, requirements. Fails when .venv's Python does not run.
environment_key() {
    "$ENVIRONMENT_VENV/bin/python3" - "$ENVIRONMENT_ROOT" 2>/dev/null <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [str(root).encode(), sys.version.encode(), *((root / name).read_bytes() for name in ("setup.py", "constraints.txt"))]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

# Bring .venv up to date; runs under the lock. The extras of earlier calls are kept.
environment_update() {
    local extras=$1 stamp="$ENVIRONMENT_VENV/.megabts-stamp" key="" old_key="" old_extras="" all
    if [ -f "$stamp" ]; then { read -r old_key && read -r old_extras; } <"$stamp" || true; fi
    all=$(echo "$old_extras,$extras" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -)
    key=$(environment_key) || key=""
    if [ -n "$key" ] && [ "$key" = "$old_key" ] && [ "$all" = "$old_extras" ]; then
        echo "environment: .venv is up to date ($("$ENVIRONMENT_VENV/bin/python3" -V), extras: ${all:-none})"
        return
    fi
    if [ -z "$key" ] || [ -e "$ENVIRONMENT_VENV/.megabts-installing" ] || ! environment_has_pip; then
        environment_create
    fi
    environment_install "$all"
    key=$(environment_key) || environment_fail "$ENVIRONMENT_VENV/bin/python3 does not run: remove .venv and run this again"
    rm -f "$ENVIRONMENT_VENV/.megabts-installing"
    if ! { printf '%s\n%s\n' "$key" "$all" >"$stamp.new" && mv "$stamp.new" "$stamp"; }; then
        environment_fail "cannot write $stamp"
    fi
}

environment_has_pip() {
    "$ENVIRONMENT_VENV/bin/python3" -m pip --version >/dev/null 2>&1
}

# An empty .venv from the python3 on PATH that is not .venv's own.
environment_create() {
    PATH=$(echo "$PATH" | tr ':' '\n' | grep -vxF "$ENVIRONMENT_VENV/bin" | paste -sd: -)
    environment_check_version python3
    python3 -c 'import ensurepip, venv' 2>/dev/null ||
        environment_fail "$(command -v python3) has no venv module: install it (Debian: apt-get install python3-venv) or use --no-venv"
    echo "environment: making .venv with $(python3 -V)"
    python3 -m venv --clear "$ENVIRONMENT_VENV" || environment_fail "python3 -m venv failed for $ENVIRONMENT_VENV"
}

# Install megabts and what it needs; pip's own words are kept in .venv/install.log.
environment_install() {
    local package=".${1:+[$1]}" log="$ENVIRONMENT_VENV/install.log" code=0
    echo "environment: installing megabts into .venv (extras: ${1:-none}; some minutes the first time, log: .venv/install.log)"
    rm -f "$ENVIRONMENT_VENV/.megabts-stamp"
    touch "$ENVIRONMENT_VENV/.megabts-installing" || environment_fail "cannot write to $ENVIRONMENT_VENV"
    (cd "$ENVIRONMENT_ROOT" && "$ENVIRONMENT_VENV/bin/python3" -m pip install --disable-pip-version-check --no-compile \
        -c constraints.txt -e "$package") >"$log" 2>&1 || code=$?
    if [ $code != 0 ]; then
        # A pip that ended by itself left .venv as it was; after a killed one (128 and more) the mark stays.
        if [ $code -lt 128 ]; then rm -f "$ENVIRONMENT_VENV/.megabts-installing"; fi
        tail -n 15 "$log" >&2
        environment_fail "pip failed (above: the end of $log). Run this again, or with --no-venv if this python3 has what is needed"
    fi
    # pip compiles with one core; a few files of packages are no Python of this version, which is no harm.
    "$ENVIRONMENT_VENV/bin/python3" -m compileall -q -j 0 "$ENVIRONMENT_VENV/lib" >>"$log" 2>&1 || true
}

# Run an experiment, a tool of the given name, with all arguments of its script.
environment_experiment() {
    local tool="$ENVIRONMENT_ROOT/tools/$1"
    environment_parse "${@:2}"
    set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}
    # A mistyped flag, or --help, is answered before anything is installed; this needs Python alone.
    environment_check_version python3
    PYTHONPATH="$ENVIRONMENT_ROOT" python3 "$tool" --parse-only "$@" || exit
    case " $* " in *" -h "* | *" --help "*) exit ;; esac
    environment_prepare ""
    exec python3 "$tool" "$@"
}
