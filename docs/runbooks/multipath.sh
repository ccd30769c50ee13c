#!/bin/sh
# Cuts over the volume of a host that queues while it has no path (multipath with
# no_path_retry queue, or open-iscsi with a long replacement_timeout), without stopping
# anything on it. For a volume with identity = "destination" and redirect = true, whose iqn and lun
# are those of the destination: the host logs out when it is asked to, its next login is sent to the
# new array, and the disk there is the same one by its identity, so that maps, names and mounts stay.
#
#   multipath.sh VOLUME
#
# Wherever a run ended, the next one goes on from there; where the cutover is refused or undone the
# host goes on with lunshift.
#
# HOST      what runs a shell script on the host, given as its last argument: "ssh root@app1"
# NEW       portal (its address) of the new array, as the host reaches it
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
. "$(dirname "$0")/common.sh"

# On the host too: wwids IQN prints the identities of that target's disks, as the kernel knows them.
# waits IQN fails where one of them is in a multipath map that does not queue, or in none and its session
# gives up soon.
tools="$tools
$(
	cat <<'END'
wwids() {
	for s in /sys/class/iscsi_session/*; do
		if [ "$(cat "$s/targetname")" = "$1" ]; then cat "$s"/device/target*/*/wwid; fi
	done | sort -u
}
waits() {
	for s in /sys/class/iscsi_session/*; do
		[ "$(cat "$s/targetname")" = "$1" ] || continue
		for d in "$s"/device/target*/*/block/*; do
			map=
			for u in "$d"/holders/*/dm/uuid; do
				case $(cat "$u" 2>/dev/null) in mpath-*) map=$(cat "${u%uuid}name") ;; esac
			done
			if [ -n "$map" ]; then
				multipath -ll "$map" | grep -q queue_if_no_path || { echo "map $map does not queue: no_path_retry queue"; return 1; }
			else
				tmo=$(cat "$s/recovery_tmo")
				[ "$tmo" -ge 60 ] || [ "$tmo" -lt 0 ] ||
					{ echo "$s/recovery_tmo is $tmo s: iscsiadm -m session -o update -n node.session.timeo.replacement_timeout -v 120"; return 1; }
			fi
		done
	done
}
END
)"

at=$(field phase)
case $at in
migrating | synced | cutover) ;;
*) die "phase ${at:-unknown}: start it first (lunshift start $volume)" ;;
esac
[ "$(field identity)" = destination ] || die "its identity is not the destination's: the host would find another disk"
iqn=$(field iqn)
[ -n "$iqn" ] || die "lunshift does not tell the volume's iqn"
before=

if [ "$at" != cutover ]; then
	$lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}" || die "not synced"
	before=$(host "wwids $iqn") || die "the host does not tell its disks"
	[ -n "$before" ] || die "the host has no disk of $iqn"

	# What a host does that cannot queue for as long as this takes is to report I/O errors.
	host "waits $iqn" || die "the host cannot wait without a path"

	compare "the host goes on with lunshift"
	$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the volume stays synced"
	$lunshift cutover "$volume" || say "exit code $? of the cutover"
	at=$(field phase)
	[ "$at" != synced ] || die "the cutover was undone; the host goes on with lunshift"
	[ "$at" = cutover ] || die "phase ${at:-unknown} after the cutover; run this again"
fi

n=0
until host "session $NEW $iqn | grep -q '[^-]'"; do
	n=$((n + 1))
	[ $n -lt 60 ] || die "the host has no disk of $iqn at $NEW within a minute"
	sleep 1
done
after=$(host "wwids $iqn") || die "the host does not tell its disks"
# A run that begins after the cutover does not know them from before.
[ "${before:-$after}" = "$after" ] || die "the disks of the host were $before and are $after"
# The record is what the host logs in by after its next boot.
host "node='iscsiadm -m node -T $iqn -p $NEW'; \$node >/dev/null 2>&1 || \$node -o new >/dev/null" || die "the host has no record of $iqn at $NEW"
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done: the host goes on at $NEW"
