package e2e

import (
	"bytes"
	bigendian "encoding/binary"
	"encoding/hex"
	"os/exec"
	"strings"
	"testing"

	"lunshift/iscsi"
	"lunshift/tests/peer"
)

// path is one way of a host to a logical unit.
type path struct {
	t *testing.T
	l peer.LUN
	s *peer.Session
}

// along logs in and takes what awaits a new initiator.
func along(t *testing.T, l peer.LUN) *path {
	t.Helper()
	s, err := l.Login(t.Context(), iscsi.ISID{0x80, 0, 0, 0, 2, 1})
	must(t, err)
	t.Cleanup(func() { s.Close() })
	p := &path{t, l, s}
	p.attentions()
	return p
}

// attentions are the unit attentions that await the host on the path, as ASC and ASCQ.
func (p *path) attentions() (all []uint16) {
	p.t.Helper()
	for range 8 {
		a, err := p.s.Do(make([]byte, 6), nil, 0)
		must(p.t, err)
		if a.Status == iscsi.StatusGood {
			return all
		}
		if a.Key != 6 {
			p.t.Fatalf("TEST UNIT READY: %+v", a)
		}
		all = append(all, uint16(a.ASC)<<8|uint16(a.ASCQ))
	}
	p.t.Fatal("unit attentions without end")
	return nil
}

// inquiry gives the standard data, or the vital product data page.
func (p *path) inquiry(vpd bool, page byte) []byte {
	p.t.Helper()
	cdb := []byte{0x12, 0, page, 4, 0, 0}
	if vpd {
		cdb[1] = 1
	}
	a, err := p.s.Do(cdb, nil, 1024)
	must(p.t, err)
	if a.Status != iscsi.StatusGood {
		p.t.Fatalf("INQUIRY of page %02Xh: %+v", page, a)
	}
	return a.Data
}

// designators are those of page 83h with the association.
func (p *path) designators(association byte) (all []string) {
	p.t.Helper()
	for d := p.inquiry(true, 0x83)[4:]; len(d) >= 4; d = d[4+int(d[3]):] {
		if d[1]>>4&3 == association {
			all = append(all, string(d[:4+int(d[3])]))
		}
	}
	return all
}

// wwid is what udev's scsi_id makes of page 83h, by which multipath knows which paths are of one
// disk: of the designators of the unit the best, NAA before EUI-64 before T10.
func (p *path) wwid() string {
	p.t.Helper()
	rank := func(d string) int {
		switch kind := d[1] & 0xf; {
		case kind == 3 && d[4]>>4 == 6:
			return 4
		case kind == 3:
			return 3
		case kind == 2:
			return 2
		case kind == 1:
			return 1
		}
		return 0
	}
	best := ""
	for _, d := range p.designators(0) {
		if best == "" || rank(d) > rank(best) {
			best = d
		}
	}
	if best == "" || rank(best) == 0 {
		p.t.Fatalf("no WWID in %x", p.inquiry(true, 0x83))
	}
	if best[1]&0xf == 1 {
		return "1" + best[4:]
	}
	return string('0'+best[1]&0xf) + hex.EncodeToString([]byte(best[4:]))
}

// port is the relative target port of the path, group its target port group.
func (p *path) port() (port, group uint16) {
	p.t.Helper()
	for _, d := range p.designators(1) {
		switch d[1] & 0xf {
		case 4:
			port = bigendian.BigEndian.Uint16([]byte(d[6:8]))
		case 5:
			group = bigendian.BigEndian.Uint16([]byte(d[6:8]))
		}
	}
	return port, group
}

// access is the asymmetric access state of the path, as multipath's alua finds it: that of the
// path's group in REPORT TARGET PORT GROUPS.
func (p *path) access() byte {
	p.t.Helper()
	_, group := p.port()
	a, err := p.s.Do([]byte{0xa3, 0x2a, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0}, nil, 1024)
	must(p.t, err)
	if a.Status != iscsi.StatusGood {
		p.t.Fatalf("REPORT TARGET PORT GROUPS: %+v", a)
	}
	for d := a.Data[8:]; len(d) >= 8; d = d[8+4*int(d[7]):] {
		if bigendian.BigEndian.Uint16(d[2:]) == group {
			return d[0] & 0xf
		}
	}
	p.t.Fatalf("group %04Xh is not in % x", group, a.Data)
	return 0
}

const (
	optimized    = 0
	nonOptimized = 1
	unavailable  = 3
)

// sameDisk wants both paths to be of one disk for a host, and of two ports.
func sameDisk(t *testing.T, volume, array *path) {
	t.Helper()
	if a, b := volume.inquiry(false, 0), array.inquiry(false, 0); !bytes.Equal(a[8:36], b[8:36]) {
		t.Errorf("vendor, product and revision: %q, not %q", a[8:36], b[8:36])
	}
	if a, b := volume.inquiry(true, 0x80), array.inquiry(true, 0x80); !bytes.Equal(a, b) {
		t.Errorf("serial number: %q, not %q", a, b)
	}
	a, b := volume.designators(0), array.designators(0)
	if strings.Join(a, "") != strings.Join(b, "") || len(b) < 2 {
		t.Errorf("designators: %q, not %q", a, b)
	}
	if a, b := volume.wwid(), array.wwid(); a != b {
		t.Errorf("WWID: %s, not %s", a, b)
	}
	port, group := volume.port()
	if otherPort, otherGroup := array.port(); port == otherPort || group == otherGroup || port < 0x8000 || group != 0x4c53 { // as documented
		t.Errorf("both are port %04Xh of group %04Xh", port, group)
	}
	// And by a client of somebody else.
	said := func(l peer.LUN, page string) string {
		out, err := exec.CommandContext(t.Context(), "iscsi-inq", "-i", l.Initiator, "-e", "1", "-c", page, l.URL()).CombinedOutput()
		if err != nil {
			t.Fatalf("iscsi-inq: %v\n%s", err, out)
		}
		return string(out)
	}
	if a, b := said(volume.l, "128"), said(array.l, "128"); a != b {
		t.Errorf("iscsi-inq of page 80h:\n%s\nnot\n%s", a, b)
	}
	units := func(text string) string {
		var kept []string
		for _, block := range strings.Split(text, "DEVICE DESIGNATOR") {
			if _, rest, _ := strings.Cut(block, "\n"); strings.Contains(rest, "LOGICAL_UNIT") {
				kept = append(kept, strings.TrimSpace(rest)) // but for its number in the whole list
			}
		}
		return strings.Join(kept, "\n")
	}
	if a, b := units(said(volume.l, "131")), units(said(array.l, "131")); a != b || a == "" {
		t.Errorf("iscsi-inq of page 83h:\n%s\nnot\n%s", a, b)
	}
}

// TestVolumeIsOneMorePathOfTheOldLUN: a host that has the old LUN gets the volume as another
// path of the same disk, not preferred, reads over either what it wrote over the other, gives
// the old path up and starts, with nothing stopping. Caught: own designators in page 83h; the
// group of the array; no unit attention at the start; states exchanged.
func TestVolumeIsOneMorePathOfTheOldLUN(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 8 * mib}.make(t)
	v := p.volume("db01")
	v.more = "identity = \"source\"\nlogout_timeout = \"1s\"\n"
	s := newService(t, v)
	s.start()
	old, over := along(t, p.old.unit(1)), along(t, s.front("db01"))
	sameDisk(t, over, old)
	if got := over.access(); got != nonOptimized {
		t.Errorf("ready: state %d", got)
	}
	m := newModel(t, p.sourcePath, 512)
	m.write(0x11, 0, 64*kib)
	m.write(0x22, 64*kib, 64*kib)
	for n, x := range []struct{ to, from peer.LUN }{{old.l, over.l}, {over.l, old.l}} {
		pattern, offset := byte(0x11*(n+1)), uint64(n*64*kib)
		if out, err := x.to.QemuIO(t.Context(), peer.Write(pattern, offset, 64*kib)); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if out, err := x.from.QemuIO(t.Context(), peer.Read(pattern, offset, 64*kib)); err != nil {
			t.Errorf("read over the other path: %v\n%s", err, out)
		}
	}
	s.kill()
	s.start() // the state tells it again
	over = along(t, s.front("db01"))
	sameDisk(t, over, old)
	if got := over.access(); got != nonOptimized {
		t.Errorf("ready after a restart: state %d", got)
	}

	must(t, old.s.Close())
	s.run("start", "db01")
	if got := over.attentions(); len(got) != 1 || got[0] != 0x2a06 {
		t.Errorf("at the start the host is told %04X", got)
	}
	if got := over.access(); got != optimized {
		t.Errorf("migrating: state %d", got)
	}
	s.run("wait", "db01", "--for", "synced")
	if got := over.access(); got != optimized {
		t.Errorf("synced: state %d", got)
	}
	sameDisk(t, over, along(t, p.old.unit(1)))
	s.run("cutover", "db01", "--force")
	m.sameAs(p.destinationPath)
}

// TestVolumeIsOneMorePathOfTheNewLUN: after the cutover a host goes on over the new array's own
// paths to what is the same disk for it.
func TestVolumeIsOneMorePathOfTheNewLUN(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 8 * mib}.make(t)
	v, beside := p.volume("db01"), sides{block: 512, sourceThin: true, destinationThin: true, size: 8 * mib}.make(t).volume("db02")
	v.more = "identity = \"destination\"\n"
	beside.iqn, beside.lun = frontIQN("db01"), 1 // keeps the session
	s := newService(t, v, beside)
	s.start()
	over := along(t, s.front("db01"))
	sameDisk(t, over, along(t, p.new.unit(1)))
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced")
	if got, told := over.access(), over.attentions(); got != optimized || len(told) != 0 {
		t.Errorf("synced: state %d, told %04X", got, told)
	}
	s.run("cutover", "db01")
	a, err := over.s.Do(make([]byte, 6), nil, 0)
	must(t, err)
	if a.Key != 6 || a.ASC != 0x2a || a.ASCQ != 0x06 {
		t.Errorf("at the cutover: %+v", a)
	}
	if a, err = over.s.Do(make([]byte, 6), nil, 0); err != nil || a.Key != 2 || a.ASC != 0x04 || a.ASCQ != 0x0c {
		t.Errorf("after the cutover: %+v, %v", a, err)
	}
	// The way is free by the time it is shown.
	if out, err := p.new.unit(1).QemuIO(t.Context(), peer.Write(0x33, 0, 4*kib)); err != nil {
		t.Errorf("write to the new array: %v\n%s", err, out)
	}
}

// TestIdentityThatIsNoneIsRefused: a file has no identity to lend, and check warns of what
// hosts must not do with one.
func TestIdentityThatIsNoneIsRefused(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 8 * mib}.make(t)
	v := p.volume("db01")
	v.destination = emptyFile(t, t.TempDir(), "new.img", 8*mib)
	v.more = "identity = \"destination\"\n"
	s := newService(t, v)
	words := []string{`volume db01: identity = "destination", but the destination has none`}
	if r := s.try("check"); r.code == done || !strings.Contains(r.stdout, words[0]) {
		t.Errorf("check: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := s.try("serve"); r.code == done || !strings.Contains(r.stderr, words[0]) {
		t.Errorf("serve: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	s.volumes[0].more = "identity = \"source\"\n"
	s.configure()
	r := s.try("check")
	if r.code != done || !strings.Contains(r.stdout, "before the start take the array's own paths away") || !strings.Contains(r.stdout, "reservations on the array's own paths do not hold") {
		t.Errorf("check: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	s.start()
	// Taken back while nothing is moved: hosts are told.
	over := along(t, s.front("db01"))
	s.volumes[0].more = ""
	s.configure()
	s.run("reload")
	if got := over.attentions(); len(got) != 2 || got[0] != 0x3f03 || got[1] != 0x2a06 {
		t.Errorf("at the reload the host is told %04X", got)
	}
	if b := over.inquiry(false, 0); string(b[8:16]) != "LUNSHIFT" {
		t.Errorf("after it: %q", b[8:36])
	}
	s.volumes[0].more = "identity = \"source\"\n"
	s.configure()
	s.run("reload")
	s.run("start", "db01")
	s.volumes[0].more = ""
	s.configure()
	if r := s.try("reload"); r.code == done || !strings.Contains(r.stdout+r.stderr, "which initiators keep until it is over") {
		t.Errorf("reload in mid-migration: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
