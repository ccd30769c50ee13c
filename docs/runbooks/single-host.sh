#!/bin/sh
# Moves the volume of one Linux host (open-iscsi, one path) to the new array: the application
# stops twice for as long as a login takes. Wherever a run ended, the next one goes on from there;
# where a step fails the application is brought back to where it ran, as far as there is a way.
#
#   single-host.sh VOLUME
#
# HOST         what runs a shell script on the host, given as its last argument: "ssh root@app1"
# OLD          portal (its address) and iqn of the old array, as the host has it:
#              "10.0.0.5 iqn.2001-04.com.example:old"
# GATEWAY      lunshift's portal, as the host reaches it
# NEW          portal and iqn of the new array, in the same way as OLD
# STOP, START  end and begin the use of the disk on the host. Each is run again by the next run, and
#              so succeeds where it is done already:
#              STOP="systemctl stop db && systemctl stop srv-db.mount"
#              START="systemctl start srv-db.mount && systemctl start db"
# LUNSHIFT     the command, with its options; lunshift where unset
# WAIT         how long the copy may take; 24h where unset
#
# A logout takes all disks of a target: each target has no other disk of this host. The host's node
# records of lunshift and the new array are made where there are none; with CHAP, make them before.
set -eu
volume=${1:?usage: single-host.sh VOLUME}
: "${HOST:?}" "${OLD:?}" "${GATEWAY:?}" "${NEW:?}" "${STOP:?}" "${START:?}"
. "$(dirname "$0")/common.sh"

# On the host too: log_in PORTAL IQN is done once the disk of that target is there.
tools="$tools
$(
	cat <<'END'
node() {
	portal=$1 iqn=$2
	shift 2
	iscsiadm -m node -T "$iqn" -p "$portal" "$@"
}
log_in() {
	node "$@" >/dev/null 2>&1 || node "$@" -o new >/dev/null
	[ -n "$(session "$@")" ] || node "$@" --login >/dev/null
	n=0
	until session "$@" | grep -q '[^-]'; do
		n=$((n + 1))
		[ $n -lt 300 ] || { echo "no disk of $2 at $1 appeared" >&2; exit 1; }
		sleep 0.1
	done
	if command -v udevadm >/dev/null; then udevadm settle --timeout=30 || true; fi
}
log_out() { node "$@" --logout >/dev/null; }
# retire PORTAL IQN keeps the host's record of that target, but not for its next boot.
retire() { node "$@" -o update -n node.startup -v manual || [ $? -eq 21 ]; } # 21: it has none
END
)"

# use PORTAL IQN logs the host in, unless it is, and begins the use of the disk.
use() { host "log_in $1 $2" && host "$START"; }
# leave PORTAL IQN ends the use of the disk and logs the host out, where it is logged in.
leave() {
	there=$(host "session $1 $2") || die "the host does not tell its sessions"
	[ -n "$there" ] || return 0
	if ! host "$STOP" || ! host "log_out $1 $2"; then
		use "$1" "$2" || die "the host cannot leave $2, and the application is stopped"
		die "the host cannot leave $2; the application goes on there"
	fi
}

at=$(field phase)
iqn=$(field iqn)
[ -n "$at" ] && [ -n "$iqn" ] || die "lunshift does not tell the volume's phase and iqn"
gateway="$GATEWAY $iqn"

if [ "$at" = ready ]; then
	host "node $OLD >/dev/null" || die "the host does not know $OLD: is OLD right?"
	$lunshift check || die "lunshift check says what is wrong"
	say "the host moves to lunshift"
	leave $OLD
	if ! use $gateway; then
		leave $gateway
		use $OLD || die "the host can use neither lunshift nor the old array; the application is stopped"
		die "the host cannot use lunshift; it uses the old array again"
	fi
	host "retire $OLD"
	$lunshift start "$volume" || die "not started; the host uses the old LUN through lunshift"
	at=$(field phase)
fi
if [ "$at" = migrating ] || [ "$at" = synced ]; then
	use $gateway || die "the host cannot use lunshift; the application is stopped"
	say "copying"
	$lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}" || die "not synced; the host uses lunshift"
	compare "the host uses lunshift"
	$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the host uses lunshift"
	say "the host moves to the new array"
	leave $gateway
	$lunshift cutover "$volume" || say "exit code $? of the cutover"
	at=$(field phase)
	if [ "$at" = synced ]; then
		use $gateway || die "the cutover was undone, and the host cannot use lunshift; the application is stopped"
		die "the cutover was undone; the host uses lunshift again"
	fi
fi
[ "$at" = cutover ] || die "phase ${at:-unknown} is not one to go on from; see whether the application runs"

leave $gateway
use $NEW || die "the host cannot use the new array; the application is stopped"
host "retire $gateway"
host 'iscsiadm -m session'
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done; when nobody needs lunshift's state of it any more: lunshift remove $volume"
