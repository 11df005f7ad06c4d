#!/bin/sh
# start.sh UPDATES FLASHED ARGUMENT... starts `splitfleet ARGUMENT...` of the version that is current
# in the folder UPDATES, else of the virtual environment FLASHED (edge_agent/updates/slots.py has the
# files). A version on trial that is not proven in time is ended; when it has had its starts, the one
# before is current again. Meant to be started again whenever it ends.
set -u
updates=$1 flashed=$2
shift 2

put() { # NAME TEXT: written whole or not at all
    printf '%s\n' "$2" >"$updates/.$1" && mv -f "$updates/.$1" "$updates/$1"
}

current=
[ ! -f "$updates/current" ] || read -r current <"$updates/current"

if [ -f "$updates/trial" ]; then
    read -r previous starts seconds rollout signed <"$updates/trial" || seconds=
    case "$seconds" in '' | *[!0-9]*) previous=- starts=0 rollout=unknown ;; esac
    case "$starts" in '' | *[!0-9]*) starts=0 ;; esac
    if [ "$previous" = "${current:--}" ]; then
        rm -f "$updates/trial" # the switch, or the way back, was broken off
    elif [ "$starts" -gt 0 ] && put trial "$previous $((starts - 1)) $seconds $rollout $signed"; then
        agent=$$
        (
            sleep "$seconds"
            [ ! -f "$updates/trial" ] || kill "$agent"
            sleep 30
            [ ! -f "$updates/trial" ] || kill -9 "$agent"
        ) >/dev/null 2>&1 &
    else
        put failed "$rollout version $current did not prove itself in time, or did not start"
        put current "$previous" && rm -f "$updates/trial" # on a full disk: next time
        current=$previous
    fi
fi

place=$flashed
if [ -n "$current" ] && [ "$current" != - ]; then
    if [ -x "$updates/versions/$current/bin/splitfleet" ]; then
        place=$updates/versions/$current
    else
        echo "version $current is not in $updates/versions; starting the one that was flashed" >&2
    fi
fi
exec "$place/bin/splitfleet" "$@"
