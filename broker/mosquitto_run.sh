#!/bin/sh
# Runs the Mosquitto of this folder, and starts it again within seconds when a certificate, a
# revocation list or the configuration has changed: Mosquitto reads them anew only when it starts,
# and whoever was revoked stays connected until then. Ends when Mosquitto ends by itself, with its
# status. Started by root, the broker becomes the user "mosquitto".
set -u
cd "$(dirname "$0")" || exit 1
PATH=$PATH:/usr/sbin:/usr/local/sbin

broker=
ending=
end() {
    ending=yes
    [ -z "$broker" ] || kill -TERM "$broker" 2>/dev/null
}
trap end TERM INT HUP

pause() {
    sleep 1 &
    wait "$!" # unlike sleep itself, it is over when a signal comes
}

running() { kill -0 "$broker" 2>/dev/null; }

state() { cat mosquitto.conf acl ./*.pem | cksum; }

# What only the broker reads and writes must be its own once it has given up root's rights.
hand_over() {
    [ "$(id -u)" = 0 ] && id mosquitto >/dev/null 2>&1 || return 0
    chown -R "mosquitto:$(id -g mosquitto)" acl broker-key.pem data
}

# As many connections as the configuration allows: Mosquitto 2.0.11 does not keep count of them.
bound_connections() {
    wanted=$(awk '/^max_connections / { sum += $2 } END { print sum + 64 }' mosquitto.conf)
    # shellcheck disable=SC3045 # dash, busybox and bash all have it
    ulimit -n "$wanted" 2>/dev/null || ulimit -S -n "$(ulimit -H -n)"
}

# Waits until files are no longer being changed: several belong together.
settle() {
    looks=0
    until [ "$(state)" = "$now" ] || [ "$looks" = 3 ]; do
        now=$(state)
        looks=$((looks + 1))
        pause
    done
}

stop() {
    kill -TERM "$broker" 2>/dev/null
    looks=0
    while running && [ "$looks" -lt 5 ]; do
        looks=$((looks + 1))
        pause
    done
    kill -KILL "$broker" 2>/dev/null
}

while :; do
    hand_over
    now=$(state)
    (bound_connections && exec mosquitto -c mosquitto.conf) &
    broker=$!
    while running && [ -z "$ending" ] && [ "$(state)" = "$now" ]; do
        pause
    done
    if [ -n "$ending" ]; then
        stop
        wait "$broker"
        exit
    fi
    if ! running; then
        wait "$broker"
        exit
    fi
    settle
    echo "run.sh: files have changed, the broker starts again" >&2
    stop
    wait "$broker"
done
