package vm

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	front = "iqn.2026-11.net.example:db01"
	// direct is the portal, recorded the same portal through the recorder.
	direct, recorded = "10.0.0.20", "10.0.0.21"
)

// files is the configuration of a volume between two new files, and its source.
func files(t *testing.T, more string) (volume, source string) {
	t.Helper()
	dir := t.TempDir()
	source = filepath.Join(dir, "source")
	blank(t, source, 256*mib)
	blank(t, filepath.Join(dir, "destination"), 256*mib)
	return fmt.Sprintf("\n[[volume]]\nname = \"db01\"\niqn = %q\nsource = %q\ndestination = %q\n%s",
		front, source, filepath.Join(dir, "destination"), more), source
}

// login is the script that logs in at a portal without discovery and waits for the disk.
func login(portal string, settings ...string) string {
	node := "iscsiadm -m node -T " + front + " -p " + portal
	s := "set -e\n" + node + " -o new >/dev/null\n"
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		s += node + " -o update -n " + name + " -v " + value + "\n"
	}
	return s + node + " --login\n" + diskScript
}

func logout(portal string) string {
	return "iscsiadm -m node -T " + front + " -p " + portal + " --logout\niscsiadm -m node -T " + front + " -p " + portal + " -o delete\n"
}

// TestKilledServiceIsAPauseForAMountedFileSystem: lunshift is killed twice while the host
// writes and the copy runs. The host waits, no write fails, all is there, and the file
// system is clean.
func TestKilledServiceIsAPauseForAMountedFileSystem(t *testing.T) {
	volume, _ := files(t, "copy = { depth = 1, rate = \"8MiB\" }\n"+admit(app1, "10.0.0.30"))
	gw := newGateway(t, volume)
	gw.start()
	g := boot(t)
	in(t, g, login(direct, "node.session.timeo.replacement_timeout=600", "node.conn[0].timeo.noop_out_interval=1",
		"node.conn[0].timeo.noop_out_timeout=2")+`
mkfs.ext4 -q -F $disk
mount $disk /mnt
mkdir /mnt/before; for i in $(seq 1 60); do dd if=/dev/urandom of=/mnt/before/$i bs=1M count=1 2>/dev/null; done
(cd /mnt && md5sum before/* >/sums); sync`)
	gw.run("start", "db01")
	// Each file is on the disk when its sum is on the list.
	in(t, g, `cat >/writer <<'END'
i=0
while [ ! -e /stop ]; do
	i=$((i+1)); f=after$i
	dd if=/dev/urandom of=/mnt/$f bs=64k count=8 conv=fsync 2>/dev/null || { echo "write of $f failed" >>/failed; exit 1; }
	(cd /mnt && md5sum $f) >>/sums.new
	echo $i >/written
done
END
sh /writer </dev/null >/dev/null 2>&1 &`)
	progress := func(than int) int {
		n := 0
		within(t, "progress of the host's writes", func() error {
			fmt.Sscan(in(t, g, "cat /written 2>/dev/null || echo 0"), &n)
			if n <= than {
				return fmt.Errorf("%d files written, %s", n, in(t, g, "cat /failed 2>/dev/null || true"))
			}
			return nil
		})
		return n
	}
	n := progress(3)
	for range 2 {
		gw.kill()
		// Long enough for the host to see the loss and to try again.
		within(t, "the host's notice of the loss", func() error {
			out := in(t, g, "cat /sys/class/iscsi_session/*/state")
			if strings.Contains(out, "LOGGED_IN") {
				return fmt.Errorf("its session is %s", out)
			}
			return nil
		})
		gw.start()
		n = progress(n + 3)
	}
	t.Log(in(t, g, "echo >/stop; while ps | grep -v grep | grep -q 'sh /writer'; do sleep 0.1; done; [ ! -e /failed ] || { cat /failed; exit 1; }; wc -l </sums.new"))
	gw.run("throttle", "db01", "--rate", "0")
	gw.run("wait", "db01", "--for", "synced", "--timeout", "2m")
	in(t, g, `set -e
umount /mnt
`+diskScript+`
e2fsck -fn $disk
/sbin/blockdev --flushbufs $disk
mount -o ro $disk /mnt
cd /mnt && md5sum -c /sums >/dev/null && md5sum -c /sums.new >/dev/null
cd / && umount /mnt
`+logout(direct))
	for line := range strings.Lines(in(t, g, "dmesg")) {
		for _, bad := range []string{"I/O error", "EXT4-fs error", "Sense Key", "recovery timed out"} {
			if strings.Contains(line, bad) {
				t.Errorf("the guest's kernel says: %s", line)
			}
		}
	}
}

// TestKernelFindsASaneDisk: what the kernel and sg3_utils read of a volume is well-formed,
// and trimming a file system gives blocks back.
func TestKernelFindsASaneDisk(t *testing.T) {
	volume, source := files(t, admit(app1, "10.0.0.0/24"))
	gw := newGateway(t, volume)
	gw.start()
	g := boot(t)
	out := in(t, g, "iscsiadm -m discovery -t sendtargets -p "+direct)
	if want := direct + ":3260,1 " + front; strings.TrimSpace(out) != want {
		t.Errorf("discovery finds %q, not %q", strings.TrimSpace(out), want)
	}
	record := startRecorder(t)
	in(t, g, "iscsiadm -m discovery -t sendtargets -p "+recorded+"; iscsiadm -m node -o delete")
	in(t, g, login(recorded))
	for _, script := range []string{
		"sg_inq $disk", "sg_vpd -a $disk", "sg_vpd -p di $disk", "sg_vpd -p bl $disk", "sg_vpd -p lbpv $disk", "sg_luns -v $disk",
		"sg_opcodes -v $disk", "sg_opcodes -R $disk", "sg_opcodes -t $disk", "sg_readcap -l $disk", "sg_modes -a $disk", "sg_turs -v $disk", "sg_requests $disk",
		"sg_get_lba_status -l 0 $disk", "sg_logs -a $disk || true", "sg_persist -i -k $disk", "sg_persist -i -c $disk", "sg_sync $disk",
		"sg_verify --lba=0 --count=8 $disk", "dmesg | grep -E 'sd .*(sda|0:0:0:0)|scsi '",
		"cd /sys/block/$(basename $disk); grep -H . queue/logical_block_size queue/physical_block_size queue/discard_max_bytes queue/discard_granularity queue/write_same_max_bytes queue/write_zeroes_max_bytes queue/write_cache queue/fua queue/optimal_io_size queue/max_sectors_kb device/scsi_disk/*/thin_provisioning device/scsi_disk/*/provisioning_mode",
	} {
		t.Logf("%s\n%s", script, in(t, g, diskScript+script))
	}
	// A write, what gives blocks back, and the SCSI error handler's resets as the host asks for
	// them; then everything else, which is too much to record.
	in(t, g, diskScript+`set -e
dd if=/dev/urandom of=$disk bs=4k count=2 conv=fsync 2>/dev/null
/sbin/blkdiscard -l 64K $disk
/sbin/blkdiscard -z -l 64K $disk
sg_reset -d $disk
sg_reset -t $disk || true
/sbin/blockdev --flushbufs $disk
cmp -n 65536 $disk /dev/zero
`+logout(recorded))
	record.keep("linux-plain")
	in(t, g, login(direct))
	allocated := func() int64 {
		t.Helper()
		return allocatedBytes(t, source)
	}
	in(t, g, diskScript+`set -e
mkfs.ext4 -q -F $disk
mount $disk /mnt
dd if=/dev/urandom of=/mnt/f bs=1M count=64 conv=fsync 2>/dev/null
md5sum /mnt/f >/sum`)
	full := allocated()
	in(t, g, "set -e; md5sum -c /sum; rm /mnt/f; sync; /sbin/fstrim -v /mnt; umount /mnt; sync")
	if trimmed := allocated(); trimmed > full-60*mib {
		t.Errorf("fstrim of 64 MiB leaves %d of %d bytes allocated", trimmed, full)
	}
	in(t, g, diskScript+"set -e; e2fsck -fn $disk; /sbin/blkdiscard $disk; /sbin/blkdiscard -z -l 1M $disk; /sbin/blockdev --flushbufs $disk; cmp -n 1048576 $disk /dev/zero")
	if left := allocated(); left > mib {
		t.Errorf("blkdiscard of the whole disk leaves %d bytes allocated", left)
	}
	in(t, g, logout(direct))
	calm(t, g)
}

// TestLinuxLogsInWithCHAPAndDigests: mutual CHAP, then both digests, through data of every
// size; a wrong secret and another name stay out.
func TestLinuxLogsInWithCHAPAndDigests(t *testing.T) {
	secrets := t.TempDir()
	for name, secret := range map[string]string{"in": "app1-opens-this-door", "out": "gw-proves-who-it-is"} {
		must(t, os.WriteFile(filepath.Join(secrets, name), []byte(secret+"\n"), 0o600))
	}
	volume, _ := files(t, admit(app1, "10.0.0.0/24")+fmt.Sprintf("chap_user = \"app1\"\nchap_secret_file = %q\ntarget_user = \"gw\"\ntarget_secret_file = %q\n",
		filepath.Join(secrets, "in"), filepath.Join(secrets, "out")))
	gw := newGateway(t, volume)
	gw.start()
	g := boot(t)
	chap := []string{"node.session.auth.authmethod=CHAP", "node.session.auth.username=app1", "node.session.auth.password=app1-opens-this-door",
		"node.session.auth.username_in=gw", "node.session.auth.password_in=gw-proves-who-it-is"}
	for _, c := range []struct {
		name  string
		wrong string
	}{{"no CHAP", ""}, {"a wrong secret", "node.session.auth.password=app1-opens-another"}, {"a target with another secret", "node.session.auth.password_in=somebody-else-altogether"}} {
		settings := append(append([]string{}, chap...), c.wrong)
		if c.wrong == "" {
			settings = []string{"node.session.initial_login_retry_max=1"}
		}
		if out, err := g.Run(t.Context(), login(direct, settings...)); err == nil {
			t.Errorf("login with %s: %s", c.name, out)
		}
		in(t, g, "iscsiadm -m node -o delete")
	}
	// What the kernel says of refused logins is no complaint.
	in(t, g, "dmesg -c >/dev/null")
	record := startRecorder(t)
	for _, algorithms := range []string{"MD5", "SHA1", "SHA256", "SHA3-256"} {
		in(t, g, login(recorded, append(chap, "node.session.auth.chap_algs="+algorithms)...)+"\n"+logout(recorded))
	}
	record.keep("linux-chap")
	record = startRecorder(t)
	in(t, g, login(recorded, append(chap, "node.conn[0].iscsi.HeaderDigest=CRC32C", "node.conn[0].iscsi.DataDigest=CRC32C")...)+`
dd if=/dev/urandom of=$disk bs=4k count=2 conv=fsync 2>/dev/null
/sbin/blkdiscard -o 65536 -l 65536 $disk
`+logout(recorded))
	record.keep("linux-digests")
	in(t, g, login(direct, append(chap, "node.conn[0].iscsi.HeaderDigest=CRC32C", "node.conn[0].iscsi.DataDigest=CRC32C")...)+`
dd if=/dev/urandom of=/data bs=1k count=9000 2>/dev/null
dd if=/data of=$disk bs=9216000 count=1 conv=fsync 2>/dev/null
/sbin/blockdev --flushbufs $disk
cmp -n 9216000 /data $disk
iscsiadm -m session -P 2 | grep -E 'Digest|MaxRecv|MaxXmit|Burst|InitialR2T|Immediate'
`+logout(direct)+diskless)
	calm(t, g)
	if log, err := os.ReadFile(filepath.Join(gw.dir, "serve.log")); err != nil || strings.Contains(string(log), "opens-") || strings.Contains(string(log), "proves-") {
		t.Errorf("the log names a secret (%v)", err)
	}
}

// diskless checks that no session is left.
const diskless = `
! ls -d /sys/class/iscsi_session/* 2>/dev/null`

var isid = regexp.MustCompile(`,i,0x([0-9a-f]{12})`)

// TestReservationsOfALinuxHost: a reservation outlives lunshift, with the session that comes
// back by itself. Whether it outlives the host's next login is a matter of its ISID, which
// is shown, where registrations are those of initiator ports, and certain where they are those
// of initiator names.
func TestReservationsOfALinuxHost(t *testing.T) {
	const (
		status = diskScript + "sg_persist -n -i -s $disk; sg_persist -n -i -r $disk\n"
		write  = diskScript + "dd if=/dev/zero of=$disk bs=4k count=1 conv=fsync"
	)
	for _, by := range []string{"initiator-port", "initiator-name"} {
		t.Run(by, func(t *testing.T) {
			volume, _ := files(t, "reservation_by = \""+by+"\"\n"+admit(app1, "10.0.0.0/24"))
			gw := newGateway(t, volume)
			gw.start()
			g := boot(t)
			// Write Exclusive - Registrants Only, kept over a loss of power (APTPL).
			in(t, g, login(direct, "node.session.timeo.replacement_timeout=600")+`
sg_persist -n -o -G -S 0xabc123 -Z $disk
sg_persist -n -o -R -K 0xabc123 -T 5 $disk`)
			t.Logf("at first:\n%s", in(t, g, status))
			gw.kill()
			gw.start()
			within(t, "the session's return", func() error {
				_, err := g.Run(t.Context(), "grep -q LOGGED_IN /sys/class/iscsi_session/*/state")
				return err
			})
			out := in(t, g, status+write)
			t.Logf("after a restart of lunshift:\n%s", out)
			if !strings.Contains(out, "abc123") || !strings.Contains(out, "Write Exclusive, registrants only") {
				t.Error("the reservation did not outlive lunshift")
			}
			node := "iscsiadm -m node -T " + front + " -p " + direct
			known := 1 // ISIDs with a registration
			for _, step := range []struct {
				name string
				do   func()
			}{
				{"another login", func() { in(t, g, node+" --logout; "+node+" --login;"+diskScript) }},
				{"a reboot of the host", func() {
					must(t, g.Kill())
					g = boot(t)
					in(t, g, login(direct))
				}},
			} {
				step.do()
				_, err := g.Run(t.Context(), write)
				// A further registration shows the ISID of now.
				out := in(t, g, diskScript+"sg_persist -n -o -I -S 0xabc124 $disk\n"+status)
				ports := map[string]bool{}
				for _, m := range isid.FindAllStringSubmatch(out, -1) {
					ports[m[1]] = true
				}
				t.Logf("after %s: ISIDs %v, a write ends with %v\n%s", step.name, slices.Sorted(maps.Keys(ports)), err, out)
				switch {
				case by == "initiator-name" && err != nil:
					t.Errorf("the host lost its registration by %s: %v", step.name, err)
				case by == "initiator-port" && (err == nil) != (len(ports) == known):
					t.Errorf("with the ISIDs %v, %d of them known before, a write ends with %v after %s", ports, known, err, step.name)
				}
				known = len(ports)
			}
		})
	}
}
