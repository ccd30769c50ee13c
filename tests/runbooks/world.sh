# Stands for lunshift, iscsiadm, the application and the nodes of a cluster in the tests of the run
# books, whichever name it is called by. What they know lies in files in $WORLD: phase, sessions
# ("portal iqn disk", "-" for a disk that is not there yet), records ("portal iqn startup"), app (the
# portal that it runs at) and one file for each node that is logged in or online. What none of them
# may be asked for is written to the file wrong.
#
# Each call is counted. Call number $FAIL does nothing and fails; after call number $KILL the whole
# run ends as by SIGKILL.
set -eu
cd "$WORLD"
me=${0##*/}
read -r number <calls
number=$((number + 1))
echo $number >calls
read -r phase <phase
echo "$number $me $*" >>log
if [ $number = "${FAIL:-}" ]; then
	echo "$me: made to fail" >&2
	exit 1
fi

wrong() { echo "$*" >>wrong; }
session() { grep -q "^$1 " sessions; }
refuse() {
	echo "$me $*" >&2
	exit "${code:-1}"
}

lunshift() {
	case $1 in
	status) echo '{"name":"db01","iqn":"'$FRONT'","lun":0,"phase":"'$phase'","identity":"destination","sessions":[{"iqn":"x","phase":"y"}]}' ;;
	check | report) ;;
	start)
		[ "$phase" = ready ] || refuse "start: phase"
		! session $OLDAT || wrong "started while the host uses the source"
		echo migrating >phase
		;;
	wait) [ "$phase" != migrating ] || echo synced >phase ;;
	verify)
		[ "$phase" = synced ] || code=3 refuse "verify: phase"
		return ${VERIFY:-0}
		;;
	cutover)
		[ "$phase" = synced ] || code=3 refuse "cutover: phase"
		[ "${3:-}" != --dry-run ] || return 0
		[ -z "${QUEUES:-}" ] || sed "s/^$GATEWAY .*/$NEWAT $FRONT sdb/" sessions >moved
		[ -z "${QUEUES:-}" ] || mv moved sessions
		! session $GATEWAY || refuse "cutover: a session stays"
		[ ! -e in.a ] && [ ! -e in.b ] || refuse "cutover: a session of a node stays"
		echo cutover >phase
		[ -z "${LOST:-}" ] || refuse "cutover: the connection ended" # after the fact
		;;
	*) wrong "lunshift $*" ;;
	esac
}

iscsiadm() {
	case "$*" in
	"-m session -P 3")
		[ -s sessions ] || code=21 refuse "no active sessions"
		late=
		while read -r portal iqn disk; do
			printf 'Target: %s (non-flash)\n\tCurrent Portal: %s:3260,1\n\tPersistent Portal: %s:3260,1\n' $iqn $portal $portal
			case $disk in
			-) late=yes ;;
			*) printf '\t\tscsi3 Channel 00 Id 0 Lun: 1\n\t\t\tAttached scsi disk %s\t\tState: running\n' $disk ;;
			esac
		done <sessions
		if [ $late ]; then
			sed 's/ -$/ sdb/' sessions >there # a disk is there at the second look
			mv there sessions
		fi
		;;
	"-m session") cat sessions ;;
	"-m node -T "*) shift 3 && node "$@" ;;
	*) wrong "iscsiadm $*" ;;
	esac
}
# node IQN -p PORTAL ...
node() {
	iqn=$1 portal=$3
	shift 3
	[ "$*" = "-o new" ] || grep -q "^$portal $iqn " records || code=21 refuse "no records found"
	case "$*" in
	"") ;;
	"-o new") echo "$portal $iqn automatic" >>records ;;
	"-o update -n node.startup -v manual")
		sed "s/^\($portal $iqn\) .*/\1 manual/" records >changed
		mv changed records
		;;
	--login)
		! session $portal || code=15 refuse "session exists"
		case $portal-$phase in
		$OLDAT-ready | $GATEWAY-ready | $GATEWAY-migrating | $GATEWAY-synced | $NEWAT-cutover) ;;
		*) refuse "login to $portal in phase $phase" ;;
		esac
		! session $OLDAT || wrong "login to $portal beside the source"
		echo "$portal $iqn -" >>sessions
		;;
	--logout)
		[ "$(cat app)" != $portal ] || wrong "logout of $portal under the application"
		session $portal || code=21 refuse "no session"
		grep -v "^$portal " sessions >left || true
		mv left sessions
		;;
	*) wrong "iscsiadm of a node: $*" ;;
	esac
}

# The application finds its disk by what is on it, wherever that is.
app() {
	case $1 in
	start)
		at=$(grep -v -e '^10.0.0.7 ' -e ' -$' sessions | cut -d ' ' -f 1)
		[ -n "$at" ] || refuse "start: no disk"
		case "$(cat app)" in
		"" | $at) echo $at >app ;;
		*) wrong "the application runs at $(cat app), and its disk is at $at" ;;
		esac
		;;
	stop) echo >app ;;
	esac
}

# What a cluster does on node $NODE.
member() {
	case $1 in
	registered) [ -e on.$NODE ] || refuse "$NODE is not registered" ;;
	offline) rm -f on.$NODE ;;
	move)
		[ ! -e on.a ] && [ ! -e on.b ] || wrong "logout of $NODE under the cluster"
		rm in.$NODE
		;;
	login) echo >in.$NODE ;;
	online)
		[ -e in.$NODE ] || refuse "$NODE is not logged in"
		echo >on.$NODE
		;;
	esac
}

sleep() { :; }

$me "$@"
if [ $number = "${KILL:-}" ]; then kill -KILL 0; fi
