# shellcheck shell=bash
# What scripts/demo, scripts/test and scripts/check share. Sourced, never run. Works with bash 3.2.
#
#   SPLITFLEET_PYTHON        the Python to make the environment with (default: the first >= 3.11 found)
#   SPLITFLEET_VENV          where the environment lives (default: .venv at the repository root)
#   SPLITFLEET_TORCH_INDEX   where the CPU build of torch comes from on Linux without an NVIDIA GPU
#                            (default: PyTorch's CPU index; empty: the index pip is set up with)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SPLITFLEET_VENV:-$ROOT/.venv}
TORCH_INDEX=${SPLITFLEET_TORCH_INDEX-https://download.pytorch.org/whl/cpu}
LOG=$VENV/install.log

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# as_root COMMAND...: run it with root's rights, or fail without ever asking for a password.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_apt_get() {
    command -v apt-get >/dev/null 2>&1 && as_root true 2>/dev/null
}

# apt_get_install PACKAGE...: without questions; the package lists are refreshed only if they have to be.
apt_get_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" \
        >/dev/null 2>&1 && return
    as_root apt-get -qq update >/dev/null &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" \
            >/dev/null
}

find_python() {
    local candidate
    for candidate in ${SPLITFLEET_PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    if [ -d "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "$VENV exists and is no virtual environment: set SPLITFLEET_VENV to another folder"
    fi
    python=$(find_python) ||
        die "Python 3.11 or newer is needed: install it, or set SPLITFLEET_PYTHON to where it is"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Debian keeps this part of Python in a package of its own.
        { can_apt_get && apt_get_install python3-venv && "$python" -c 'import ensurepip' 2>/dev/null; } ||
            die "$python cannot make virtual environments: install python3-venv"
    fi
    say "Making a virtual environment in $VENV"
    "$python" -m venv --clear "$VENV" || die "could not make a virtual environment in $VENV"
}

has_nvidia_gpu() {
    [ -e /dev/nvidiactl ] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
}

# cpu_build REQUIREMENT PIP-OPTIONS...: the URL of the wheel that pip would install from the sources
# in its options; "installed" where the environment satisfies the requirement already. Fails if pip
# finds none, or only a build that brings CUDA along. Installs nothing.
cpu_build() {
    local requirement=$1
    shift
    "$VENV/bin/python" -m pip install --dry-run --quiet --no-deps --only-binary :all: --report - \
        "$@" "$requirement" 2>>"$LOG" |
        "$VENV/bin/python" -c '
import json, re, sys

try:
    report = json.load(sys.stdin)
except ValueError:
    sys.exit(1)
if not report["install"]:
    print("installed")
    sys.exit()
[wheel] = report["install"]
if any(re.match("nvidia|cuda|triton", name) for name in wheel["metadata"].get("requires_dist", [])):
    sys.exit(1)
print(wheel["download_info"]["url"])
'
}

# requirements EXTRAS: what pyproject.toml wants with these extras (a,b,...), one requirement per line.
requirements() {
    "$VENV/bin/python" -c '
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(line for extra in sys.argv[2].split(",") for line in extras[extra])]
print("\n".join(dict.fromkeys(wanted)))
' "$ROOT/pyproject.toml" "$1"
}

# The requirement of package $1 as pyproject.toml pins it for agents.
pinned() {
    requirements agent | grep "^$1=="
}

# torch_wheels: on Linux without an NVIDIA GPU, the wheels to hand to pip so that it has no reason to
# choose CUDA builds: a CPU build that pip finds locally (a find-links folder of its configuration or
# PIP_FIND_LINKS), or else the one of TORCH_INDEX with its torchvision. One per line, possibly none.
# (A torchvision made for CUDA needs no CUDA packages: with a local torch any will do.)
torch_wheels() {
    local torch vision='' index=()
    if [ "$(uname -s)" != Linux ] || has_nvidia_gpu; then return; fi
    if ! torch=$(cpu_build "$(pinned torch)" --no-index); then
        if [ -n "$TORCH_INDEX" ]; then index=(--index-url "$TORCH_INDEX"); fi
        if ! torch=$(cpu_build "$(pinned torch)" ${index[@]+"${index[@]}"}) ||
            ! vision=$(cpu_build "$(pinned torchvision)" ${index[@]+"${index[@]}"}); then
            die "no CPU build of torch to be had from ${TORCH_INDEX:-the index of pip}: check the network," \
                "set SPLITFLEET_TORCH_INDEX to a mirror, or PIP_FIND_LINKS to a folder with the wheel"
        fi
    fi
    printf '%s\n' "$torch" "$vision" | grep -vx -e installed -e '' || true
}

# install_project EXTRAS: the environment with the project in it, editable, with these extras. Does
# nothing when the same was done before: a stamp in the environment says so.
install_project() {
    local extras=$1 found wheel wheels=() key stamp
    stamp=$VENV/.splitfleet-$extras
    key="$ROOT $TORCH_INDEX $(cksum <"$ROOT/pyproject.toml")"
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
    make_venv
    : >"$LOG"
    say "Installing splitfleet[$extras] (the first time takes some minutes)"
    found=$(torch_wheels) || exit 1
    for wheel in $found; do wheels+=("$wheel"); done
    "$VENV/bin/python" -m pip install --quiet ${wheels[@]+"${wheels[@]}"} --editable "${ROOT}[$extras]" \
        >>"$LOG" 2>&1 ||
        die "installing failed (is the network there?): $(grep -i '^error' "$LOG" | tail -n 1) (all of it: $LOG)"
    printf '%s\n' "$key" >"$stamp"
}
