package lun

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}

func roundTrip(t *testing.T, dev Device, n int) {
	t.Helper()
	want, got := pattern(n), make([]byte, n)
	if err := dev.WriteAt(t.Context(), want, 5); err != nil {
		t.Fatal(err)
	}
	if err := dev.ReadAt(t.Context(), got, 5); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("what was read is not what was written")
	}
}

func TestDataGoesOutAsNegotiated(t *testing.T) {
	for _, initialR2T := range []bool{false, true} {
		for _, immediate := range []bool{false, true} {
			f := newFakeTarget(t)
			f.want.InitialR2T, f.want.ImmediateData = initialR2T, immediate
			f.want.FirstBurstLength, f.want.MaxBurstLength = 20000, 70000
			f.r2t = 17000
			dev := f.open(Options{})
			for _, n := range []int{512, 8192, 20480, 100 << 10, 1 << 20} {
				roundTrip(t, dev, n)
			}
		}
	}
}

func TestCommandWindowIsRespected(t *testing.T) {
	f := newFakeTarget(t)
	f.window = 1
	dev := f.open(Options{})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			p := make([]byte, 512)
			for range 20 {
				if err := dev.ReadAt(t.Context(), p, LBA(w)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestBusyDeviceAndUnitAttentionAreBorne(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	trouble := []func(c *fakeConn, h *iscsi.BHS){
		func(c *fakeConn, h *iscsi.BHS) { c.status(h, statusBusy) },
		func(c *fakeConn, h *iscsi.BHS) { c.status(h, statusTaskSetFull) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseUnitAttention, 0x29, 0) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseUnitAttention, 0x3f, 0x0e) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseAborted, 0x47, 0) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseNotReady, 0x04, 0x01) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseNotReady, 0x04, 0x00) },
		func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseNotReady, 0x04, 0x0b) },
		func(c *fakeConn, h *iscsi.BHS) { c.status(h, statusTaskAborted) },
	}
	var n atomic.Int32
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand {
			return false
		}
		if i := int(n.Add(1)) - 1; i < len(trouble) {
			trouble[i](c, h)
			return true
		}
		return false
	})
	roundTrip(t, dev, 512)
	if n.Load() != int32(len(trouble)+2) {
		t.Fatalf("%d commands came", n.Load())
	}
}

func TestErrorsOfTheDeviceReachTheCaller(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	var answer atomic.Pointer[func(c *fakeConn, h *iscsi.BHS)]
	with := func(a func(c *fakeConn, h *iscsi.BHS)) { answer.Store(&a) }
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand {
			return false
		}
		(*answer.Load())(c, h)
		return true
	})
	p := make([]byte, 512)
	with(func(c *fakeConn, h *iscsi.BHS) { c.check(h, senseMediumError, 0x11, 0) })
	var sense *SenseError
	if err := dev.ReadAt(t.Context(), p, 0); !errors.As(err, &sense) || sense.Key != senseMediumError || sense.ASC != 0x11 {
		t.Errorf("want MEDIUM ERROR, got %v", err)
	}
	with(func(c *fakeConn, h *iscsi.BHS) { c.status(h, statusReservationConflict) })
	if err := dev.WriteAt(t.Context(), p, 0); !errors.Is(err, ErrConflict) {
		t.Errorf("want ErrConflict, got %v", err)
	}
	with(func(c *fakeConn, h *iscsi.BHS) { c.good(h) })
	if err := dev.ReadAt(t.Context(), p, 0); err == nil {
		t.Error("GOOD without data was taken for a read")
	}
	with(func(c *fakeConn, h *iscsi.BHS) { c.in(h, p[:200]) })
	if err := dev.ReadAt(t.Context(), p, 0); err == nil {
		t.Error("a short answer was taken for a read")
	}
	with(func(c *fakeConn, h *iscsi.BHS) { c.good(h) }) // without asking for the rest
	if err := dev.WriteAt(t.Context(), make([]byte, 64<<10), 0); err == nil {
		t.Error("GOOD for data that was never asked for was taken for a write")
	}
}

func TestLostConnectionIsReplayedOnAReinstatedSession(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	var n atomic.Int32
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opWrite16 && n.Add(1) <= 3 {
			c.nc.Close() // the answer never comes
			return true
		}
		return false
	})
	roundTrip(t, dev, 4096)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.logins) != 4 {
		t.Fatalf("%d logins, want 4", len(f.logins))
	}
	for _, isid := range f.logins {
		if isid != f.logins[0] {
			t.Fatalf("ISID changed from %v to %v: the old session is not reinstated", f.logins[0], isid)
		}
	}
}

func TestAnotherLogicalUnitIsNotTakenForTheLostOne(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{IOTimeout: 300 * time.Millisecond})
	f.drop()
	f.mu.Lock()
	f.designator = 2
	f.mu.Unlock()
	if err := dev.WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("want ErrUnavailable, got %v", err)
	}
	f.mu.Lock()
	f.designator = 1
	f.mu.Unlock()
	for deadline := time.Now().Add(5 * time.Second); ; {
		if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestCancelledCommandIsAbortedAtTheTarget(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	aborted := make(chan uint32, 1)
	var silent atomic.Uint32
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		switch h.Opcode() {
		case iscsi.OpSCSICommand:
			if h.CDB()[0] == opWrite16 {
				silent.Store(h.ITT())
				return true
			}
		case iscsi.OpTaskMgmt:
			if h.Function() != iscsi.TMFAbortTask {
				t.Errorf("function %d", h.Function())
			}
			aborted <- h.TTT()
		}
		return false
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := dev.WriteAt(ctx, make([]byte, 64<<10), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("want the context's error, got %v", err)
	}
	if took := time.Since(began); took > abortWait/2 {
		t.Errorf("it took %v", took)
	}
	if itt := <-aborted; itt != silent.Load() {
		t.Errorf("task %08Xh was aborted, not %08Xh", itt, silent.Load())
	}
	if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.logins) != 1 {
		t.Error("the connection was dropped")
	}
}

func TestTargetThatNeverAnswersAnAbortIsLeft(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{PingInterval: 50 * time.Millisecond})
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		return h.Opcode() == iscsi.OpTaskMgmt || h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := dev.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("want the context's error, got %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		n := len(f.logins)
		f.mu.Unlock()
		if n > 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no new login")
		}
	}
}

func TestPingOfTheTargetIsAnswered(t *testing.T) {
	f := newFakeTarget(t)
	echo := make(chan string, 1)
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() == iscsi.OpNopOut && h.ITT() == iscsi.NoTag {
			if h.TTT() != 77 || !h.Immediate() {
				t.Errorf("answer %v", h)
			}
			echo <- string(data)
			return true
		}
		return false
	})
	dev := f.open(Options{})
	f.mu.Lock()
	c := f.conns[0]
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpNopIn)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetTTT(77)
	c.numbers(&h, false)
	c.send(&h, []byte("are you there"))
	f.mu.Unlock()
	if got := <-echo; got != "are you there" {
		t.Errorf("echo %q", got)
	}
	roundTrip(t, dev, 512)
}

func TestLogoutRequestMovesToANewConnection(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	f.mu.Lock()
	c := f.conns[0]
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpAsync)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetAsync(iscsi.AsyncLogoutRequest, 0, 0, 0, 3)
	c.numbers(&h, true)
	c.send(&h, nil)
	f.mu.Unlock()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		roundTrip(t, dev, 512)
		f.mu.Lock()
		n := len(f.logins)
		f.mu.Unlock()
		if n == 2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no new login")
		}
	}
}

func TestOldDeviceIsServedWithTenByteCommands(t *testing.T) {
	f := newFakeTarget(t)
	for _, op := range []byte{opServiceIn16, opRead16, opWrite16, opSyncCache16, opWriteSame16, opModeSense6} {
		f.refuse[op] = true
	}
	dev := f.open(Options{})
	i := dev.Info()
	if i.Blocks != 8192 || i.Thin || i.ReportsAllocation || !i.VolatileCache || i.MaxTransfer > 65535 {
		t.Errorf("info %+v", i)
	}
	roundTrip(t, dev, 100<<10)
	if err := dev.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if err := dev.WriteZeroes(t.Context(), Extent{5, 100}); err != nil {
		t.Error(err)
	}
	got := make([]byte, 200*512)
	if err := dev.ReadAt(t.Context(), got, 5); err != nil {
		t.Fatal(err)
	}
	if !allZero(got[:100*512]) || !bytes.Equal(got[100*512:], pattern(100 << 10)[100*512:200*512]) {
		t.Error("zeroes are not where they should be")
	}
}

func TestUnmapThatIsOnlyAHintStillZeroes(t *testing.T) {
	f := newFakeTarget(t)
	f.provisioning = 0x80 | 0x04 // LBPU and LBPRZ, but no WRITE SAME
	dev := f.open(Options{})
	if i := dev.Info(); !i.Thin || !i.UnmapZeroes || !i.ReportsAllocation {
		t.Fatalf("info %+v", i)
	}
	roundTrip(t, dev, 100<<10)
	if err := dev.Unmap(t.Context(), Extent{10, 100}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100*512)
	if err := dev.ReadAt(t.Context(), got, 10); err != nil {
		t.Fatal(err)
	}
	if !allZero(got) {
		t.Fatal("blocks that the device did not free are not zero")
	}
}

func TestLaterProcessWithTheSameKeyReplacesTheSession(t *testing.T) {
	f := newFakeTarget(t)
	for range 2 {
		f.open(Options{SessionKey: "db01"})
	}
	f.open(Options{SessionKey: "db02"})
	f.open(Options{})
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.logins[0] != f.logins[1] || f.logins[2] == f.logins[0] || f.logins[3] == f.logins[0] {
		t.Fatalf("ISIDs %v", f.logins)
	}
}

// FuzzReceive feeds what a hostile target might send to a session with commands
// in flight. Each must end, and none may be taken for done by chance.
func FuzzReceive(f *testing.F) {
	header := func(op iscsi.Opcode, set func(h *iscsi.BHS)) []byte {
		var h iscsi.BHS
		h.SetOpcode(op)
		h.SetFlags(iscsi.FlagFinal)
		h.SetITT(1 << 16)
		h.SetExpCmdSN(1)
		h.SetMaxCmdSN(40)
		if set != nil {
			set(&h)
		}
		return h[:]
	}
	for _, op := range []iscsi.Opcode{iscsi.OpNopIn, iscsi.OpSCSIResponse, iscsi.OpTaskMgmtResp, iscsi.OpTextResponse,
		iscsi.OpDataIn, iscsi.OpLogoutResp, iscsi.OpR2T, iscsi.OpAsync, iscsi.OpReject} {
		f.Add(header(op, nil))
	}
	f.Add(append(header(iscsi.OpDataIn, func(h *iscsi.BHS) { h.SetDataLength(512); h[1] |= iscsi.FlagStatus }), make([]byte, 512)...))
	f.Add(header(iscsi.OpR2T, func(h *iscsi.BHS) { h.SetITT(1<<16 | 1); h.SetDesiredLength(1 << 20) }))
	f.Add(append(header(iscsi.OpSCSIResponse, func(h *iscsi.BHS) { h.SetStatus(2); h.SetDataLength(4) }), 0xff, 0xff, 0x70, 0))
	f.Fuzz(func(t *testing.T, in []byte) {
		ours, theirs := net.Pipe()
		params := iscsi.DefaultParams()
		params.MaxRecv = 4096
		opts := Options{LoginTimeout: time.Millisecond}.withDefaults()
		addr := Address{Host: "127.0.0.1", Port: 1, Target: "iqn.2026-11.net.example:fuzz"}
		r := iscsi.NewReader(ours, 4096)
		r.MaxData = 4096
		s := newSession(endpoint{addr: addr, opts: opts}, 0, func(context.Context, *session) error { return nil })
		first := make(chan error, 1)
		go s.manage(&link{nc: ours, r: r, params: params, cmdSN: 1, maxCmdSN: 40}, first)
		go io.Copy(io.Discard, theirs)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		for n := range 3 {
			wg.Go(func() {
				c := &Command{}
				rwCDB(&c.CDB, n == 1, true, 0, 4)
				if n == 1 {
					c.Out = make([]byte, 2048)
				} else {
					c.In = make([]byte, 2048)
				}
				if err := s.do(ctx, c); err == nil && c.Status == statusGood && n != 1 && c.Received > len(c.In) {
					t.Error("more was received than there is room for")
				}
			})
		}
		theirs.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		theirs.Write(in)
		theirs.Close()
		s.close()
		wg.Wait()
	})
}

func FuzzParsersOfSCSIData(f *testing.F) {
	f.Add([]byte{0, 0x83, 0, 12, 1, 3, 0, 8, 0x30, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 9})
	f.Add([]byte{0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, p []byte) {
		parseDesignator(p)
		parseSense(p)
		parseSerial(p)
		parseBlockLimits(p)
		parseProvisioning(p)
		parseWriteCache(p)
		parseInquiry(p)
		parseCapacity10(p)
		if c, err := parseCapacity16(p); err == nil && c.blocks > 1<<62/uint64(c.blockSize) {
			t.Fatal("capacity is out of range")
		}
		var at LBA
		if len(p) >= 16 {
			at = LBA(binary.BigEndian.Uint64(p[8:]))
		}
		e := Extent{min(at, 1<<60), 1000}
		runs, err := parseLBAStatus(p, e)
		if err != nil {
			return
		}
		next := e.Start
		for _, r := range runs {
			if r.Start != next || r.Empty() || r.End() > e.End() {
				t.Fatalf("runs %v of %v", runs, e)
			}
			next = r.End()
		}
	})
}

func TestLossOfTheCacheIsToldWithTheFlush(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	before := dev.(Resetter).Resets()
	roundTrip(t, dev, 512)
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := dev.(Resetter).Resets(); n != before {
		t.Fatalf("%d resets without one", n-before)
	}
	f.drop()
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if dev.(Resetter).Resets() == before {
		t.Fatal("a flush on a new connection does not tell that the device may have restarted")
	}
	before = dev.(Resetter).Resets()
	var once atomic.Bool
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() == iscsi.OpSCSICommand && once.CompareAndSwap(false, true) {
			c.check(h, senseUnitAttention, 0x29, 0x01)
			return true
		}
		return false
	})
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if dev.(Resetter).Resets() == before {
		t.Fatal("a reset that the device reported is not told")
	}
}

// TestGivenUpWriteDoesNotComeAfterALaterOne: a write whose session was lost, and
// whose caller has gone, may still be in the target; until that session is
// reinstated no other may carry a write that could be overtaken.
func TestGivenUpWriteDoesNotComeAfterALaterOne(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{Sessions: 2, IOTimeout: 20 * time.Second})
	lost := make(chan struct{})
	var once sync.Once
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opWrite16 {
			return false
		}
		taken := false
		once.Do(func() {
			taken = true
			f.deaf.Store(&c.isid)
			c.nc.Close()
			close(lost)
		})
		return taken
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-lost
		cancel()
	}()
	if err := dev.WriteAt(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("want the context's error, got %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for range 2 {
		if err := dev.WriteAt(short, make([]byte, 512), 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a later write did not wait for the lost session: %v", err)
		}
	}
	f.deaf.Store(nil)
	for range 2 {
		if err := dev.WriteAt(t.Context(), pattern(512), 0); err != nil {
			t.Fatal(err)
		}
	}
}
