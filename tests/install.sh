#!/bin/sh
# Installs what the tests need on Debian through apt: the peers that they talk to
# (tgtd, libiscsi's tools, qemu's tools, those of file systems and partition tables) and a C compiler for the race
# detector. It does nothing when all are there.
set -eu

PATH="$PATH:/usr/sbin:/sbin"

missing=""
need() { # need TOOL PACKAGE
	command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need tgtd tgt
need tgtadm tgt
need iscsi-inq libiscsi-bin
need iscsi-ls libiscsi-bin
need iscsi-readcapacity16 libiscsi-bin
need iscsi-perf libiscsi-bin
need iscsi-test-cu libiscsi-bin
need qemu-io qemu-utils
need qemu-img qemu-utils
need mkfs.ext4 e2fsprogs
need debugfs e2fsprogs
need dumpe2fs e2fsprogs
need mkfs.xfs xfsprogs
need mkntfs ntfs-3g
need sfdisk fdisk
# The bench compares with one target more, and counts system calls.
if [ "${1:-}" = bench ]; then
	need istgt istgt
	need strace strace
fi
# The race detector is linked by a C compiler, against the C library's headers.
if [ -z "${CC:-}" ]; then
	need gcc gcc
	[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
fi
# qemu loads its iSCSI driver from a module that is a package of its own.
found=""
for module in /usr/lib/*/qemu/block-iscsi.so /usr/lib/qemu/block-iscsi.so; do
	[ -e "$module" ] && found=yes
done
[ -n "$found" ] || missing="$missing qemu-block-extra"

[ -n "$missing" ] || exit 0

# The same package can be missing for several tools.
packages=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')

if ! command -v apt-get >/dev/null 2>&1; then
	echo "install.sh: no apt-get here; install these packages by hand: $packages" >&2
	exit 1
fi
sudo=""
if [ "$(id -u)" -ne 0 ]; then
	if ! command -v sudo >/dev/null 2>&1; then
		echo "install.sh: run as root, or install these packages as root: $packages" >&2
		exit 1
	fi
	sudo=sudo
fi

echo "install.sh: installing $packages"
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -q
# tgt brings a service that would listen on port 3260; the tests start their
# own instances, so the service is kept from starting where it was not there before.
policy=/usr/sbin/policy-rc.d
ours=""
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
	$sudo chmod 755 "$policy"
	ours=yes
fi
status=0
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages || status=$?
[ -z "$ours" ] || $sudo rm -f "$policy"
exit "$status"
