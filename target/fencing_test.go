package target

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
)

// stubborn is a device that holds its first read or write until release is closed, and
// then does it whether it was cancelled or not.
type stubborn struct {
	*memory
	reads          bool
	once           sync.Once
	began, release chan struct{}
	letGo          func()          // closes release
	of             context.Context // what it holds, once began is closed
}

func newStubborn(reads bool) *stubborn {
	s := &stubborn{memory: newMemory(512, 8192), reads: reads, began: make(chan struct{}), release: make(chan struct{})}
	s.letGo = sync.OnceFunc(func() { close(s.release) })
	return s
}

func (s *stubborn) hold(ctx context.Context) {
	s.once.Do(func() {
		s.of = ctx
		close(s.began)
		<-s.release
	})
}

func (s *stubborn) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	if s.reads {
		s.hold(ctx)
	}
	return s.memory.ReadAt(context.Background(), p, start)
}

func (s *stubborn) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	if !s.reads {
		s.hold(ctx)
	}
	return s.memory.WriteAt(context.Background(), p, start)
}

const chunkBlocks = copyChunk / 512

// beginCopy starts a copy of three chunks from LUN 0, to which it is sent, to LUN 1. What
// it gives finishes it.
func beginCopy(i *initiator) (finish func() result) {
	l := &copyList{id: 7}
	l.unit(naaA, 512)
	l.unit(naaB, 512)
	l.segment(0, 1, 3*chunkBlocks, 0, 0)
	list := l.bytes()
	i.lun = 0
	h := i.command(copyCDB(len(list)), iscsi.FlagWrite, len(list))
	i.start(h, list)
	return func() result { return i.finish(h.ITT(), list) }
}

// A copy is sent to one unit and writes another: who fences or resets that one need not
// even see the first.
func TestFencingAUnitEndsCopiesIntoIt(t *testing.T) {
	for _, reads := range []bool{true, false} {
		for _, f := range []byte{0, iscsi.TMFLUNReset, iscsi.TMFTargetWarmReset} {
			name := "PREEMPT AND ABORT"
			if f != 0 {
				name = tmfName(f)
			}
			t.Run(name+map[bool]string{true: ", reading", false: ", writing"}[reads], func(t *testing.T) {
				src, dst := newStubborn(true), newStubborn(false)
				held := dst
				if reads {
					held = src
				}
				for _, d := range []*stubborn{src, dst} {
					if d != held {
						d.once.Do(func() {})
					}
				}
				copy(src.data, bytes.Repeat(pattern(512, 9), 3*chunkBlocks))
				_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: src, NAA: naaA, Initiators: []Initiator{{Name: nameA}}},
					Unit{IQN: iqn, LUN: 1, Device: dst, NAA: naaB})
				t.Cleanup(held.letGo) // before the server is closed
				a, b := host(t, addr, nameA), host(t, addr, nameB)
				a.lun, b.lun = 1, 1
				a.do(tur, nil, 0)
				b.do(tur, nil, 0)
				a.pr(prRegister, 0, 0, 0xa, 0)
				b.pr(prRegister, 0, 0, 0xb, 0)
				a.pr(prReserve, typeWriteRegistrantsOnly, 0xa, 0, 0)
				beginCopy(a)
				<-held.began
				cancelled := held.of.Done() // the task is another's once it has ended
				list := prList(0xb, 0xa, 0)
				var tag uint32
				if f == 0 {
					h := b.command(prOutCDB(prPreemptAbort, typeWriteRegistrantsOnly, len(list)), iscsi.FlagWrite, len(list))
					b.start(h, list)
					tag = h.ITT()
				} else {
					tag = b.tmf(f, iscsi.NoTag)
				}
				select {
				case <-cancelled:
				case <-time.After(30 * time.Second):
					t.Fatal("the copy is not cancelled")
				}
				b.ping() // comes back before it: the copy has not ended
				held.letGo()
				if f == 0 {
					b.wants(name, b.finish(tag, list), good)
				} else if p := b.recv(); p.ITT() != tag || p.Response() != iscsi.TMFComplete {
					t.Fatalf("%s: %v, response %d", name, p.Opcode(), p.Response())
				}
				left := dst.bytes()
				if bytes.Equal(left[chunkBlocks*512:][:512], pattern(512, 9)) {
					t.Error("the copy went on behind the chunk it was at")
				}
				a.wants("whose copy was cleared", a.do(tur, nil, 0), attnCleared)
				a.wants("the unit it was sent to", a.do(tur, nil, 0), good)
				if !bytes.Equal(dst.bytes(), left) {
					t.Error("something was written after the answer")
				}
			})
		}
	}
}

func TestReservationTakenDuringACopyEndsItAtTheNextChunk(t *testing.T) {
	src, dst := newStubborn(true), newMemory(512, 8192)
	copy(src.data, bytes.Repeat(pattern(512, 9), 3*chunkBlocks))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: src, NAA: naaA}, Unit{IQN: iqn, LUN: 1, Device: dst, NAA: naaB})
	t.Cleanup(src.letGo)
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	b.lun = 1
	b.do(tur, nil, 0)
	finish := beginCopy(a)
	<-src.began
	b.pr(prRegister, 0, 0, 0xb, 0)
	b.pr(prReserve, typeWriteExclusive, 0xb, 0, 0)
	src.letGo()
	r := finish()
	if !r.is(sense{keyCopyAborted, copyDeviceFailure[0], copyDeviceFailure[1]}) || r.sense[9] == 0 || r.sense[r.sense[9]] != conflict {
		t.Errorf("the copy: %v, sense data %x", r, r.sense)
	}
	if got := dst.bytes(); !bytes.Equal(got[:512], pattern(512, 9)) || bytes.Equal(got[copyChunk:][:512], pattern(512, 9)) {
		t.Error("the chunk that had begun is not there, or one more is")
	}
}

func TestReserveKeepsOutARegisterWhoseDataIsOnItsWay(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := login(t, addr, loginOptions{name: nameA, isid: isidOf(nameA), want: func(p *iscsi.Params) { p.InitialR2T, p.ImmediateData = true, false }})
	b := host(t, addr, nameB)
	list := prList(0, 0xa, 0)
	h := a.command(prOutCDB(prRegister, 0, len(list)), iscsi.FlagWrite|iscsi.FlagFinal, len(list))
	a.send(h, nil)
	r2t := a.recv()
	b.wants("RESERVE", b.do([]byte{0x16, 0, 0, 0, 0, 0}, nil, 0), good)
	a.dataOut(h, r2t.TTT(), list, 0, len(list))
	a.wants("REGISTER", a.finish(h.ITT(), list), conflict)
	b.wants("RELEASE", b.do([]byte{0x17, 0, 0, 0, 0, 0}, nil, 0), good)
	if gen, keys := a.keys(); gen != 0 || len(keys) != 0 {
		t.Errorf("generation %d, keys %x", gen, keys)
	}
	a.pr(prRegister, 0, 0, 0xa, 0)
}
