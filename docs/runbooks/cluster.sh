#!/bin/sh
# Cuts over the disk of a cluster that guards it by persistent reservations, as Windows failover
# clusters do: every node registers a key, one reserves Write Exclusive - Registrants Only. lunshift
# keeps registrations and reservations through the migration and its own restarts, but they
# stay behind at the cutover; so the disk is taken offline for it, and the nodes reserve the new LUN
# themselves.
#
#   cluster.sh VOLUME
#
# NODES       what runs a shell script on each node, given as its last argument, one a line:
#             "ssh node1" and, on the next line, "ssh node2"
# OFFLINE     ends the use of the disk on a node and gives its registration up
#             (Windows: Suspend-ClusterResource, or Stop-ClusterResource)
# REGISTERED  succeeds on a node where its registration and the reservation are in order
# MOVE        logs a node out of lunshift; LOGIN logs it in again, which is redirected
# ONLINE      registers the node and begins the use of the disk
# LUNSHIFT    the command, with its options; lunshift where unset
# WAIT        how long the copy may take; 24h where unset
set -eu
volume=${1:?usage: cluster.sh VOLUME}
: "${NODES:?}" "${OFFLINE:?}" "${REGISTERED:?}" "${MOVE:?}" "${LOGIN:?}" "${ONLINE:?}"
lunshift=${LUNSHIFT:-lunshift}

say() { printf '%s: %s\n' "$volume" "$*"; }
die() {
	printf '%s: FAILED: %s\n' "$volume" "$*" >&2
	exit 1
}
phase() { $lunshift status "$volume" --json | sed -n 's/.*"phase":"\([^"]*\)".*/\1/p'; }
# Runs $1 on every node, one after the other.
nodes() {
	printf '%s\n' "$NODES" | while IFS= read -r node; do
		$node "set -e; $1" </dev/null || exit 1
	done || die "on a node: $1"
}

nodes "$REGISTERED"
if [ "$(phase)" = ready ]; then
	$lunshift check || die "lunshift check says what is wrong"
	$lunshift start "$volume"
fi
nodes "$REGISTERED"
$lunshift wait "$volume" --for synced --timeout "${WAIT:-24h}"
nodes "$REGISTERED"
$lunshift verify "$volume" || die "source and destination differ; the volume stays synced"
$lunshift cutover "$volume" --dry-run || die "not ready to be cut over; the volume stays synced"

say "the disk goes offline"
nodes "$OFFLINE"
nodes "$MOVE"
if ! $lunshift cutover "$volume"; then
	nodes "$LOGIN"
	nodes "$ONLINE"
	die "the cutover was undone; the disk is online on lunshift again"
fi
nodes "$LOGIN"
nodes "$ONLINE"
nodes "$REGISTERED"
$lunshift status "$volume" --json
$lunshift report "$volume"
say "done: the disk is online on the new array"
