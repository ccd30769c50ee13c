# What the run books share, read by each of them from its own folder. It uses what they have set:
# volume, LUNSHIFT, and HOST for host.
lunshift=${LUNSHIFT:-lunshift}

say() { printf '%s: %s\n' "$volume" "$*"; }
die() {
	printf '%s: FAILED: %s\n' "$volume" "$*" >&2
	exit 1
}
# field NAME is a text of the volume's status.
field() { $lunshift status "$volume" --json | sed -n "s/^{[^{]*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
# compare WHERE ends the run unless source and destination are the same; WHERE is how things stand then.
compare() {
	code=0
	$lunshift verify "$volume" || code=$?
	case $code in
	0) ;;
	5) die "source and destination differ; the volume stays synced, $1" ;;
	*) die "source and destination could not be compared (exit code $code); $1" ;;
	esac
}

# tools is what can be run on the host beside its own commands. session PORTAL IQN prints nothing where
# the host has no session with that target, else the name of its disk, or "-" as long as none runs.
tools=$(
	cat <<'END'
session() {
	all=$(iscsiadm -m session -P 3 2>/dev/null) || [ $? -eq 21 ] || return 1 # 21: no session at all
	printf '%s\n' "$all" | awk -v portal="$1" -v iqn="$2" '
		$1 == "Target:" { target = $2 }
		/Current Portal:/ {
			here = target == iqn && (index($3, portal ":") == 1 || index($3, portal ",") == 1)
			if (here) found = "-"
		}
		here && /Attached scsi disk/ && $6 == "running" { found = $4 }
		END { if (found) print found }'
}
END
)
# host SCRIPT runs it on the host.
host() { $HOST "set -e
$tools
$1"; }
