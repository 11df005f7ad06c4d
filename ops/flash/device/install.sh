#!/bin/sh
# install.sh [--root DIR]: make this machine a device of the fleet. To be run as root in the folder
# that `splitfleet flash` wrote; running it again does no harm. With --root all goes below DIR, where
# nothing is started: to try it.
set -eu

die() {
    echo "splitfleet: $1" >&2
    exit 1
}

root=
if [ "${1-}" = --root ] && [ $# -eq 2 ]; then
    mkdir -p "$2"
    root=$(cd "$2" && pwd)
elif [ $# -gt 0 ]; then
    die "usage: install.sh [--root DIR]"
elif [ "$(id -u)" -ne 0 ]; then
    die "run this as root: sudo sh $0"
fi

here=$(cd "$(dirname "$0")" && pwd)
version='' machine='' python_version=''
while IFS='=' read -r key value; do
    case $key in
    version) version=$value ;;
    machine) machine=$value ;;
    python) python_version=$value ;;
    esac
done <"$here/about"

python=${SPLITFLEET_PYTHON:-python3}
command -v "$python" >/dev/null || die "there is no $python here: install Python $python_version"
found=$("$python" -c 'import platform, struct, sys
print("%d.%d %s %d" % (*sys.version_info[:2], platform.machine(), 8 * struct.calcsize("P")))')
[ "$found" = "$python_version $machine 64" ] ||
    die "this is for Python $python_version on $machine with 64 bits, and here is $found: flash again with --python and --machine of this device"

opt=$root/opt/splitfleet etc=$root/etc/splitfleet var=$root/var/lib/splitfleet
mkdir -p "$opt/versions" "$etc" "$var/identity" "$var/updates"
if [ -z "$root" ] && ! id splitfleet >/dev/null 2>&1; then
    useradd --system --user-group --home-dir /var/lib/splitfleet --no-create-home \
        --shell /usr/sbin/nologin splitfleet
fi

# The identity comes first: once it is on the device's own disk, it is wiped here.
wipe() {
    for file in "$@"; do
        size=$(wc -c <"$file")
        [ "$size" -eq 0 ] ||
            dd if=/dev/zero of="$file" bs="$size" count=1 conv=notrunc,fsync 2>/dev/null
        rm -f "$file"
    done
    sync
}

keep_identity() {
    [ -f "$var/identity/device.pem" ] || return 1
    # Enrolled: a token is not needed any more, and what came with its own key may be renewed by now.
    [ ! -f "$here/identity/key.pem" ] || cmp -s "$here/identity/key.pem" "$var/identity/key.pem"
}

if [ -d "$here/identity" ]; then
    set -- "$here"/identity/*.pem
    if [ -f "$1" ]; then
        if ! keep_identity; then
            rm -f "$var"/identity/*
            for file in "$@"; do
                (umask 077 && cat "$file" >"$var/identity/$(basename "$file")")
            done
            sync
        fi
    fi
    # Zeros that a power cut leaves must not be taken for an identity.
    rm -rf "$here/used"
    mv "$here/identity" "$here/used"
    sync
fi
if [ -d "$here/used" ]; then
    set -- "$here"/used/*.pem
    [ ! -f "$1" ] || wipe "$@"
    rm -rf "$here/used"
fi

place=$opt/versions/$version
if ! cmp -s "$here/requirements.txt" "$place/.requirements"; then
    echo "splitfleet: installing version $version"
    rm -rf "$place"
    set -- "$here"/wheels/pip-*.whl
    if [ -f "$1" ]; then
        # Debian's Python has no ensurepip unless python3-venv is installed.
        "$python" -m venv --without-pip "$place"
        pip=$1/pip
    else
        "$python" -m venv "$place" || die "install the package python3-venv, or flash with --wheelhouse"
        pip=-mpip
    fi
    mkdir -p "$root/var/tmp"
    # Beside the wheels, whose folder the requirements name relative to this one.
    (cd "$here" && TMPDIR=$root/var/tmp "$place/bin/python" "$pip" --disable-pip-version-check \
        --no-input install --quiet --no-cache-dir --requirement requirements.txt)
    "$place/bin/splitfleet" --help >/dev/null || die "version $version does not start here"
    # What was flashed last is what runs, not an update from before.
    rm -f "$var/updates/current" "$var/updates/trial"
    cp "$here/requirements.txt" "$place/.requirements"
    sync
fi
ln -sfn "versions/$version" "$opt/.current"
mv -T "$opt/.current" "$opt/current"
cp "$here/start.sh" "$opt/start.sh"

mkdir -p "$root/etc/systemd/system"
(umask 027 && cp "$here/agent.toml" "$etc/agent.toml")
cp "$here/splitfleet-agent.service" "$root/etc/systemd/system/"
chmod 640 "$etc/agent.toml"
chmod 644 "$root/etc/systemd/system/splitfleet-agent.service"
[ -z "$root" ] || exit 0

chgrp splitfleet "$etc/agent.toml"
chown -R splitfleet:splitfleet "$var"
chmod 700 "$var" "$var/identity"
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable --quiet splitfleet-agent
    systemctl restart --no-block splitfleet-agent
    echo "splitfleet: the agent runs; see journalctl -u splitfleet-agent"
else
    echo "splitfleet: there is no systemd: have the command after ExecStart= in" \
        "/etc/systemd/system/splitfleet-agent.service started by user splitfleet at each boot"
fi
