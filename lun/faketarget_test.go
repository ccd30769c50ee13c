package lun

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"lunshift/iscsi"
)

// fakeTarget is a small target whose behaviour a test can bend. It serves 512 byte
// blocks from memory.
type fakeTarget struct {
	t    testing.TB
	ln   net.Listener
	want iscsi.Params
	// hook sees every PDU first; true means that it has dealt with it. It may be
	// bent at any time, the other fields before open.
	hook  atomic.Pointer[func(c *fakeConn, h *iscsi.BHS, data []byte) bool]
	start sync.Once
	// deaf drops connections that log in with this ISID.
	deaf atomic.Pointer[iscsi.ISID]
	// window is how many commands beyond the last it lets the initiator send.
	window uint32
	// refuse holds operation codes that are answered with ILLEGAL REQUEST.
	refuse map[byte]bool
	// r2t is how many bytes one R2T asks for.
	r2t int
	// designator is what VPD 83h says, provisioning what B2h says, none where 0.
	designator   byte
	provisioning byte

	mu     sync.Mutex // protects what follows
	data   []byte
	mapped []bool
	logins []iscsi.ISID
	conns  []*fakeConn
	wg     sync.WaitGroup
}

type fakeConn struct {
	*fakeTarget
	nc       net.Conn
	r        *iscsi.Reader
	params   iscsi.Params
	isid     iscsi.ISID
	statSN   uint32
	expCmdSN uint32
	// advertised is the last MaxCmdSN that was sent.
	advertised uint32
	writes     map[uint32]*fakeWrite
}

// fakeWrite is a command whose data is on its way.
type fakeWrite struct {
	head  iscsi.BHS
	got   []byte
	asked int
	sn    uint32
}

func newFakeTarget(t testing.TB) *fakeTarget {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeTarget{t: t, ln: ln, want: iscsi.DefaultParams(), window: 32, refuse: map[byte]bool{},
		r2t: 1 << 16, designator: 1, data: make([]byte, 4<<20), mapped: make([]bool, 4<<20/512)}
	f.want.MaxRecv = 8192
	t.Cleanup(func() {
		ln.Close()
		f.drop()
		f.wg.Wait()
	})
	return f
}

func (f *fakeTarget) bend(hook func(c *fakeConn, h *iscsi.BHS, data []byte) bool) {
	f.hook.Store(&hook)
}

func (f *fakeTarget) listen() {
	f.wg.Go(func() {
		for {
			nc, err := f.ln.Accept()
			if err != nil {
				return
			}
			c := &fakeConn{fakeTarget: f, nc: nc, r: iscsi.NewReader(nc, 64<<10), writes: map[uint32]*fakeWrite{}}
			f.mu.Lock()
			f.conns = append(f.conns, c)
			f.mu.Unlock()
			f.wg.Go(c.serve)
		}
	})
}

func (f *fakeTarget) address() string {
	return "iscsi://" + f.ln.Addr().String() + "/iqn.2026-11.net.example:fake/3"
}

// drop closes all connections.
func (f *fakeTarget) drop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		c.nc.Close()
	}
	f.conns = nil
}

func (f *fakeTarget) open(opts Options) Device {
	f.t.Helper()
	f.start.Do(f.listen)
	dev, err := Open(f.t.Context(), f.address(), opts)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { dev.Close() })
	return dev
}

func (c *fakeConn) serve() {
	defer c.nc.Close()
	if !c.login() {
		return
	}
	for {
		h, err := c.r.Next()
		if err != nil {
			return
		}
		head := *h
		data, err := c.r.Data()
		if err != nil {
			return
		}
		if !head.Immediate() && head.Opcode() == iscsi.OpSCSICommand {
			if head.CmdSN() != c.expCmdSN {
				c.t.Errorf("CmdSN %d, want %d", head.CmdSN(), c.expCmdSN)
			}
			if iscsi.SNLess(c.advertised, head.CmdSN()) {
				c.t.Errorf("CmdSN %d is beyond MaxCmdSN %d", head.CmdSN(), c.advertised)
			}
			c.expCmdSN++
		}
		if hook := c.hook.Load(); hook != nil && (*hook)(c, &head, data) {
			continue
		}
		switch head.Opcode() {
		case iscsi.OpSCSICommand:
			c.command(head, data)
		case iscsi.OpDataOut:
			c.dataOut(&head, data)
		case iscsi.OpNopOut:
			if head.ITT() != iscsi.NoTag {
				c.reply(iscsi.OpNopIn, &head, iscsi.FlagFinal, 0, 0, nil)
			}
		case iscsi.OpTaskMgmt:
			delete(c.writes, head.TTT())
			c.reply(iscsi.OpTaskMgmtResp, &head, iscsi.FlagFinal, 0, 0, nil)
		case iscsi.OpLogout:
			c.reply(iscsi.OpLogoutResp, &head, iscsi.FlagFinal, 0, 0, nil)
			return
		default:
			c.t.Errorf("unexpected %v", head.Opcode())
		}
	}
}

func (c *fakeConn) login() bool {
	n := iscsi.NewNegotiation(c.want)
	for {
		h, err := c.r.Next()
		if err != nil {
			return false
		}
		head := *h
		data, err := c.r.Data()
		if err != nil {
			return false
		}
		pairs, err := iscsi.ParseText(data)
		if err != nil {
			c.t.Errorf("login text: %v", err)
			return false
		}
		var out []iscsi.Pair
		for _, p := range pairs {
			if answer, known, err := n.Respond(p); err != nil {
				c.t.Errorf("login: %v", err)
			} else if known && answer != "" {
				out = append(out, iscsi.Pair{Key: p.Key, Value: answer})
			} else if p.Key == "AuthMethod" {
				out = append(out, iscsi.Pair{Key: "AuthMethod", Value: "None"})
			}
		}
		if head.CSG() == iscsi.StageOperational {
			out = append(out, iscsi.Pair{Key: "MaxRecvDataSegmentLength", Value: "8192"})
		}
		if isid := c.deaf.Load(); isid != nil && *isid == head.ISID() {
			return false
		}
		c.isid = head.ISID()
		c.expCmdSN = head.CmdSN()
		text := iscsi.AppendText(nil, out...)
		resp := iscsi.BHS{}
		resp.SetOpcode(iscsi.OpLoginResponse)
		resp.SetFlags(head.Flags())
		resp.SetISID(head.ISID())
		resp.SetITT(head.ITT())
		c.numbers(&resp, true)
		c.send(&resp, text)
		if head.NSG() == iscsi.StageFullFeature && head.Flags()&iscsi.FlagTransit != 0 {
			n.Finish()
			c.params = n.Params
			c.r.MaxData = 8192
			c.mu.Lock()
			c.logins = append(c.logins, head.ISID())
			c.mu.Unlock()
			return true
		}
	}
}

func (c *fakeConn) numbers(h *iscsi.BHS, status bool) {
	h.SetStatSN(c.statSN)
	if status {
		c.statSN++
	}
	h.SetExpCmdSN(c.expCmdSN)
	c.advertised = c.expCmdSN + c.window - 1
	h.SetMaxCmdSN(c.advertised)
}

func (c *fakeConn) send(h *iscsi.BHS, data []byte) {
	h.SetDataLength(len(data))
	p := append(append([]byte(nil), h[:]...), data...)
	for len(p)%4 != 0 {
		p = append(p, 0)
	}
	if _, err := c.nc.Write(p); err != nil && err != io.EOF {
		return // the test closed it
	}
}

// reply answers req with a PDU that uses a StatSN up.
func (c *fakeConn) reply(op iscsi.Opcode, req *iscsi.BHS, flags, response, status byte, data []byte) {
	var h iscsi.BHS
	h.SetOpcode(op)
	h.SetFlags(flags)
	h.SetResponse(response)
	h.SetStatus(status)
	h.SetITT(req.ITT())
	h.SetTTT(iscsi.NoTag)
	c.numbers(&h, true)
	c.send(&h, data)
}

func (c *fakeConn) good(req *iscsi.BHS) {
	c.reply(iscsi.OpSCSIResponse, req, iscsi.FlagFinal, 0, statusGood, nil)
}

func (c *fakeConn) status(req *iscsi.BHS, status byte) {
	c.reply(iscsi.OpSCSIResponse, req, iscsi.FlagFinal, 0, status, nil)
}

func (c *fakeConn) check(req *iscsi.BHS, key, asc, ascq byte) {
	sense := make([]byte, 2+18)
	sense[1] = 18
	sense[2], sense[4], sense[9], sense[14], sense[15] = 0x70, key, 10, asc, ascq
	c.reply(iscsi.OpSCSIResponse, req, iscsi.FlagFinal, 0, statusCheckCondition, sense)
}

// in sends data and GOOD, in pieces of at most 3000 bytes.
func (c *fakeConn) in(req *iscsi.BHS, data []byte) {
	data = data[:min(len(data), int(req.ExpectedLength()))]
	for off, sn := 0, uint32(0); ; sn++ {
		n := min(3000, len(data)-off)
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpDataIn)
		h.SetITT(req.ITT())
		h.SetTTT(iscsi.NoTag)
		h.SetDataSN(sn)
		h.SetBufferOffset(uint32(off))
		last := off+n == len(data)
		if last {
			h.SetFlags(iscsi.FlagFinal | iscsi.FlagStatus)
			if rest := int(req.ExpectedLength()) - len(data); rest > 0 {
				h.SetFlags(h.Flags() | iscsi.FlagUnderflow)
				h.SetResidual(uint32(rest))
			}
		}
		c.numbers(&h, last)
		c.send(&h, data[off:off+n])
		if off += n; last {
			return
		}
	}
}

func (c *fakeConn) command(req iscsi.BHS, data []byte) {
	if req.Flags()&iscsi.FlagWrite != 0 && len(data) < int(req.ExpectedLength()) {
		c.writes[req.ITT()] = &fakeWrite{head: req, got: append([]byte(nil), data...)}
		if req.Final() {
			c.ask(c.writes[req.ITT()])
		}
		return
	}
	c.execute(&req, data)
}

func (c *fakeConn) ask(w *fakeWrite) {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpR2T)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(w.head.ITT())
	h.SetTTT(w.head.ITT() ^ 0x5a5a)
	h.SetDataSN(w.sn)
	h.SetBufferOffset(uint32(len(w.got)))
	n := min(c.r2t, int(w.head.ExpectedLength())-len(w.got))
	h.SetDesiredLength(uint32(n))
	w.sn++
	w.asked = len(w.got) + n
	c.numbers(&h, false)
	c.send(&h, nil)
}

func (c *fakeConn) dataOut(h *iscsi.BHS, data []byte) {
	w := c.writes[h.ITT()]
	if w == nil {
		return
	}
	if int(h.BufferOffset()) != len(w.got) {
		c.t.Errorf("Data-Out at %d, want %d", h.BufferOffset(), len(w.got))
	}
	w.got = append(w.got, data...)
	if w.asked == 0 && len(w.got) > int(c.params.FirstBurstLength) {
		c.t.Errorf("%d bytes unasked, more than FirstBurstLength %d", len(w.got), c.params.FirstBurstLength)
	}
	switch {
	case len(w.got) == int(w.head.ExpectedLength()):
		delete(c.writes, h.ITT())
		c.execute(&w.head, w.got)
	case h.Final():
		if w.asked != 0 && len(w.got) != w.asked {
			c.t.Errorf("sequence ends at %d, want %d", len(w.got), w.asked)
		}
		c.ask(w)
	}
}

// execute does a command whose data is complete.
func (c *fakeConn) execute(req *iscsi.BHS, data []byte) {
	cdb := req.CDB()
	if c.refuse[cdb[0]] {
		c.check(req, senseIllegalRequest, 0x20, 0)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch cdb[0] {
	case opTestUnitReady, opSyncCache10, opSyncCache16:
		c.good(req)
	case opInquiry:
		c.in(req, c.inquiry(cdb))
	case opModeSense6:
		c.in(req, []byte{7, 0, 0, 0, 0x08, 2, 0x04, 0})
	case opReadCapacity10:
		c.in(req, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(len(c.mapped)-1)), 512))
	case opServiceIn16:
		if cdb[1] == serviceGetLBAStatus {
			c.in(req, c.lbaStatus(binary.BigEndian.Uint64(cdb[2:])))
			return
		}
		p := make([]byte, 32)
		binary.BigEndian.PutUint64(p, uint64(len(c.mapped)-1))
		binary.BigEndian.PutUint32(p[8:], 512)
		if c.provisioning != 0 {
			p[14] = 0xc0 // LBPME, LBPRZ
		}
		c.in(req, p)
	case opRead10, opWrite10, opRead16, opWrite16:
		at, n := uint64(binary.BigEndian.Uint32(cdb[2:])), uint64(binary.BigEndian.Uint16(cdb[7:]))
		if cdb[0] >= 0x80 {
			at, n = binary.BigEndian.Uint64(cdb[2:]), uint64(binary.BigEndian.Uint32(cdb[10:]))
		}
		if at+n > uint64(len(c.mapped)) {
			c.check(req, senseIllegalRequest, 0x21, 0)
			return
		}
		blocks := c.data[at*512 : (at+n)*512]
		if cdb[0] == opRead10 || cdb[0] == opRead16 {
			if n == 0 {
				c.good(req)
				return
			}
			c.in(req, blocks)
			return
		}
		copy(blocks, data)
		for l := at; l < at+n; l++ {
			c.mapped[l] = true
		}
		c.good(req)
	case opUnmap:
		// It frees every second block alone, as the standard lets it.
		for d := data[8:]; len(d) >= 16; d = d[16:] {
			at := binary.BigEndian.Uint64(d)
			for l := at; l < at+uint64(binary.BigEndian.Uint32(d[8:])); l++ {
				if l%2 == 0 {
					clear(c.data[l*512 : l*512+512])
					c.mapped[l] = false
				}
			}
		}
		c.good(req)
	default:
		c.check(req, senseIllegalRequest, 0x20, 0)
	}
}

func (c *fakeConn) inquiry(cdb []byte) []byte {
	if cdb[1]&1 == 0 {
		p := make([]byte, 36)
		copy(p[8:], "FAKE    BENDABLE        1   ")
		return p
	}
	switch cdb[2] {
	case 0x83:
		return []byte{0, 0x83, 0, 12, 1, 3, 0, 8, 0x30, 0, 0, 0, 0, 0, 0, c.designator}
	case 0xb2:
		return []byte{0, 0xb2, 0, 4, 0, c.provisioning, 2, 0}
	}
	return []byte{0, cdb[2], 0, 0}
}

func (c *fakeConn) lbaStatus(at uint64) []byte {
	p := make([]byte, 24)
	binary.BigEndian.PutUint32(p, 20)
	n := uint32(0)
	for l := at; l < uint64(len(c.mapped)) && c.mapped[l] == c.mapped[at]; l++ {
		n++
	}
	binary.BigEndian.PutUint64(p[8:], at)
	binary.BigEndian.PutUint32(p[16:], n)
	if !c.mapped[at] {
		p[20] = 1
	}
	return p
}
