package control

import (
	"strings"
	"testing"

	"lunshift/lun"
)

func TestUnitsThatNobodyIsKeptAwayFromAreWarnedOf(t *testing.T) {
	for _, c := range []struct {
		id    string
		means string
		want  string
	}{
		{"naa.60", "none", "source has no persistent reservations"},
		{"block:8:0", "lock", "source is a block device"},
		{"naa.60", "lock", "source is a block device"},
		{"file:1:2", "lock", ""},
		{"naa.60", "reservations", ""},
		{"", "", ""}, // not open
	} {
		r := VolumeReport{Name: "db01", Source: UnitReport{ID: c.id, Fence: FenceReport{Means: c.means}}}
		r.warnFences()
		got := strings.Join(r.Warnings, "; ")
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s, %s: %q, want %q", c.id, c.means, got, c.want)
		}
	}
}

func TestFenceReportTellsOursFromOthers(t *testing.T) {
	held := lun.Reservations{Type: 5, Key: 0xa, Registrants: []lun.Registrant{{Key: 0xa, Port: "iqn.a,i,0x1", Holder: true}, {Key: 0xb}}}
	ours, theirs := fenceReport(held, 0xa), fenceReport(held, 0xb)
	if !ours.Own || len(ours.Others) != 1 || ours.Others[0].Key != "0x000000000000000b" {
		t.Errorf("%+v", ours)
	}
	if theirs.Own || len(theirs.Others) != 1 || theirs.Others[0].Initiator != "iqn.a,i,0x1" || !strings.Contains(theirs.Holder, "iqn.a,i,0x1") {
		t.Errorf("%+v", theirs)
	}
}
