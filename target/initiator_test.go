package target

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"lunshift/iscsi"
)

// initiator is a plain initiator that sends what a test tells it, right or wrong.
type initiator struct {
	t      testing.TB
	nc     net.Conn
	r      *iscsi.Reader
	params iscsi.Params
	itt    uint32
	cmdSN  uint32
	expSN  uint32
	lun    uint64
	maxSN  uint32
	digest bool
	isid   iscsi.ISID // of loginRequest
	events []byte     // of Asynchronous Messages that came while a command was waited for
}

type loginOptions struct {
	name      string
	target    string
	isid      iscsi.ISID
	discovery bool
	want      func(*iscsi.Params)
}

// pduIn is one PDU received.
type pduIn struct {
	iscsi.BHS
	data []byte
}

func dial(t testing.TB, addr string) *initiator {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return over(t, nc)
}

// over is an initiator on a connection that is there already.
func over(t testing.TB, nc net.Conn) *initiator {
	t.Helper()
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	i := &initiator{t: t, nc: nc, r: iscsi.NewReader(nc, 1<<16), cmdSN: 100, itt: 1}
	i.r.MaxData = 1 << 24
	return i
}

// tryLogin logs in and gives the login status.
func tryLogin(t testing.TB, addr string, o loginOptions) (*initiator, uint16) {
	t.Helper()
	i := dial(t, addr)
	return i, i.tryLogin(o)
}

// tryLogin logs in and gives the login status.
func (i *initiator) tryLogin(o loginOptions) uint16 {
	t := i.t
	t.Helper()
	want := iscsi.DefaultParams()
	want.InitialR2T = false
	want.MaxRecv = 1 << 18
	want.MaxBurstLength, want.FirstBurstLength = 1<<20, 1<<18
	if o.want != nil {
		o.want(&want)
	}
	neg := iscsi.NewNegotiation(want)
	neg.Discovery = o.discovery
	pairs := []iscsi.Pair{{Key: "InitiatorName", Value: o.name}}
	if o.name == "" {
		pairs[0].Value = "iqn.2026-11.net.example:host"
	}
	if o.discovery {
		pairs = append(pairs, iscsi.Pair{Key: "SessionType", Value: "Discovery"})
	} else {
		if o.target == "" {
			o.target = iqn
		}
		pairs = append(pairs, iscsi.Pair{Key: "TargetName", Value: o.target})
	}
	pairs = append(pairs, iscsi.Pair{Key: "AuthMethod", Value: "CHAP,None"})
	var h iscsi.BHS
	step := func(csg, nsg int, pairs []iscsi.Pair) (pduIn, []iscsi.Pair) {
		h = iscsi.BHS{}
		h.SetOpcode(iscsi.OpLoginRequest)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagTransit | byte(csg<<2|nsg))
		h.SetISID(o.isid)
		h.SetITT(0)
		h.SetCmdSN(i.cmdSN)
		i.send(&h, iscsi.AppendText(nil, pairs...))
		p := i.recv()
		if p.Opcode() != iscsi.OpLoginResponse {
			t.Fatalf("login answered by %v", p.Opcode())
		}
		got, err := iscsi.ParseText(p.data)
		if err != nil {
			t.Fatal(err)
		}
		return p, got
	}
	p, _ := step(iscsi.StageSecurity, iscsi.StageOperational, pairs)
	if s := p.LoginStatus(); s != 0 {
		return s
	}
	p, got := step(iscsi.StageOperational, iscsi.StageFullFeature, neg.Offer())
	if s := p.LoginStatus(); s != 0 {
		return s
	}
	for _, g := range got {
		if _, err := neg.Apply(g); err != nil {
			t.Fatal(err)
		}
	}
	neg.Finish()
	i.params = neg.Params
	if p.TSIH() == 0 {
		t.Fatal("TSIH is 0")
	}
	i.r.HeaderDigest, i.r.DataDigest = i.params.HeaderDigest, i.params.DataDigest
	i.digest = i.params.HeaderDigest
	return 0
}

// login logs in and takes the unit attention that follows.
func login(t testing.TB, addr string, o loginOptions) *initiator {
	t.Helper()
	i, status := tryLogin(t, addr, o)
	if status != 0 {
		t.Fatalf("login status %04Xh", status)
	}
	if !o.discovery {
		i.do([]byte{0, 0, 0, 0, 0, 0}, nil, 0)
	}
	return i
}

// writeLocker lets a Writer be used without concurrency.
type writeLocker struct{}

func (writeLocker) Lock()   {}
func (writeLocker) Unlock() {}

func (i *initiator) send(h *iscsi.BHS, data []byte) {
	i.t.Helper()
	w := iscsi.NewWriter(i.nc, writeLocker{})
	w.HeaderDigest, w.DataDigest = i.digest, i.digest
	w.Append(h, nil, data, nil)
	if err := w.Flush(); err != nil {
		i.t.Fatalf("send: %v", err)
	}
}

func (i *initiator) next() (pduIn, error) {
	h, err := i.r.Next()
	if err != nil {
		return pduIn{}, err
	}
	p := pduIn{BHS: *h}
	d, err := i.r.Data()
	if err != nil {
		return pduIn{}, err
	}
	p.data = bytes.Clone(d)
	switch p.Opcode() {
	case iscsi.OpR2T:
	case iscsi.OpDataIn:
		if p.Flags()&iscsi.FlagStatus != 0 {
			i.expSN = p.StatSN() + 1
		}
	default:
		i.expSN = p.StatSN() + 1
	}
	i.maxSN = p.MaxCmdSN()
	return p, nil
}

func (i *initiator) recv() pduIn {
	i.t.Helper()
	p, err := i.next()
	if err != nil {
		i.t.Fatalf("receive: %v", err)
	}
	return p
}

// expectClosed waits for the end of the connection; a Reject may come first, and what else is named.
func (i *initiator) expectClosed(first ...iscsi.Opcode) {
	i.t.Helper()
	for {
		p, err := i.next()
		if err != nil {
			if n := net.Error(nil); errors.As(err, &n) && n.Timeout() {
				i.t.Fatal("the connection stays open")
			}
			return
		}
		if p.Opcode() != iscsi.OpReject && !slices.Contains(first, p.Opcode()) {
			i.t.Fatalf("got %v, want the end", p.Opcode())
		}
	}
}

// command makes a SCSI Command PDU.
func (i *initiator) command(cdb []byte, flags byte, expected int) *iscsi.BHS {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpSCSICommand)
	h.SetFlags(flags | iscsi.AttrSimple)
	field, _ := iscsi.EncodeLUN(i.lun)
	h.SetLUN(field)
	i.itt++
	h.SetITT(i.itt)
	h.SetExpectedLength(uint32(expected))
	h.SetCmdSN(i.cmdSN)
	h.SetExpStatSN(i.expSN)
	i.cmdSN++
	copy(h.CDB(), cdb)
	return &h
}

// result is the end of a command.
type result struct {
	status          byte
	key, asc, ascq  byte
	info            uint32
	data            []byte
	flags           byte
	residual, r2ts  int
	expDataSN, pdus uint32
	sense           []byte // sense data, as it came
}

func (r result) String() string {
	return fmt.Sprintf("status %02Xh sense %X/%02X/%02X", r.status, r.key, r.asc, r.ascq)
}

func (r result) is(s sense) bool {
	return r.status == iscsi.StatusCheckCondition && r.key == s.Key && r.asc == s.ASC && r.ascq == s.ASCQ
}

// do sends a command with data-out as negotiated, and gives its end.
func (i *initiator) do(cdb []byte, out []byte, in int) result {
	i.t.Helper()
	flags, n := byte(0), in
	if in > 0 {
		flags |= iscsi.FlagRead
	}
	if len(out) > 0 {
		flags |= iscsi.FlagWrite
		n = len(out)
	}
	h := i.command(cdb, flags, n)
	i.start(h, out)
	return i.finish(h.ITT(), out)
}

// start sends a command and the unsolicited part of its data.
func (i *initiator) start(h *iscsi.BHS, out []byte) {
	i.t.Helper()
	immediate := 0
	if i.params.ImmediateData {
		immediate = min(len(out), int(i.params.FirstBurstLength), int(i.params.PeerMaxRecv))
	}
	first := immediate
	if !i.params.InitialR2T {
		first = min(len(out), int(i.params.FirstBurstLength))
	}
	if first == immediate {
		h.SetFlags(h.Flags() | iscsi.FlagFinal)
	}
	i.send(h, out[:immediate])
	if first > immediate {
		i.dataOut(h, iscsi.NoTag, out, immediate, first)
	}
}

func (i *initiator) dataOut(h *iscsi.BHS, ttt uint32, out []byte, from, to int) {
	i.t.Helper()
	for sn := uint32(0); from < to; sn++ {
		n := min(to-from, int(i.params.PeerMaxRecv))
		var d iscsi.BHS
		d.SetOpcode(iscsi.OpDataOut)
		if from+n == to {
			d.SetFlags(iscsi.FlagFinal)
		}
		d.SetLUN(h.LUN())
		d.SetITT(h.ITT())
		d.SetTTT(ttt)
		d.SetExpStatSN(i.expSN)
		d.SetDataSN(sn)
		d.SetBufferOffset(uint32(from))
		i.send(&d, out[from:from+n])
		from += n
	}
}

// finish answers R2Ts until the command ends.
func (i *initiator) finish(itt uint32, out []byte) result {
	i.t.Helper()
	var r result
	for {
		p := i.recv()
		if p.ITT() != itt {
			if p.Opcode() == iscsi.OpAsync || p.Opcode() == iscsi.OpNopIn {
				if p.Opcode() == iscsi.OpAsync {
					i.events = append(i.events, p.AsyncEvent())
				}
				continue
			}
			i.t.Fatalf("%v for task %d while waiting for %d", p.Opcode(), p.ITT(), itt)
		}
		switch p.Opcode() {
		case iscsi.OpR2T:
			if p.DataSN() != uint32(r.r2ts) {
				i.t.Fatalf("R2TSN %d, want %d", p.DataSN(), r.r2ts)
			}
			r.r2ts++
			i.dataOut(&p.BHS, p.TTT(), out, int(p.BufferOffset()), int(p.BufferOffset()+p.DesiredLength()))
			continue
		case iscsi.OpDataIn:
			if int(p.BufferOffset()) != len(r.data) || p.DataSN() != r.pdus {
				i.t.Fatalf("Data-In %d at %d, want %d at %d", p.DataSN(), p.BufferOffset(), r.pdus, len(r.data))
			}
			r.pdus++
			r.data = append(r.data, p.data...)
			if p.Flags()&iscsi.FlagStatus == 0 {
				continue
			}
		case iscsi.OpSCSIResponse:
			if len(p.data) >= 16 {
				s := p.data[2:]
				r.sense = s
				r.key, r.asc, r.ascq, r.info = s[2]&0xf, s[12], s[13], binary.BigEndian.Uint32(s[3:])
			}
			r.expDataSN = p.DataSN()
		default:
			i.t.Fatalf("%v for a command", p.Opcode())
		}
		r.status, r.flags, r.residual = p.Status(), p.Flags()&0x1e, int(p.Residual())
		return r
	}
}

func (i *initiator) good(cdb []byte, out []byte, in int) result {
	i.t.Helper()
	r := i.do(cdb, out, in)
	if r.status != iscsi.StatusGood {
		i.t.Fatalf("CDB %x: %v", cdb, r)
	}
	return r
}

// tmf sends a task management function and gives the tag of its request.
func (i *initiator) tmf(function byte, ref uint32) uint32 {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpTaskMgmt)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal | function)
	field, _ := iscsi.EncodeLUN(i.lun)
	h.SetLUN(field)
	i.itt++
	h.SetITT(i.itt)
	h.SetTTT(ref)
	h.SetCmdSN(i.cmdSN)
	h.SetExpStatSN(i.expSN)
	i.send(&h, nil)
	return h.ITT()
}

func rw16(op byte, lba uint64, blocks uint32) []byte {
	b := make([]byte, 16)
	b[0] = op
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], blocks)
	return b
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	const period = 1 << 17
	for i := range b[:min(n, period)] {
		b[i] = seed + byte(i*7) + byte(i>>9)
	}
	for at := period; at < n; at += period {
		copy(b[at:], b[:period])
	}
	return b
}

func deadline() time.Time { return time.Now().Add(20 * time.Second) }
