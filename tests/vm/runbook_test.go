package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// onGuest makes this program a command that runs its last argument as a shell script in the
// guest, as ssh does on a host. Its value goes before the script.
const onGuest = "LUNSHIFT_VM_GUEST"

func runOnGuest(prefix, script string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	out, err := (&Guest{}).Run(ctx, prefix+"\n"+script)
	var failed *ScriptError
	if errors.As(err, &failed) {
		fmt.Fprint(os.Stderr, failed.Output)
		return failed.Status
	}
	fmt.Print(out)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// on is the command that runs a script on a host.
func on(t *testing.T, prefix string) string {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	return "env " + onGuest + "=" + prefix + " " + self
}

// runbook runs docs/runbooks/name for volume db01 and gives what it said.
func runbook(t *testing.T, gw *gateway, name string, env ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "../../docs/runbooks/"+name, "db01")
	cmd.Env = append(append(os.Environ(), "LUNSHIFT="+lunshift+" --config "+gw.config()), env...)
	out, err := cmd.CombinedOutput()
	t.Logf("%s: %v\n%s", name, err, out)
	return string(out), err
}

const (
	oldIQN = "iqn.2001-04.com.example:old"
	newIQN = "iqn.2001-04.com.example:new"
	stop   = "if grep ' /mnt ' /proc/mounts; then umount /mnt; fi"
	begin  = diskScript + "grep ' /mnt ' /proc/mounts || mount $disk /mnt; md5sum -c /sums"
)

// refusesOnce is the configuration of a volume's hook that stops its first cutover.
func refusesOnce(t *testing.T) string {
	t.Helper()
	hook := filepath.Join(t.TempDir(), "hook")
	must(t, os.WriteFile(hook, []byte("#!/bin/sh\n[ -e \"$0.ran\" ] || { echo >\"$0.ran\"; echo 'the site is not ready'; exit 1; }\n"), 0o755))
	return fmt.Sprintf("[volume.hooks]\nbefore_cutover = [%q]\n", hook)
}

// refused runs a run book whose cutover the hook stops, and demands that it says so.
func refused(t *testing.T, gw *gateway, name, text string, env ...string) {
	t.Helper()
	out, err := runbook(t, gw, name, env...)
	if err == nil || !strings.Contains(out, "the site is not ready") || !strings.Contains(out, "FAILED: "+text) {
		t.Fatalf("%v, want %q: %s", err, text, out)
	}
	if status := gw.run("status", "db01"); !strings.Contains(status, "synced") {
		t.Fatalf("after a cutover that was refused: %s", status)
	}
}

// twoArrays is the configuration of a volume between two arrays, under that iqn and lun.
func twoArrays(t *testing.T, iqn string, lun int, more string) string {
	t.Helper()
	array(t, "10.0.0.5", oldIQN, 256*mib)
	array(t, "10.0.0.9", newIQN, 256*mib)
	return fmt.Sprintf("\n[[volume]]\nname = \"db01\"\niqn = %q\nlun = %d\nsource = \"iscsi://10.0.0.5/%s/1\"\ndestination = \"iscsi://10.0.0.9/%s/1\"\n%s",
		iqn, lun, oldIQN, newIQN, more) + admit(app1, "10.0.0.0/24")
}

// fill makes a file system on the only disk, with files whose sums are known, mounted.
const fill = diskScript + `set -e
mkfs.ext4 -q -F $disk
mount $disk /mnt
for i in $(seq 1 30); do dd if=/dev/urandom of=/mnt/$i bs=1M count=1 2>/dev/null; done
sync; md5sum /mnt/* 2>/dev/null >/sums || true; grep -q /mnt/30 /sums`

// TestRunbookOfASingleHost: it moves the host, can be run again at the end, and gives the
// host back to lunshift where the cutover is refused; the next run goes on from there.
func TestRunbookOfASingleHost(t *testing.T) {
	gw := newGateway(t, twoArrays(t, front, 0, refusesOnce(t)))
	gw.start()
	g := boot(t)
	in(t, g, "set -e; iscsiadm -m node -T "+oldIQN+" -p 10.0.0.5 -o new >/dev/null; iscsiadm -m node -T "+oldIQN+" -p 10.0.0.5 --login")
	in(t, g, fill)
	env := []string{"HOST=" + on(t, ""), "OLD=10.0.0.5 " + oldIQN, "GATEWAY=" + direct, "NEW=10.0.0.9 " + newIQN, "STOP=" + stop, "START=" + begin}
	if _, err := runbook(t, gw, "single-host.sh", append(env, "OLD=10.0.0.5 iqn.2001-04.com.example:wrong", "STOP=true", "START=true")...); err == nil {
		t.Error("a host that cannot log out of the old array is no failure")
	}
	refused(t, gw, "single-host.sh", "the cutover was undone; the host uses lunshift again", env...)
	t.Log(in(t, g, "set -e; iscsiadm -m session; iscsiadm -m session | grep -q "+direct+":; grep ' /mnt ' /proc/mounts; md5sum -c /sums >/dev/null; echo >/mnt/after; sync"))
	for range 2 {
		if _, err := runbook(t, gw, "single-host.sh", env...); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(in(t, g, `set -e; [ "$(iscsiadm -m session | wc -l)" = 1 ]; iscsiadm -m session | grep 10.0.0.9
for old in "`+oldIQN+` -p 10.0.0.5" "`+front+` -p `+direct+`"; do iscsiadm -m node -T $old | grep 'node.startup = manual'; done
[ -e /mnt/after ]; md5sum -c /sums; umount /mnt;`+diskScript+`e2fsck -fn $disk`))
}

// TestRunbookOfAHostThatQueues: the disk of a mounted file system that is written to moves to
// the new array, nothing on the host is stopped, and its kernel sees the same disk; also after a
// cutover that was refused.
func TestRunbookOfAHostThatQueues(t *testing.T) {
	gw := newGateway(t, twoArrays(t, newIQN, 1, "identity = \"destination\"\nredirect = true\n"+refusesOnce(t)))
	gw.start()
	g := boot(t)
	in(t, g, "set -e; node='iscsiadm -m node -T "+newIQN+" -p "+direct+`'
$node -o new >/dev/null
$node -o update -n node.session.timeo.replacement_timeout -v 120
$node --login`)
	in(t, g, fill)
	env := []string{"HOST=" + on(t, ""), "NEW=10.0.0.9"}
	if out, err := runbook(t, gw, "multipath.sh", env...); err == nil || !strings.Contains(out, "start it first") {
		t.Error("a volume that was not started is no failure")
	}
	gw.run("start", "db01")
	in(t, g, writer+write)
	writesOn(t, g)
	refused(t, gw, "multipath.sh", "the cutover was undone; the host goes on with lunshift", env...)
	writesOn(t, g)
	record := "iscsiadm -m node -T " + newIQN + " -p 10.0.0.9"
	for range 2 {
		if _, err := runbook(t, gw, "multipath.sh", env...); err != nil {
			t.Fatal(err)
		}
		// A run that ended before it made the record: the next one makes it.
		in(t, g, "set -e; "+record+" >/dev/null; "+record+" -o delete")
	}
	writesOn(t, g)
	gw.kill() // it is of no use any more
	t.Log(in(t, g, `echo >/stop; while ps | grep -v grep | grep -q 'sh /writer'; do sleep 0.1; done; [ ! -e /failed ] || { cat /failed; exit 1; }
set -e
`+diskScript+`
(cd /mnt && md5sum -c /sums.new >/dev/null); md5sum -c /sums >/dev/null; wc -l </sums.new
umount /mnt; e2fsck -fn $disk`))
	for line := range strings.Lines(in(t, g, "dmesg")) {
		for _, bad := range []string{"I/O error", "EXT4-fs error", "recovery timed out"} {
			if strings.Contains(line, bad) {
				t.Errorf("the guest's kernel says: %s", line)
			}
		}
	}
}

// TestRunbookOfACluster: two nodes with Write Exclusive - Registrants Only keep it through the
// migration, a kill and a cutover that is refused, and have it at the new array.
func TestRunbookOfACluster(t *testing.T) {
	const app2 = "iqn.1993-08.org.debian:01:app2"
	gw := newGateway(t, twoArrays(t, newIQN, 1, "redirect = true\n"+refusesOnce(t))+admit(app2, "10.0.0.0/24"))
	gw.start()
	g := boot(t)
	// The nodes are two interfaces of the guest, with names of their own.
	in(t, g, `set -e
for n in a:`+app1+` b:`+app2+`; do
	i=${n%%:*}; name=${n#*:}
	iscsiadm -m iface -I $i -o new >/dev/null
	iscsiadm -m iface -I $i -o update -n iface.initiatorname -v $name >/dev/null
	iscsiadm -m node -T `+newIQN+` -p `+direct+` -I $i -o new >/dev/null
	iscsiadm -m node -T `+newIQN+` -p `+direct+` -I $i --login >/dev/null
done
cat >/disk <<'END'
n=0; disk=
until [ -n "$disk" ]; do
	for s in /sys/class/iscsi_session/*; do
		if [ "$(cat $s/ifacename)" = "$node" ]; then disk=$(ls $s/device/target*/*/block 2>/dev/null | grep -m1 '^sd') || true; fi
	done
	n=$((n+1)); [ $n -lt 300 ] || { echo "node $node has no disk"; exit 1; }; [ -n "$disk" ] || sleep 0.1
done
disk=/dev/$disk
for t in 1 2 3; do if sg_turs $disk >/dev/null 2>&1; then break; fi; done # unit attentions
key=0x1a; [ $node = a ] || key=0x1b
END`)
	const (
		disk   = ". /disk\n"
		online = disk + `sg_persist -n -o -I -S $key -Z $disk || sg_persist -n -o -I -S $key $disk # tgtd has no APTPL
sg_persist -n -i -r $disk | grep -q "Write Exclusive, registrants only" || sg_persist -n -o -R -K $key -T 5 $disk
dd if=/dev/urandom of=$disk bs=4k count=1 conv=fsync 2>/dev/null`
		registered = disk + `sg_persist -n -i -k $disk | grep -i $key
sg_persist -n -i -r $disk | grep "Write Exclusive, registrants only"
dd if=/dev/zero of=$disk bs=4k count=1 conv=fsync 2>/dev/null`
		iface = "iscsiadm -m node -T " + newIQN + " -p " + direct + " -I $node"
	)
	env := []string{"NODES=" + on(t, "node=a") + "\n" + on(t, "node=b"), "OFFLINE=" + disk + "sg_persist -n -o -G -K $key -S 0 $disk",
		"REGISTERED=" + registered, "MOVE=" + iface + " --logout",
		"LOGIN=grep -qx $node /sys/class/iscsi_session/*/ifacename || { " + iface + " -o new >/dev/null; " + iface + " --login; }", "ONLINE=" + online}
	if _, err := runbook(t, gw, "cluster.sh", env...); err == nil {
		t.Error("a disk that nobody reserved is no failure")
	}
	for _, node := range []string{"a", "b"} {
		in(t, g, "set -e; node="+node+"\n"+online)
	}
	gw.kill()
	gw.start()
	within(t, "the sessions' return", func() error {
		_, err := g.Run(t.Context(), "! grep -v LOGGED_IN /sys/class/iscsi_session/*/state")
		return err
	})
	refused(t, gw, "cluster.sh", "not cut over; the disk is online on lunshift again", env...)
	for _, node := range []string{"a", "b"} {
		in(t, g, "set -e; node="+node+"\n"+registered)
	}
	for range 2 {
		if _, err := runbook(t, gw, "cluster.sh", env...); err != nil {
			t.Fatal(err)
		}
	}
	out := in(t, g, "set -e; node=a\n"+disk+"sg_persist -n -i -k $disk; sg_inq $disk; iscsiadm -m session -P 1")
	if !strings.Contains(out, "0x1a") || !strings.Contains(out, "0x1b") || !strings.Contains(out, "IET") || !strings.Contains(out, "Current Portal: 10.0.0.9") || strings.Contains(out, "Current Portal: "+direct) {
		t.Errorf("at the new array: %s", out)
	}
}
