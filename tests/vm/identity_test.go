package vm

import (
	"regexp"
	"strings"
	"testing"
)

// TestLinuxTakesTheVolumeForAPathOfTheOldLUN: over the array's portal and over lunshift's the
// kernel finds disks of one WWID and serial number, by which udev and multipath put them
// together, in two target port groups; sg_rtpg finds the volume's path not preferred before
// the start and optimized after it; and the host writes on over that alone.
func TestLinuxTakesTheVolumeForAPathOfTheOldLUN(t *testing.T) {
	const old, next = "iqn.2001-04.com.example:old", "iqn.2001-04.com.example:new"
	array(t, "10.0.0.5", old, 64*mib)
	array(t, "10.0.0.9", next, 64*mib)
	gw := newGateway(t, `
[[volume]]
name = "db01"
iqn = "`+front+`"
source = "iscsi://10.0.0.5/`+old+`/1"
destination = "iscsi://10.0.0.9/`+next+`/1"
identity = "source"
`+admit(app1, "10.0.0.0/24"))
	gw.start()
	g := boot(t)
	// What tells a disk, by a path: the WWID and serial number as the kernel read them.
	const names = `
names() {
	d=/sys/block/$(basename $disk)/device
	cat $d/wwid $d/vendor $d/model $d/rev
	od -An -tx1 -v $d/vpd_pg80
}
`
	in(t, g, `set -e
iscsiadm -m node -T `+old+` -p 10.0.0.5 -o new >/dev/null
iscsiadm -m node -T `+old+` -p 10.0.0.5 --login
`+diskScript+names+`
names >/array
sg_vpd -p di $disk | sed -n '/Addressed logical unit/,/Target port/p' | grep -v 'Target port' >/array.di
dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null
dd if=/data of=$disk bs=1M conv=fsync 2>/dev/null
iscsiadm -m node -T `+old+` -p 10.0.0.5 --logout
iscsiadm -m node -T `+old+` -p 10.0.0.5 -o delete`)
	states := regexp.MustCompile(`asymmetric access state\s*:\s*(0x[0-9a-f]+)`)
	found := func(want string) {
		t.Helper()
		out := in(t, g, diskScript+"sg_rtpg -d $disk; sg_rtpg -e -d $disk")
		got := states.FindAllStringSubmatch(out, -1)
		if len(got) != 2 || got[0][1] != want || got[1][1] != want || !strings.Contains(out, "0x4c53") {
			t.Errorf("sg_rtpg, for state %s:\n%s", want, out)
		}
	}
	out := in(t, g, login(direct)+names+`
set -e
names >/volume
sg_vpd -p di $disk | sed -n '/Addressed logical unit/,/Target port/p' | grep -v 'Target port' >/volume.di
cat /volume /volume.di
diff /array /volume
diff /array.di /volume.di
cmp -n 4194304 /data $disk
sg_inq $disk | grep -o 'TPGS=.'`)
	t.Log(out)
	if !strings.Contains(out, "TPGS=1") || !strings.Contains(out, "naa.") && !strings.Contains(out, "t10.") {
		t.Errorf("the guest finds\n%s", out)
	}
	found("0x01")
	gw.run("start", "db01")
	gw.run("wait", "db01", "--for", "synced", "--timeout", "2m")
	if out := in(t, g, diskScript+"sg_turs -v $disk 2>&1 || true"); !strings.Contains(out, "Asymmetric access state changed") {
		t.Errorf("after the start the host is told\n%s", out)
	}
	found("0x00")
	in(t, g, diskScript+names+`
set -e
dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null
dd if=/data of=$disk bs=1M conv=fsync 2>/dev/null
/sbin/blockdev --flushbufs $disk
cmp -n 4194304 /data $disk
names >/volume
diff /array /volume
`+logout(direct))
}
