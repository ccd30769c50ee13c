#!/bin/sh
# Cuts over the volume of a host that queues while it has no path (multipath with
# no_path_retry queue, or open-iscsi with a long replacement_timeout), without stopping
# anything on it. For a volume with identity = "destination" and redirect = true, whose iqn and lun
# are those of the destination: the host logs out when it is asked to, its next login is sent to the
# new array, and the disk there is the same one by its identity, so that maps, names and mounts stay.
#
#   multipath.sh VOLUME
#
# HOST      what runs a shell script on the host, given as its last argument: "ssh root@app1"
# NEW       portal of the new array, as the host reaches it
# LUNSHIFT  the command, with its options; lunshift where unset
# WAIT      how long the copy may take; 24h where unset
#
# The other way round, identity = "source" starts without a stop: while the volume is ready its
# portals are further paths to the old LUN. Log in to them, see that multipath -ll has them in
# the same map, log out of the old array, and only then start: from then on lunshift keeps
# everybody else off the old LUN.
set -eu
volume=${1:?usage: multipath.sh VOLUME}
: "${HOST:?}" "${NEW:?}"
lunshift=${LUNSHIFT:-lunshift}

say() { printf '%s: %s\n' "$volume" "$*"; }
die() {
	printf '%s: FAILED: %s\n' "$volume" "$*" >&2
	exit 1
}
host() { $HOST "set -e; $1" || die "on the host: $1"; }
field() { $lunshift status "$volume" --json | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
# The identities of the host's iSCSI disks, as its kernel knows them, one a line.
wwids() { host 'for d in /sys/class/iscsi_session/*/device/target*/*/; do cat "$d/wwid"; done | sort -u'; }

case $(field phase) in
migrating) $lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}" ;;
synced) ;;
cutover)
	say "done already"
	exit 0
	;;
*) die "phase $(field phase): start it first (lunshift start $volume)" ;;
esac
[ "$(field identity)" = destination ] || die "its identity is not the destination's: the host would find another disk"
iqn=$(field iqn)
before=$(wwids)
[ -n "$before" ] || die "the host has no iSCSI disk"

# What a host does that cannot queue for as long as this takes is to report I/O errors.
host 'for t in /sys/class/iscsi_session/*/recovery_tmo; do
	[ "$(cat $t)" -ge 60 ] || [ "$(cat $t)" -lt 0 ] || command -v multipath >/dev/null ||
		{ echo "$t is $(cat $t) s: iscsiadm -m session -o update -n node.session.timeo.replacement_timeout -v 120"; exit 1; }
done
if command -v multipath >/dev/null; then multipath -ll | grep -q queue_if_no_path ||
	{ echo "multipath does not queue: no_path_retry queue"; exit 1; }; fi'

$lunshift verify "$volume" || die "source and destination differ; the volume stays synced"
$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the volume stays synced"
$lunshift cutover "$volume" || die "the cutover was undone; the host goes on with lunshift"

n=0
until host 'iscsiadm -m session -P 1' | grep -qF "Current Portal: $NEW"; do
	n=$((n + 1))
	[ $n -lt 60 ] || die "the host is not logged in to $NEW within a minute"
	sleep 1
done
after=$(wwids)
[ "$before" = "$after" ] || die "the disks of the host were $before and are $after"
host "iscsiadm -m node -T $iqn -p $NEW -o new >/dev/null"
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done: the host goes on at $NEW"
