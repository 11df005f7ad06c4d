#!/bin/sh
# Written by `splitfleet flash`; cloud-init runs it once (vendor data). It installs in a service of
# its own, which is tried again, after a power cut, too, until it has succeeded.
set -eu

mkdir -p /usr/local/lib/splitfleet
cat >/usr/local/lib/splitfleet/first-boot <<'EOF'
#!/bin/sh
set -eu
for seed in /boot/firmware /boot /boot/efi /run/splitfleet-seed; do
    if [ "$seed" = /run/splitfleet-seed ]; then
        mkdir -p "$seed"
        mount -L CIDATA "$seed" || mount -L cidata "$seed" || true
    fi
    [ ! -f "$seed/splitfleet/install.sh" ] || break
done
if [ -f "$seed/splitfleet/install.sh" ]; then
    sh "$seed/splitfleet/install.sh"
    # Nothing there is needed again; updates of the system need the space.
    rm -rf "$seed/splitfleet"
elif [ ! -e /opt/splitfleet/current ]; then
    echo "splitfleet: what is to be installed is on none of the boot partitions" >&2
    exit 1
fi
if grep -q 'splitfleet flash' "$seed/network-config" 2>/dev/null; then
    dd if=/dev/zero of="$seed/network-config" bs="$(wc -c <"$seed/network-config")" count=1 \
        conv=notrunc,fsync 2>/dev/null
    rm -f "$seed/network-config"
fi
sync
systemctl disable --quiet splitfleet-first-boot
rm -rf /etc/systemd/system/splitfleet-first-boot.service /usr/local/lib/splitfleet
EOF

cat >/etc/systemd/system/splitfleet-first-boot.service <<'EOF'
[Unit]
Description=Make this machine a device of a splitfleet fleet
Wants=network-online.target
After=network-online.target local-fs.target
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart=/bin/sh /usr/local/lib/splitfleet/first-boot
TimeoutStartSec=2h
Restart=on-failure
RestartSec=60

[Install]
WantedBy=multi-user.target
EOF

systemctl daemon-reload
systemctl enable --quiet splitfleet-first-boot
systemctl start --no-block splitfleet-first-boot
