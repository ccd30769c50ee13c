#!/bin/sh
# Moves the volume of one Linux host (open-iscsi, one path) to the new array: the application
# stops twice for as long as a login takes. A second run goes on where the first one ended.
#
#   single-host.sh VOLUME
#
# HOST         what runs a shell script on the host, given as its last argument: "ssh root@app1"
# OLD          portal and iqn of the old array as the host has it: "10.0.0.5 iqn.2001-04.com.example:old"
# GATEWAY      lunshift's portal, as the host reaches it
# NEW          portal and iqn of the new array, in the same way
# STOP, START  end and begin the use of the disk on the host: "systemctl stop db && umount /srv/db"
# LUNSHIFT     the command, with its options; lunshift where unset
# WAIT         how long the copy may take; 24h where unset
set -eu
volume=${1:?usage: single-host.sh VOLUME}
: "${HOST:?}" "${OLD:?}" "${GATEWAY:?}" "${NEW:?}" "${STOP:?}" "${START:?}"
lunshift=${LUNSHIFT:-lunshift}

say() { printf '%s: %s\n' "$volume" "$*"; }
die() {
	printf '%s: FAILED: %s\n' "$volume" "$*" >&2
	exit 1
}
host() { $HOST "set -e; $1" || die "on the host: $1"; }
field() { $lunshift status "$volume" --json | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
phase() { field phase; }
# log_in PORTAL IQN waits for the disk as well.
log_in() {
	host "iscsiadm -m node -T $2 -p $1 -o new >/dev/null
		iscsiadm -m node -T $2 -p $1 --login"' >/dev/null
		n=0
		until ls /sys/class/iscsi_session/*/device/target*/*/block/* >/dev/null 2>&1; do
			n=$((n + 1))
			[ $n -lt 300 ] || { echo "no disk appeared"; exit 1; }
			sleep 0.1
		done'
}
log_out() {
	host "iscsiadm -m node -T $2 -p $1 --logout >/dev/null
		iscsiadm -m node -T $2 -p $1 -o delete"
}

at=$(phase)
[ -n "$at" ] || die "lunshift does not tell its phase"
iqn=$(field iqn)

if [ "$at" = ready ]; then
	$lunshift check || die "lunshift check says what is wrong"
	say "the host moves to lunshift"
	host "$STOP"
	log_out $OLD
	log_in "$GATEWAY" "$iqn"
	host "$START"
	$lunshift start "$volume"
	at=$(phase)
fi
if [ "$at" = migrating ]; then
	say "copying"
	$lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}"
	at=$(phase)
fi
if [ "$at" = synced ]; then
	$lunshift verify "$volume" || die "source and destination differ; the volume stays synced"
	$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the volume stays synced"
	say "the host moves to the new array"
	host "$STOP"
	log_out "$GATEWAY" "$iqn"
	if ! $lunshift cutover "$volume"; then
		log_in "$GATEWAY" "$iqn"
		host "$START"
		die "the cutover was undone; the host uses lunshift again"
	fi
	log_in $NEW
	host "$START"
	at=$(phase)
fi
[ "$at" = cutover ] || die "phase $at is not one to go on from"

host 'iscsiadm -m session' | grep -F "${NEW% *}:" || die "the host is not logged in to $NEW"
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done; when nobody needs lunshift's state of it any more: lunshift remove $volume"
