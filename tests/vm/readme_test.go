package vm

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// readmeLine is one command of README.md: where it runs, and what.
type readmeLine struct{ where, command string }

// readmeLines are the commands of the section, from its heading to the next one.
func readmeLines(t *testing.T, heading string) []readmeLine {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	must(t, err)
	_, section, found := strings.Cut(string(b), "\n### "+heading+"\n")
	if !found {
		t.Fatalf("README.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n#")
	section = strings.ReplaceAll(section, "\\\n", " ")
	var lines []readmeLine
	for line := range strings.Lines(section) {
		for _, where := range []string{"app1", "gw"} {
			if command, ok := strings.CutPrefix(line, where+"#"); ok {
				command, _, _ = strings.Cut(command, "  #")
				lines = append(lines, readmeLine{where, strings.TrimSpace(command)})
			}
		}
	}
	if len(lines) == 0 {
		t.Fatalf("section %q of README.md has no commands", heading)
	}
	return lines
}

// TestReadmeMovesAMountedFileSystem runs the commands of README.md as they are written, from
// the host's move to lunshift to its move to the new array.
func TestReadmeMovesAMountedFileSystem(t *testing.T) {
	const old, new = "iqn.2001-04.com.example:old", "iqn.2001-04.com.example:new"
	array(t, "10.0.0.5", old, 256*mib)
	array(t, "10.0.0.9", new, 256*mib)
	gw := newGateway(t, `
[[volume]]
name = "db01"
iqn = "iqn.2026-11.net.example:db01"
source = "iscsi://10.0.0.5/iqn.2001-04.com.example:old/1"
destination = "iscsi://10.0.0.9/iqn.2001-04.com.example:new/1"
`+admit(app1, "10.0.0.0/24"))
	g := boot(t)

	// The host as it was before: logged in to the old array, with a database on it.
	in(t, g, `set -e
printf '#!/bin/sh\nexit 0\n' >/sbin/systemctl && chmod 755 /sbin/systemctl
iscsiadm -m discovery -t sendtargets -p 10.0.0.5
iscsiadm -m node -T `+old+` -p 10.0.0.5 --login
`+diskScript+`
mkfs.ext4 -q -F -L db $disk
mkdir -p /srv/db
echo "LABEL=db /srv/db ext4 defaults 0 0" >>/etc/fstab
mount /srv/db
seq 1 200000 >/srv/db/rows; md5sum /srv/db/rows >/srv/db/sum`)

	gw.run("check")
	for _, section := range []string{"4. Move the host to lunshift", "5. Copy", "6. Cut over"} {
		for _, line := range readmeLines(t, section) {
			t.Logf("%s# %s", line.where, line.command)
			switch {
			case line.where == "app1":
				in(t, g, line.command)
			case strings.HasPrefix(line.command, "systemctl"):
				gw.start()
			case strings.HasSuffix(line.command, "--watch"):
				gw.run("status", "db01")
			default:
				args, ok := strings.CutPrefix(line.command, "lunshift ")
				if !ok {
					t.Fatalf("README.md has gw# %s", line.command)
				}
				gw.run(strings.Fields(args)...)
			}
		}
		if strings.HasPrefix(section, "5") {
			in(t, g, "set -e; seq 1 100000 >/srv/db/later; md5sum /srv/db/later >>/srv/db/sum; sync")
		}
	}
	t.Log(in(t, g, `set -e
iscsiadm -m session
md5sum -c /srv/db/sum
umount /srv/db
`+diskScript+`
e2fsck -fn $disk`))
	// The old disk goes away after the cutover, when there is nobody to flush it; the host had
	// unmounted it before.
	calm(t, g, "Synchronize Cache(10) failed")
}

// diskScript sets $disk to the only iSCSI disk, once it is there.
const diskScript = `
n=0; until ls /sys/class/iscsi_session/*/device/target*/*/block/* >/dev/null 2>&1; do
	n=$((n+1)); [ $n -lt 300 ] || { echo "no disk appeared"; dmesg | tail -20; exit 1; }; sleep 0.1
done
disk=/dev/$(ls /sys/class/iscsi_session/*/device/target*/*/block | grep -m1 '^sd')
`

// admit is the configuration of an initiator of the volume before it.
func admit(name, networks string) string {
	return fmt.Sprintf("[[volume.initiator]]\nname = %q\nnetworks = [%q]\n", name, networks)
}
