package target

import (
	"io"
	"testing"

	"lunshift/iscsi"
)

// exchange makes a function that sends one command and takes its answer without
// allocating.
func exchange(t testing.TB, i *initiator, cdb []byte, flags byte, out []byte, in int) func() {
	h := i.command(cdb, flags|iscsi.FlagFinal, max(len(out), in))
	i.cmdSN-- // each run takes the next
	h.SetDataLength(len(out))
	pdu := append(append([]byte{}, h[:]...), out...)
	head := (*iscsi.BHS)(pdu)
	answer := make([]byte, iscsi.BHSLength+in)
	return func() {
		head.SetCmdSN(i.cmdSN)
		i.cmdSN++
		if _, err := i.nc.Write(pdu); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(i.nc, answer); err != nil {
			t.Fatal(err)
		}
		if (*iscsi.BHS)(answer).Status() != 0 {
			t.Fatal("not GOOD")
		}
	}
}

func TestSmallReadsAndWritesDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	m := newMemory(512, 1024)
	for name, u := range map[string]Unit{"at once": {IQN: iqn, Device: quick{m}}, "by a worker": {IQN: iqn, Device: m}} {
		_, addr := begin(t, Config{}, u)
		for _, what := range []string{"read", "write"} {
			i := login(t, addr, loginOptions{})
			f := exchange(t, i, rw16(0x88, 0, 8), iscsi.FlagRead, nil, 4096)
			if what == "write" {
				i = login(t, addr, loginOptions{})
				f = exchange(t, i, rw16(0x8a, 0, 8), iscsi.FlagWrite, make([]byte, 4096), 0)
			}
			for range 100 {
				f()
			}
			if n := testing.AllocsPerRun(2000, f); n > 0 {
				t.Errorf("a 4 KiB %s %s allocates %.2f times", what, name, n)
			}
		}
	}
}

func BenchmarkRead4K(b *testing.B) {
	_, addr := begin(b, Config{}, Unit{IQN: iqn, Device: quick{newMemory(512, 1024)}})
	f := exchange(b, login(b, addr, loginOptions{}), rw16(0x88, 0, 8), iscsi.FlagRead, nil, 4096)
	b.ReportAllocs()
	for b.Loop() {
		f()
	}
}
