package target

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
)

var tur = []byte{0, 0, 0, 0, 0, 0}

func TestDataArrivesHoweverItIsSent(t *testing.T) {
	for _, c := range []struct {
		name string
		want func(*iscsi.Params)
		cfg  Config
	}{
		{name: "immediate and unsolicited"},
		{name: "R2T only", want: func(p *iscsi.Params) { p.InitialR2T, p.ImmediateData = true, false }},
		{name: "immediate then R2T", want: func(p *iscsi.Params) { p.InitialR2T = true }},
		{name: "small bursts", want: func(p *iscsi.Params) {
			p.MaxBurstLength, p.FirstBurstLength, p.MaxRecv = 4096, 1024, 1000
		}},
		{name: "digests", want: func(p *iscsi.Params) { p.HeaderDigest, p.DataDigest = true, true }},
		{name: "digests and odd lengths", want: func(p *iscsi.Params) {
			p.HeaderDigest, p.DataDigest = true, true
			p.MaxBurstLength, p.FirstBurstLength, p.MaxRecv = 5001, 1021, 1003
		}},
		{name: "short data segments", cfg: Config{MaxRecvDataSegmentLength: 777}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMemory(512, 1<<16)
			_, addr := begin(t, c.cfg, Unit{IQN: iqn, Device: quick{m}})
			i := login(t, addr, loginOptions{want: c.want})
			for _, n := range []int{1, 2, 9, 130, 600, 4000} {
				out := pattern(n*512, byte(n))
				i.good(rw16(0x8a, uint64(n), uint32(n)), out, 0)
				if got := i.good(rw16(0x88, uint64(n), uint32(n)), nil, n*512); !bytes.Equal(got.data, out) || got.flags != 0 {
					t.Fatalf("%d blocks read back differ", n)
				}
			}
		})
	}
}

func TestLargeCommandsWaitForMemoryAndAllComplete(t *testing.T) {
	m := newMemory(512, 1<<18)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	// All the memory is taken: commands queue up, unsolicited data and all.
	all, whole := &share{a: s.bytes}, s.cfg.BytesInFlight*3/4
	s.bytes.each = whole
	if !all.acquire(whole, &claim{}, true) {
		t.Fatal("memory is in use")
	}
	const n = 4096 // 2 MiB
	out := map[uint32][]byte{}
	for k := range 8 {
		data := pattern(n*512, byte(k))
		h := i.command(rw16(0x8a, uint64(k*n), n), iscsi.FlagWrite, len(data))
		i.start(h, data)
		out[h.ITT()] = data
	}
	gone := i.command(rw16(0x8a, 8*n, n), iscsi.FlagWrite, n*512)
	i.start(gone, make([]byte, n*512))
	ref := i.tmf(iscsi.TMFAbortTask, gone.ITT())
	if p := i.recv(); p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("abort of a waiting command: %v %d", p.Opcode(), p.Response())
	}
	all.release(whole)
	for left := len(out); left > 0; {
		p := i.recv()
		switch p.Opcode() {
		case iscsi.OpR2T:
			i.dataOut(&p.BHS, p.TTT(), out[p.ITT()], int(p.BufferOffset()), int(p.BufferOffset()+p.DesiredLength()))
		case iscsi.OpSCSIResponse:
			if p.Status() != 0 || out[p.ITT()] == nil {
				t.Fatalf("status %02Xh of task %d", p.Status(), p.ITT())
			}
			left--
		}
	}
	for k := range 8 {
		if got := i.good(rw16(0x88, uint64(k*n), n), nil, n*512); !bytes.Equal(got.data, pattern(n*512, byte(k))) {
			t.Fatalf("write %d was torn", k)
		}
	}
	allBack(t, s)
}

func TestAbortedTaskEndsAndIsNotAnswered(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	m.set(make(chan struct{}), nil)
	h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	i.start(h, pattern(512, 1))
	<-m.entered
	ref := i.tmf(iscsi.TMFAbortTask, h.ITT())
	if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("got %v response %d", p.Opcode(), p.Response())
	}
	m.set(nil, nil)
	// The next thing answered is the next command: the aborted one never is.
	i.good(tur, nil, 0)
	if m.bytes()[0] != 0 {
		t.Error("the aborted write was done")
	}
	ref = i.tmf(iscsi.TMFAbortTask, h.ITT())
	if p := i.recv(); p.ITT() != ref || p.Response() != iscsi.TMFNoTask {
		t.Errorf("abort of no task: response %d", p.Response())
	}
}

func TestAbortWhileDataIsMissing(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.InitialR2T, p.ImmediateData = true, false }})
	out := pattern(8192, 1)
	h := i.command(rw16(0x8a, 0, 16), iscsi.FlagWrite, len(out))
	i.start(h, out)
	r2t := i.recv()
	if r2t.Opcode() != iscsi.OpR2T {
		t.Fatal(r2t.Opcode())
	}
	ref := i.tmf(iscsi.TMFAbortTaskSet, 0)
	if p := i.recv(); p.ITT() != ref || p.Response() != 0 {
		t.Fatalf("got %v", p.Opcode())
	}
	i.dataOut(&r2t.BHS, r2t.TTT(), out, 0, len(out)) // still on its way
	i.good(tur, nil, 0)
	if m.bytes()[0] != 0 {
		t.Error("the aborted write was done")
	}
}

func TestResetsAbortTasksOfAllSessionsAndTellThem(t *testing.T) {
	for _, c := range []struct {
		function byte
		other    sense
		own      sense
	}{
		{iscsi.TMFLUNReset, attnLUNReset, attnLUNReset},
		{iscsi.TMFTargetWarmReset, attnTargetReset, attnTargetReset},
	} {
		t.Run(tmfName(c.function), func(t *testing.T) {
			m := newMemory(512, 1024)
			_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
			a := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
			b := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
			m.set(make(chan struct{}), nil)
			for _, i := range []*initiator{a, b} {
				i.start(i.command(rw16(0x88, 0, 1), iscsi.FlagRead, 512), nil)
				<-m.entered
			}
			ref := a.tmf(c.function, 0)
			if p := a.recv(); p.ITT() != ref || p.Response() != 0 {
				t.Fatalf("got %v %d", p.Opcode(), p.Response())
			}
			m.set(nil, nil)
			if r := b.do(tur, nil, 0); !r.is(c.other) {
				t.Errorf("the other session: %v", r)
			}
			b.good(tur, nil, 0)
			if c.own != (sense{}) {
				if r := a.do(tur, nil, 0); !r.is(c.own) {
					t.Errorf("the own session: %v", r)
				}
			}
			a.good(tur, nil, 0)
		})
	}
}

func TestColdResetDropsAllSessions(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	b := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	a.tmf(iscsi.TMFTargetColdReset, 0)
	if p := a.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != 0 {
		t.Fatalf("got %v", p.Opcode())
	}
	a.expectClosed()
	b.expectClosed()
}

func TestReinstatementEndsTheFormerSessionsTasks(t *testing.T) {
	m := newMemory(512, 1024)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	a := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	m.set(make(chan struct{}), nil)
	a.start(a.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 1))
	<-m.entered
	b := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	m.set(nil, nil)
	a.expectClosed()
	b.good(rw16(0x88, 0, 1), nil, 512)
	if m.bytes()[0] != 0 {
		t.Error("a task of the former session outlived it")
	}
	if n := len(s.Sessions(iqn)); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

func TestSlowCommandDoesNotStallOthers(t *testing.T) {
	slow, fast := newMemory(512, 1024), newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: slow}, Unit{IQN: iqn, LUN: 1, Device: fast})
	i := login(t, addr, loginOptions{})
	hold := make(chan struct{})
	slow.set(hold, nil)
	held := map[uint32]bool{}
	for range 40 {
		h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
		i.start(h, pattern(512, 1))
		held[h.ITT()] = true
		<-slow.entered
	}
	i.lun = 1
	if r := i.do(tur, nil, 0); !r.is(attnPowerOn) {
		t.Error(r)
	}
	i.good(rw16(0x8a, 0, 1), pattern(512, 1), 0)
	i.ping()
	close(hold)
	for len(held) > 0 {
		p := i.recv()
		if p.Opcode() != iscsi.OpSCSIResponse || !held[p.ITT()] || p.Status() != 0 {
			t.Fatalf("%v of task %d", p.Opcode(), p.ITT())
		}
		delete(held, p.ITT())
	}
}

func (i *initiator) ping() {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpNopOut)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(9999)
	h.SetTTT(iscsi.NoTag)
	h.SetCmdSN(i.cmdSN)
	i.send(&h, []byte("ping"))
	if p := i.recv(); p.Opcode() != iscsi.OpNopIn || p.ITT() != 9999 || string(p.data) != "ping" {
		i.t.Fatalf("ping: %v %q", p.Opcode(), p.data)
	}
}

func TestCommandWindowIsKept(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{CommandsPerSession: 4}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	if i.maxSN-i.cmdSN != 3 {
		t.Fatalf("window of %d", i.maxSN-i.cmdSN+1)
	}
	hold := make(chan struct{})
	m.set(hold, nil)
	for range 4 {
		i.start(i.command(rw16(0x88, 0, 1), iscsi.FlagRead, 512), nil)
		<-m.entered
	}
	// Beyond the window and before it: ignored.
	i.start(i.command(tur, 0, 0), nil)
	i.cmdSN -= 5
	i.start(i.command(tur, 0, 0), nil)
	i.cmdSN += 3
	i.ping() // both were taken off the connection
	close(hold)
	for range 4 {
		if p := i.recv(); p.Opcode() != iscsi.OpDataIn || p.Status() != 0 {
			t.Fatalf("got %v", p.Opcode())
		}
	}
	i.good(tur, nil, 0)
}

func TestMalformedPDUEndsItsConnectionOnly(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 1024)})
	other := login(t, addr, loginOptions{isid: iscsi.ISID{9}})
	bad := map[string]func(*initiator){
		"unknown opcode":  func(i *initiator) { var h iscsi.BHS; h.SetOpcode(0x1c); i.send(&h, nil) },
		"target's opcode": func(i *initiator) { var h iscsi.BHS; h.SetOpcode(iscsi.OpDataIn); i.send(&h, nil) },
		"login again":     func(i *initiator) { var h iscsi.BHS; h.SetOpcode(iscsi.OpLoginRequest); i.send(&h, nil) },
		"SNACK":           func(i *initiator) { var h iscsi.BHS; h.SetOpcode(iscsi.OpSNACK); i.send(&h, nil) },
		"data too long": func(i *initiator) {
			h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 1<<24)
			h.SetDataLength(1<<24 - 1)
			i.nc.Write(h[:])
		},
		"CmdSN gap":         func(i *initiator) { i.cmdSN += 2; i.start(i.command(tur, 0, 0), nil) },
		"reserved task tag": func(i *initiator) { h := i.command(tur, iscsi.FlagFinal, 0); h.SetITT(iscsi.NoTag); i.send(h, nil) },
		"immediate too long": func(i *initiator) {
			i.send(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 512), make([]byte, 513))
		},
		"text without =": func(i *initiator) {
			var h iscsi.BHS
			h.SetOpcode(iscsi.OpTextRequest)
			h.SetFlags(iscsi.FlagFinal)
			h.SetITT(5)
			h.SetTTT(iscsi.NoTag)
			h.SetCmdSN(i.cmdSN)
			i.send(&h, []byte("nonsense\x00"))
		},
		"duplicate task tag": func(i *initiator) {
			h := i.command(rw16(0x8a, 0, 8), iscsi.FlagWrite|iscsi.FlagFinal, 4096)
			i.send(h, nil)
			i.recv() // R2T
			h2 := i.command(tur, iscsi.FlagFinal, 0)
			h2.SetITT(h.ITT())
			i.send(h2, nil)
		},
		"Data-Out beyond its R2T": func(i *initiator) {
			h := i.command(rw16(0x8a, 0, 8), iscsi.FlagWrite|iscsi.FlagFinal, 4096)
			i.send(h, nil)
			p := i.recv()
			i.dataOut(&p.BHS, p.TTT(), make([]byte, 5000), 0, 5000)
		},
		"Data-Out with a gap": func(i *initiator) {
			h := i.command(rw16(0x8a, 0, 8), iscsi.FlagWrite|iscsi.FlagFinal, 4096)
			i.send(h, nil)
			p := i.recv()
			i.dataOut(&p.BHS, p.TTT(), make([]byte, 4096), 512, 4096)
		},
		"Data-Out that ends early": func(i *initiator) {
			h := i.command(rw16(0x8a, 0, 8), iscsi.FlagWrite|iscsi.FlagFinal, 4096)
			i.send(h, nil)
			p := i.recv()
			i.dataOut(&p.BHS, p.TTT(), make([]byte, 4096), 0, 512)
		},
	}
	for name, f := range bad {
		t.Run(name, func(t *testing.T) {
			i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
			f(i)
			i.expectClosed()
			other.good(tur, nil, 0)
		})
	}
	t.Run("noise before login", func(t *testing.T) {
		i := dial(t, addr)
		i.nc.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 8))
		i.expectClosed()
		other.good(tur, nil, 0)
	})
	t.Run("bad digest", func(t *testing.T) {
		i := login(t, addr, loginOptions{isid: iscsi.ISID{1}, want: func(p *iscsi.Params) { p.HeaderDigest = true }})
		h := i.command(tur, iscsi.FlagFinal, 0)
		i.nc.Write(append(h[:], 1, 2, 3, 4))
		i.expectClosed()
	})
}

func TestLoginIsRefusedWithTheRightStatus(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	if _, s := tryLogin(t, addr, loginOptions{target: "iqn.2026-11.net.example:other"}); s != iscsi.LoginNotFound {
		t.Errorf("unknown target: %04X", s)
	}
	if _, s := tryLogin(t, addr, loginOptions{name: "bad name"}); s != iscsi.LoginInitiatorError {
		t.Errorf("bad name: %04X", s)
	}
	i := dial(t, addr)
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h[3] = 1
	i.send(&h, nil)
	if p := i.recv(); p.LoginStatus() != iscsi.LoginUnsupportedVersion {
		t.Errorf("version: %04X", p.LoginStatus())
	}
	i = dial(t, addr)
	h = iscsi.BHS{}
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetFlags(iscsi.FlagTransit | 1)
	h.SetTSIH(77)
	i.send(&h, nil)
	if p := i.recv(); p.LoginStatus() != iscsi.LoginMissingParameter {
		t.Errorf("no name: %04X", p.LoginStatus())
	}
}

func TestSilentLoginIsDropped(t *testing.T) {
	_, addr := begin(t, Config{LoginTimeout: 50 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	dial(t, addr).expectClosed()
}

func TestSilentInitiatorIsPingedAndDropped(t *testing.T) {
	_, addr := begin(t, Config{NopInterval: 100 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	p := i.recv()
	if p.Opcode() != iscsi.OpNopIn || p.ITT() != iscsi.NoTag || p.TTT() == iscsi.NoTag {
		t.Fatalf("got %v", p.Opcode())
	}
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpNopOut)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetTTT(p.TTT())
	h.SetCmdSN(i.cmdSN)
	i.send(&h, nil)
	if p := i.recv(); p.Opcode() != iscsi.OpNopIn { // pinged again: the answer counted
		t.Fatalf("got %v", p.Opcode())
	}
	i.expectClosed()
}

func TestLogoutIsAnsweredAndEndsTheSession(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	if got := s.Sessions(iqn); len(got) != 1 || got[0].Initiator == "" || got[0].Address != i.nc.LocalAddr().String() {
		t.Errorf("sessions: %+v", got)
	}
	i.logout()
	i.expectClosed()
	for len(s.Sessions(iqn)) > 0 {
		time.Sleep(time.Millisecond)
	}
}

func (i *initiator) logout() {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLogout)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal | iscsi.LogoutCloseSession)
	h.SetITT(77)
	h.SetCmdSN(i.cmdSN)
	i.send(&h, nil)
	p := i.recv()
	for ; p.Opcode() == iscsi.OpAsync; p = i.recv() {
		i.events = append(i.events, p.AsyncEvent())
	}
	if p.Opcode() != iscsi.OpLogoutResp || p.Response() != iscsi.LogoutOK {
		i.t.Fatalf("got %v %d", p.Opcode(), p.Response())
	}
}

func (i *initiator) sendTargets() string {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpTextRequest)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(5)
	h.SetTTT(iscsi.NoTag)
	h.SetCmdSN(i.cmdSN)
	i.cmdSN++
	i.send(&h, []byte("SendTargets=All\x00"))
	var all []byte
	for {
		p := i.recv()
		if p.Opcode() != iscsi.OpTextResponse {
			i.t.Fatal(p.Opcode())
		}
		all = append(all, p.data...)
		if p.Final() {
			return string(all)
		}
		h.SetTTT(p.TTT())
		h.SetCmdSN(i.cmdSN)
		i.cmdSN++
		i.send(&h, nil)
	}
}

func TestRetiredUnitServesNothingAndSessionsLeave(t *testing.T) {
	m := newMemory(512, 1024)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	hold := make(chan struct{})
	m.set(hold, nil)
	h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	i.start(h, pattern(512, 1))
	<-m.entered
	retired := make(chan error, 1)
	go func() { retired <- s.Retire(t.Context(), iqn, 0) }()
	for { // until the retirement began
		if _, st := tryLogin(t, addr, loginOptions{isid: iscsi.ISID{5}}); st == iscsi.LoginTargetRemoved {
			break
		}
	}
	if r := i.do2(t, h.ITT(), rw16(0x88, 0, 1)); !r.is(senseBecomingReady) {
		t.Errorf("a command after: %v", r)
	}
	if r := i.do2(t, h.ITT(), []byte{0x12, 0, 0, 0, 36, 0}); r.status != 0 {
		t.Errorf("INQUIRY after: %v", r)
	}
	close(hold)
	if r := i.finish(h.ITT(), nil); r.status != 0 {
		t.Errorf("the command in flight: %v", r)
	}
	// It may come before the response of the command that the retirement waited for.
	if len(i.events) == 0 {
		if p := i.recv(); p.Opcode() == iscsi.OpAsync {
			i.events = append(i.events, p.AsyncEvent())
		}
	}
	if !bytes.Equal(i.events, []byte{iscsi.AsyncLogoutRequest}) {
		t.Fatalf("asynchronous events %v", i.events)
	}
	d := login(t, addr, loginOptions{discovery: true})
	if got := d.sendTargets(); strings.Contains(got, iqn) {
		t.Errorf("still listed: %q", got)
	}
	select {
	case err := <-retired:
		t.Fatalf("Retire returned %v with a session left", err)
	default:
	}
	i.logout()
	if err := <-retired; err != nil {
		t.Fatal(err)
	}
	// The place can be taken again.
	if err := s.AddUnit(Unit{IQN: iqn, Device: m}); err != nil {
		t.Fatal(err)
	}
	login(t, addr, loginOptions{})
}

// do2 sends a read while another task is in flight and gives its end.
func (i *initiator) do2(t *testing.T, other uint32, cdb []byte) result {
	t.Helper()
	h := i.command(cdb, iscsi.FlagRead, 512)
	i.start(h, nil)
	return i.finish(h.ITT(), nil)
}

func TestRetireDropsSessionsThatStay(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Retire(ctx, iqn, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Retire gave %v", err)
	}
	if n := len(s.Sessions(iqn)); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	if p := i.recv(); p.Opcode() != iscsi.OpAsync {
		t.Errorf("got %v", p.Opcode())
	}
	i.expectClosed()
}

func TestShutdownLetsCommandsFinish(t *testing.T) {
	m := newMemory(512, 1024)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	hold := make(chan struct{})
	m.set(hold, nil)
	h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	i.start(h, pattern(512, 1))
	<-m.entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	<-s.ending
	close(hold)
	if r := i.finish(h.ITT(), nil); r.status != 0 {
		t.Errorf("the command in flight: %v", r)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	i.expectClosed()
}

func TestCloseCancelsCommands(t *testing.T) {
	m := newMemory(512, 1024)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	m.set(make(chan struct{}), nil)
	i.start(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 1))
	<-m.entered
	s.Close()
	i.expectClosed()
}

func TestPortalsAreBoundAllOrNone(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	_ = s
	o, err := New(Config{Portals: []Portal{{Address: "127.0.0.1:0"}, {Address: addr}}, Log: logTo(t)})
	if err != nil {
		t.Fatal(err)
	}
	err = o.Listen()
	if err == nil || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), "in use") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Listen gave %v", err)
	}
	if len(o.Addrs()) != 0 {
		t.Error("a portal stays bound")
	}
}

func TestDiscoveryListsThePortals(t *testing.T) {
	var units []Unit
	for k := range 400 { // more than fits into one answer
		units = append(units, Unit{IQN: fmt.Sprintf("%s%03d", iqn, k), Device: newMemory(512, 64)})
	}
	_, addr := begin(t, Config{}, units...)
	i := login(t, addr, loginOptions{discovery: true, want: func(p *iscsi.Params) { p.MaxRecv = 512 }})
	got := i.sendTargets()
	if n := strings.Count(got, "TargetName="); n != 400 {
		t.Errorf("%d targets", n)
	}
	if n := strings.Count(got, "TargetAddress="+addr+",1\x00"); n != 400 {
		t.Errorf("%d addresses", n)
	}
	i.start(i.command(tur, 0, 0), nil)
	i.expectClosed()
}

func TestUnitsComeAndGoWhileServing(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)})
	i, _ := tryLogin(t, addr, loginOptions{})
	i.lun = 1
	if r := i.do(tur, nil, 0); !r.is(attnPowerOn) {
		t.Error(r)
	}
	if r := i.do([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96); r.status != 0 || r.data[0] != 0 {
		t.Error(r)
	}
	i.lun = 0
	if r := i.do([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96); r.status != 0 || r.data[0] != 0x7f {
		t.Errorf("INQUIRY where there is no unit: %v %x", r, r.data)
	}
	if r := i.do(tur, nil, 0); !r.is(senseNoUnit) {
		t.Error(r)
	}
	if err := s.AddUnit(Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)}); !errors.Is(err, ErrExists) {
		t.Errorf("AddUnit twice: %v", err)
	}
	if err := s.AddUnit(Unit{IQN: iqn, LUN: 0, Device: newMemory(512, 64)}); err != nil {
		t.Fatal(err)
	}
	if r := i.do(tur, nil, 0); !r.is(attnPowerOn) {
		t.Error(r)
	}
	i.lun = 1
	if r := i.do(tur, nil, 0); !r.is(attnLUNsChanged) {
		t.Error(r)
	}
	if r := i.do([]byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, nil, 256); len(r.data) != 24 {
		t.Errorf("REPORT LUNS: %x", r.data)
	}
	if err := s.RemoveUnit(iqn, 0); err != nil {
		t.Fatal(err)
	}
	if r := i.do(tur, nil, 0); !r.is(attnLUNsChanged) {
		t.Error(r)
	}
	if err := s.RemoveUnit(iqn, 0); !errors.Is(err, ErrNoUnit) {
		t.Error(err)
	}
	if err := s.RemoveUnit(iqn, 1); err != nil {
		t.Fatal(err)
	}
	i.expectClosed(iscsi.OpAsync) // that LUN 0 went is announced when there is time
}

func TestRetireCancelsWhatDoesNotEnd(t *testing.T) {
	m := newMemory(512, 64)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	m.set(make(chan struct{}), nil)
	i.start(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 1))
	<-m.entered
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Retire(ctx, iqn, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Retire gave %v", err)
	}
	i.expectClosed()
}

// TestNothingHangsUnderResetsAndLostConnections drives sessions with large and small
// commands while others reset the unit, drop connections and change the units.
func TestNothingHangsUnderResetsAndLostConnections(t *testing.T) {
	m := newMemory(512, 1<<15)
	s, addr := begin(t, Config{BytesInFlight: 64 << 20}, Unit{IQN: iqn, Device: quick{m}})
	end := time.Now().Add(time.Second)
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(k), 1))
			for time.Now().Before(end) {
				i, status := tryLogin(t, addr, loginOptions{isid: iscsi.ISID{byte(k)}})
				if status != 0 {
					t.Errorf("login status %04X", status)
					return
				}
				for range rnd.IntN(30) {
					n := 1 + rnd.IntN(600)
					lba := uint64(rnd.IntN(1 << 14))
					switch rnd.IntN(8) {
					case 0:
						i.tmf([]byte{iscsi.TMFAbortTaskSet, iscsi.TMFClearTaskSet, iscsi.TMFLUNReset, iscsi.TMFTargetWarmReset}[rnd.IntN(4)], 0)
					case 1, 2, 3:
						i.start(i.command(rw16(0x88, lba, uint32(n)), iscsi.FlagRead, n*512), nil)
					default:
						out := make([]byte, n*512)
						i.start(i.command(rw16(0x8a, lba, uint32(n)), iscsi.FlagWrite, len(out)), out)
					}
				}
				if rnd.IntN(2) == 0 {
					i.nc.Close()
					continue
				}
				var h iscsi.BHS
				h.SetOpcode(iscsi.OpLogout)
				h.SetImmediate()
				h.SetFlags(iscsi.FlagFinal)
				h.SetCmdSN(i.cmdSN)
				i.send(&h, nil)
				for {
					if p, err := i.next(); err != nil {
						t.Errorf("no answer to a logout: %v", err)
						break
					} else if p.Opcode() == iscsi.OpLogoutResp {
						break
					}
				}
				i.nc.Close()
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(end) {
			if err := s.AddUnit(Unit{IQN: iqn, LUN: 7, Device: m}); err != nil {
				t.Error(err)
			}
			s.Sessions(iqn)
			if err := s.RemoveUnit(iqn, 7); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	s.Close()
	allBack(t, s)
}

// records is a logger and what it was told, one line per entry.
func records() (logrus.FieldLogger, func() string) {
	var mu sync.Mutex
	var b bytes.Buffer
	l := logrus.New()
	l.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})
	l.SetOutput(writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return b.Write(p)
	}))
	return l, func() string {
		mu.Lock()
		defer mu.Unlock()
		return b.String()
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestLogTellsEndsOfSessionsThatBegan(t *testing.T) {
	log, text := records()
	s, addr := begin(t, Config{Log: log}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	login(t, addr, loginOptions{discovery: true}).logout()
	login(t, addr, loginOptions{}).logout()
	s.Close()
	if got := text(); strings.Count(got, "session began") != 1 || strings.Count(got, "session ended") != 1 {
		t.Errorf("of one session and one discovery the log tells:\n%s", got)
	}
}

func TestLoginToATargetThatWasCutOverIsNoWarning(t *testing.T) {
	log, text := records()
	s, addr := begin(t, Config{Log: log}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	if err := s.Retire(t.Context(), iqn, 0); err != nil {
		t.Fatal(err)
	}
	if _, st := tryLogin(t, addr, loginOptions{}); st != iscsi.LoginTargetRemoved {
		t.Errorf("login status %04Xh", st)
	}
	s.Close()
	if got := text(); !strings.Contains(got, "was cut over") || strings.Contains(got, "level=warn") || strings.Contains(got, "not here") {
		t.Errorf("the log tells:\n%s", got)
	}
}
