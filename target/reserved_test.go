package target

import (
	"slices"
	"testing"

	"lunshift/iscsi"
)

// What is reserved is told by the names of the initiators. Caught: registrants taken for holders; a
// name once for each of its ports; the RESERVE of SPC-2 left out; what was released told still.
func TestReservationsAreToldByName(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	again := login(t, addr, loginOptions{name: nameA, isid: iscsi.ISID{0x80, 9}})
	wants := func(what, kind, text string, holders, registered []string) {
		t.Helper()
		info, err := s.Reservation(iqn, 0)
		slices.Sort(info.Registered)
		slices.Sort(info.Holders)
		if err != nil || info.Type != kind || !slices.Equal(info.Holders, holders) || !slices.Equal(info.Registered, registered) || info.String() != text {
			t.Errorf("%s: %v, %+v, %q", what, err, info, info)
		}
		if info.Holders == nil || info.Registered == nil {
			t.Errorf("%s: a list is null in JSON", what)
		}
	}
	wants("nothing", "", "", nil, nil)
	a.pr(prRegister, 0, 0, 1, 0)
	wants("registered", "", "none; registered: "+nameA, nil, []string{nameA})
	again.pr(prRegister, 0, 0, 1, 0)
	b.pr(prRegister, 0, 0, 2, 0)
	a.pr(prReserve, typeWriteRegistrantsOnly, 1, 0, 0)
	wants("reserved", "Write Exclusive – Registrants Only", "Write Exclusive – Registrants Only, held by "+nameA, []string{nameA}, []string{nameA, nameB})
	a.pr(prRelease, typeWriteRegistrantsOnly, 1, 0, 0)
	b.wants("who was registered", b.do(tur, nil, 0), attnReservationsReleased)
	b.pr(prReserve, typeAccessAllRegistrants, 2, 0, 0)
	wants("of all", "Exclusive Access – All Registrants", "Exclusive Access – All Registrants, held by "+nameA+", "+nameB, []string{nameA, nameB}, []string{nameA, nameB})
	b.pr(prClear, 0, 2, 0, 0)
	wants("cleared", "", "", nil, nil)
	b.good([]byte{0x16, 0, 0, 0, 0, 0}, nil, 0)
	wants("RESERVE", "RESERVE", "RESERVE, held by "+nameB, []string{nameB}, nil)
	if _, err := s.Reservation(iqn, 1); err == nil {
		t.Error("there is no LUN 1")
	}
}
