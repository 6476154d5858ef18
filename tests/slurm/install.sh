#!/usr/bin/env bash
# Install what tests/test_slurm.py needs, Debian's slurm-wlm and munge, unless it is there. Asks nothing; as root, or
# with a sudo that needs no password. The tests start daemons of their own; nothing is configured here.
set -euo pipefail

fail() {
    echo "error: SLURM is not installed: $*" >&2
    exit 1
}

PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in munged slurmctld slurmd sbatch srun; do
    command -v $program >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
command -v apt-get >/dev/null || fail "there is no apt-get here: install ${missing[*]} by other means"
as_root=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "apt-get needs root: sudo apt-get install slurm-wlm munge"
    as_root=(sudo -n)
fi
log=$(mktemp)
options=(-o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
echo "installing slurm-wlm and munge with apt-get"
# An update that reaches only some servers fails, and may yet suffice.
timeout 300 ${as_root[@]+"${as_root[@]}"} apt-get "${options[@]}" update >"$log" 2>&1 || true
timeout 300 ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
    apt-get "${options[@]}" install -y --no-install-recommends slurm-wlm munge >>"$log" 2>&1 ||
    fail "apt-get failed ($log): $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
rm -f "$log"
