#!/bin/sh
# Cuts over the disk of a cluster that guards it by persistent reservations, as Windows failover
# clusters do: every node registers a key, one reserves Write Exclusive - Registrants Only. lunshift
# keeps registrations and reservations through the migration and its own restarts, but they
# stay behind at the cutover; so the disk is taken offline for it, and the nodes reserve the new LUN
# themselves.
#
#   cluster.sh VOLUME
#
# Where the cutover is refused or undone the disk is brought online on lunshift again. A run after the
# cutover brings it online on the new array.
#
# NODES       what runs a shell script on each node, given as its last argument, one a line:
#             "ssh node1" and, on the next line, "ssh node2"
# OFFLINE     ends the use of the disk on a node and gives its registration up
#             (Windows: Suspend-ClusterResource, or Stop-ClusterResource)
# REGISTERED  succeeds on a node where its registration and the reservation are in order
# MOVE        logs a node out of lunshift; LOGIN logs it in again, which is redirected after the cutover
# ONLINE      registers the node and begins the use of the disk. LOGIN and ONLINE succeed where that is
#             done already
# LUNSHIFT    the command, with its options; lunshift where unset
# WAIT        how long the copy may take; 24h where unset
set -eu
volume=${1:?usage: cluster.sh VOLUME}
: "${NODES:?}" "${OFFLINE:?}" "${REGISTERED:?}" "${MOVE:?}" "${LOGIN:?}" "${ONLINE:?}"
. "$(dirname "$0")/common.sh"

# Runs $1 on every node, one after the other.
nodes() {
	printf '%s\n' "$NODES" | while IFS= read -r node; do
		$node "set -e; $1" </dev/null || { echo "on a node: $node" >&2; exit 1; }
	done
}
registered() { nodes "$REGISTERED" || die "registrations are not in order $1; bring the disk online (LOGIN, ONLINE) before the next run"; }
online() { nodes "$LOGIN" && nodes "$ONLINE"; }

at=$(field phase)
case $at in
ready | migrating | synced) registered "in phase $at" ;;
cutover) say "cut over already" ;;
*) die "phase ${at:-unknown} is not one to go on from" ;;
esac
if [ "$at" = ready ]; then
	$lunshift check || die "lunshift check says what is wrong"
	$lunshift start "$volume" || die "not started; the disk is online"
	registered "after the start"
fi
if [ "$at" != cutover ]; then
	$lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}" || die "not synced; the disk is online"
	registered "after the copy"
	compare "the disk is online"
	$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the disk is online"

	say "the disk goes offline"
	if nodes "$OFFLINE" && nodes "$MOVE"; then
		$lunshift cutover "$volume" || say "exit code $? of the cutover"
	fi
	at=$(field phase)
	if [ "$at" = synced ]; then
		online || die "not cut over, and the disk is not online on every node"
		die "not cut over; the disk is online on lunshift again"
	fi
	[ "$at" = cutover ] || die "phase ${at:-unknown} after the cutover; see whether the disk is online"
fi

online || die "the disk is not online on every node"
registered "at the new array"
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done: the disk is online on the new array"
