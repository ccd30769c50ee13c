package e2e

import (
	"bytes"
	bigendian "encoding/binary"
	"fmt"
	"testing"

	"lunshift/iscsi"
	"lunshift/tests/peer"
)

// Reservation types and PERSISTENT RESERVE OUT service actions (SPC-4 6.15.3.4, 6.16.2).
const (
	exclusiveAccess = 3
	register        = 0
	reserve         = 1
	persist         = 0x01 // APTPL
)

// hostOf is a session of an initiator name, past its unit attentions.
func hostOf(t *testing.T, s *service, name string, isid iscsi.ISID) *peer.Session {
	t.Helper()
	l := s.front("v")
	l.Initiator = name
	i, err := l.Login(t.Context(), isid)
	must(t, err)
	t.Cleanup(func() { i.Close() })
	for n := 0; ; n++ {
		a, err := i.Do(make([]byte, 6), nil, 0)
		must(t, err)
		if a.Status == iscsi.StatusGood || n > 5 {
			return i
		}
	}
}

func reserveOut(t *testing.T, i *peer.Session, action, kind byte, key, newKey uint64, flags byte) {
	t.Helper()
	list := make([]byte, 24)
	bigendian.BigEndian.PutUint64(list, key)
	bigendian.BigEndian.PutUint64(list[8:], newKey)
	list[20] = flags
	a, err := i.Do([]byte{0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0}, list, 0)
	must(t, err)
	if a.Status != iscsi.StatusGood {
		t.Fatalf("PERSISTENT RESERVE OUT action %d: %+v", action, a)
	}
}

// fullStatus is READ FULL STATUS without the generation, which begins anew with a start.
func fullStatus(t *testing.T, i *peer.Session) []byte {
	t.Helper()
	a, err := i.Do([]byte{0x5e, 3, 0, 0, 0, 0, 0, 0x10, 0, 0}, nil, 0x1000)
	must(t, err)
	if a.Status != iscsi.StatusGood || len(a.Data) < 8 {
		t.Fatalf("READ FULL STATUS: %+v", a)
	}
	return a.Data[4:]
}

func writeStatus(t *testing.T, i *peer.Session) byte {
	t.Helper()
	a, err := i.Do([]byte{0x2a, 0, 0, 0, 0, 8, 0, 0, 1, 0}, bytes.Repeat([]byte{0x5a}, 512), 0)
	must(t, err)
	return a.Status
}

func TestReservationsOutliveAKilledServiceInEveryPhase(t *testing.T) {
	const nameA, nameB = "iqn.2026-11.net.example:a", "iqn.2026-11.net.example:b"
	for _, byName := range []bool{false, true} {
		t.Run(fmt.Sprintf("by name %v", byName), func(t *testing.T) {
			p := sides{block: 512, sourceFile: true, destinationFile: true, size: 16 * mib}.make(t)
			v := p.volume("v")
			if byName {
				v.more = "reservation_by = \"initiator-name\"\n"
			}
			s := newService(t, v)
			s.start()
			const good, conflict = byte(iscsi.StatusGood), byte(iscsi.StatusReservationConflict)
			var before []byte
			after := func(what string) {
				t.Helper()
				s.kill()
				s.start()
				a, b := hostOf(t, s, nameA, iscsi.ISID{0x80, 1}), hostOf(t, s, nameB, iscsi.ISID{0x80, 2})
				if got := fullStatus(t, b); !bytes.Equal(got, before) {
					t.Errorf("%s: READ FULL STATUS\n%x, was\n%x", what, got, before)
				}
				if got := writeStatus(t, b); got != conflict {
					t.Errorf("%s: another's write: status %02Xh", what, got)
				}
				if got := writeStatus(t, a); got != good {
					t.Errorf("%s: the holder's write: status %02Xh", what, got)
				}
				// An initiator that took another ISID is itself only where its name counts.
				want := conflict
				if byName {
					want = good
				}
				if got := writeStatus(t, hostOf(t, s, nameA, iscsi.ISID{0x80, 9})); got != want {
					t.Errorf("%s: the holder with another ISID: status %02Xh, want %02Xh", what, got, want)
				}
			}
			a, b := hostOf(t, s, nameA, iscsi.ISID{0x80, 1}), hostOf(t, s, nameB, iscsi.ISID{0x80, 2})
			reserveOut(t, a, register, 0, 0, 0xa, persist)
			reserveOut(t, b, register, 0, 0, 0xb, persist)
			reserveOut(t, a, reserve, exclusiveAccess, 0xa, 0, 0)
			before = fullStatus(t, b)
			after("ready")
			s.run("start", "v")
			after("after start")
			s.run("wait", "v", "--for", "synced")
			after("synced")
			s.run("rollback", "v", "--wait", "--timeout", "60s")
			after("rolled-back")
			s.run("start", "v", "--reuse")
			after("after a start anew")

			// Without APTPL a kill is a loss of power.
			a = hostOf(t, s, nameA, iscsi.ISID{0x80, 1})
			reserveOut(t, a, register, 0, 0xa, 0xaa, 0)
			s.kill()
			s.start()
			b = hostOf(t, s, nameB, iscsi.ISID{0x80, 2})
			if got := fullStatus(t, b); len(got) != 4 {
				t.Errorf("without APTPL: READ FULL STATUS %x", got)
			}
			if got := writeStatus(t, b); got != good {
				t.Errorf("without APTPL: status %02Xh", got)
			}
		})
	}
}
