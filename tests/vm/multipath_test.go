package vm

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// writer makes a script, /writer, that writes files to /mnt and ends at the first write that fails.
const writer = `cat >/writer <<'END'
i=0
while [ ! -e /stop ]; do
	i=$((i+1)); f=after$i
	dd if=/dev/urandom of=/mnt/$f bs=64k count=1 conv=fsync 2>/dev/null || { echo "write of $f failed" >>/failed; exit 1; }
	(cd /mnt && md5sum $f) >>/sums.new
	echo $i >/written.new; mv /written.new /written # whole at every instant
done
END
`

// write runs it.
const write = "sh /writer </dev/null >/dev/null 2>&1 &"

// multipathed logs the guest in to a target under udev and multipathd, and has the writer write to a
// file system on the map of its disk. The kernel has no device handler for ALUA, as Debian's for
// virtual machines goes without: multipathd itself asks the paths for their state. All paths are
// in one group, so that I/O goes over each of them all the time. retry is no_path_retry.
func multipathed(t *testing.T, g *Guest, retry, iqn, portal string) {
	t.Helper()
	in(t, g, `set -e
cat >/etc/multipath.conf <<'END'
defaults {
	find_multipaths no
	path_grouping_policy multibus
	polling_interval 1
	no_path_retry `+retry+`
}
END
systemd-udevd --daemon 2>/dev/null
udevadm trigger --action=add
udevadm settle
multipathd
n=0; until multipathd show daemon >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 300 ] || { echo "multipathd does not run"; exit 1; }; sleep 0.1; done
`+mapScript+writer+`
node="iscsiadm -m node -T `+iqn+` -p `+portal+`"
$node -o new >/dev/null
$node --login
paths 1
mkfs.ext4 -q -F $map
mount $map /mnt
`+write)
	writesOn(t, g)
}

// mapScript has the functions paths N, which waits until there is one map, $map, whose paths are
// N, all ready; and disk IQN, the disk of that target.
const mapScript = `cat >/map <<'END'
paths() {
	end=$(($(date +%s) + 60))
	# The maps come last: of disks that are not taken for one, the second makes a map of its own.
	until all=$(multipath -ll) && [ "$(echo "$all" | grep -c 'active ready running')" = $1 ] &&
		[ "$(echo "$all" | grep -c ' [0-9]*:0:0:')" = $1 ] && map=/dev/mapper/$(dmsetup ls --target multipath | awk '{ print $1 }') && [ -b "$map" ]; do
		[ $(date +%s) -lt $end ] || { echo "not one map of $1 ready paths:"; echo "$all"; dmesg | tail -20; exit 1; }; sleep 0.1
	done
}
disk() {
	for s in /sys/class/iscsi_session/*; do
		if [ "$(cat $s/targetname)" = "$1" ]; then ls $s/device/target*/*/block | grep -m1 '^sd'; fi
	done
}
END
. /map
`

// files written by the guest's writer, which must have had no failure.
func written(t *testing.T, g *Guest) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(in(t, g, "[ ! -e /failed ] || { cat /failed; dmesg | tail -20; exit 1; }; cat /written 2>/dev/null || echo 0"), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// writesOn waits until the writer has written some files more.
func writesOn(t *testing.T, g *Guest) {
	t.Helper()
	from := written(t, g)
	within(t, "the host's writes", func() error {
		if written(t, g) < from+5 {
			return errors.New("too few")
		}
		return nil
	})
}

// TestMultipathHostStartsWithoutAStop: on a host with multipathd, which reports an error as soon
// as a map has no path, the volume's disk joins the map of the old LUN and is written over
// together with the old path; the old array is logged out of, the migration starts and ends, and
// nothing on the host is stopped, no write fails and no file differs.
//
// Caught: the identity own; a start before the logout, which fences the old path under the map.
func TestMultipathHostStartsWithoutAStop(t *testing.T) {
	gw := newGateway(t, twoArrays(t, front, 0, "identity = \"source\"\n"))
	gw.start()
	g := boot(t)
	multipathed(t, g, "fail", oldIQN, "10.0.0.5")
	in(t, g, `set -e; . /map
node="iscsiadm -m node -T `+front+` -p `+direct+`"
$node -o new >/dev/null
$node --login
paths 2`)
	// Both ways lead to the same blocks, and the host uses both.
	const writes = "set -e; . /map\nfor iqn in " + oldIQN + " " + front + "; do awk '{ print $5 }' /sys/block/$(disk $iqn)/stat; done"
	counted := func() (old, volume int) {
		t.Helper()
		if _, err := fmt.Sscan(in(t, g, writes), &old, &volume); err != nil {
			t.Fatal(err)
		}
		return old, volume
	}
	old, volume := counted()
	within(t, "writes over both paths", func() error {
		if o, v := counted(); o < old+5 || v < volume+5 {
			return fmt.Errorf("%d more over the array's, %d over the volume's", o-old, v-volume)
		}
		return nil
	})
	in(t, g, "set -e; . /map\niscsiadm -m node -T "+oldIQN+" -p 10.0.0.5 --logout\npaths 1")
	writesOn(t, g)
	gw.run("start", "db01")
	writesOn(t, g)
	gw.run("wait", "db01", "--for", "synced", "--timeout", "2m")
	writesOn(t, g)
	t.Log(endOfWrites(t, g))
	gw.run("verify", "db01")
}

// TestMultipathHostCutsOverWithoutAStop: on a host with multipathd, which queues while a map has no
// path, the new LUN's disk joins the map of a volume with identity = "destination" after the
// cutover; nothing on the host is stopped, no write fails and no file differs.
//
// Caught: the identity own.
func TestMultipathHostCutsOverWithoutAStop(t *testing.T) {
	gw := newGateway(t, twoArrays(t, front, 0, "identity = \"destination\"\n"))
	gw.start()
	g := boot(t)
	multipathed(t, g, "queue", front, direct)
	gw.run("start", "db01")
	gw.run("wait", "db01", "--for", "synced", "--timeout", "2m")
	gw.run("verify", "db01")
	writesOn(t, g)
	// The run book sees what a cutover would do to a map that does not queue.
	in(t, g, "set -e; . /map\npaths 1; multipathd disablequeueing map ${map#/dev/mapper/}")
	if out, err := runbook(t, gw, "multipath.sh", "HOST="+on(t, ""), "NEW=10.0.0.9"); err == nil || !strings.Contains(out, "does not queue") {
		t.Errorf("a map that does not queue is no failure: %s", out)
	}
	in(t, g, "set -e; . /map\npaths 1; multipathd restorequeueing map ${map#/dev/mapper/}")
	gw.run("cutover", "db01")
	in(t, g, `set -e; . /map
node="iscsiadm -m node -T `+newIQN+` -p 10.0.0.9"
$node -o new >/dev/null
$node --login`)
	writesOn(t, g)
	in(t, g, "set -e; . /map\niscsiadm -m node -T "+front+" -p "+direct+" --logout\npaths 1")
	gw.kill() // it is of no use any more
	writesOn(t, g)
	t.Log(endOfWrites(t, g))
}

// endOfWrites ends the writer and checks what it wrote, as the map's disk has it.
func endOfWrites(t *testing.T, g *Guest) string {
	t.Helper()
	out := in(t, g, `echo >/stop; while ps | grep -v grep | grep -q 'sh /writer'; do sleep 0.1; done; [ ! -e /failed ] || { cat /failed; exit 1; }
set -e; . /map
paths 1; multipath -ll
umount /mnt; e2fsck -fn $map; blockdev --flushbufs $map; mount -o ro $map /mnt
(cd /mnt && md5sum -c /sums.new >/dev/null); wc -l </sums.new
umount /mnt`)
	for line := range strings.Lines(in(t, g, "dmesg")) {
		for _, bad := range []string{"EXT4-fs error", "EXT4-fs warning", "Buffer I/O error", "I/O error, dev dm-", "reservation conflict"} {
			if strings.Contains(line, bad) {
				t.Errorf("the guest's kernel says: %s", line)
			}
		}
	}
	return out
}
