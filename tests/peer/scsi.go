package peer

import (
	"context"
	"fmt"
	"net"
	"time"

	"lunshift/iscsi"
)

// Session is a plain initiator: one session, one command at a time, any CDB. It is for
// commands that no tool at hand sends. It reports unit attentions like any other status.
type Session struct {
	nc    net.Conn
	r     *iscsi.Reader
	lun   uint64
	itt   uint32
	cmdSN uint32
	expSN uint32
}

// Answer is the end of a command.
type Answer struct {
	Status         byte
	Key, ASC, ASCQ byte // of its sense data
	Data           []byte
}

// CommandTime is how long a command of a Session may take.
const CommandTime = 30 * time.Second

// Login opens a session as the LUN's initiator with that ISID, without authentication.
func (l LUN) Login(ctx context.Context, isid iscsi.ISID) (*Session, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", l.Portal)
	if err != nil {
		return nil, err
	}
	s := &Session{nc: nc, r: iscsi.NewReader(nc, 1<<16), cmdSN: 1}
	s.r.MaxData = 1 << 20
	s.lun, _ = iscsi.EncodeLUN(l.Number)
	pairs := []iscsi.Pair{
		{Key: "InitiatorName", Value: l.Initiator}, {Key: "TargetName", Value: l.IQN}, {Key: "SessionType", Value: "Normal"},
		{Key: "HeaderDigest", Value: "None"}, {Key: "DataDigest", Value: "None"},
		{Key: "InitialR2T", Value: "Yes"}, {Key: "ImmediateData", Value: "Yes"},
		{Key: "MaxRecvDataSegmentLength", Value: fmt.Sprint(1 << 18)},
	}
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagTransit | iscsi.StageOperational<<2 | iscsi.StageFullFeature)
	h.SetISID(isid)
	h.SetCmdSN(s.cmdSN)
	if err := s.send(&h, iscsi.AppendText(nil, pairs...)); err != nil {
		nc.Close()
		return nil, err
	}
	p, err := s.r.Next()
	if err == nil && (p.Opcode() != iscsi.OpLoginResponse || p.LoginStatus() != iscsi.LoginSuccess) {
		err = fmt.Errorf("login to %s: %v, status %04Xh", l.IQN, p.Opcode(), p.LoginStatus())
	}
	if err == nil {
		s.expSN = p.StatSN() + 1
		_, err = s.r.Data()
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return s, nil
}

func (s *Session) send(h *iscsi.BHS, data []byte) error {
	s.nc.SetDeadline(time.Now().Add(CommandTime))
	b := *h
	b.SetDataLength(len(data))
	out := append(b[:], data...)
	for len(out)%4 != 0 {
		out = append(out, 0)
	}
	_, err := s.nc.Write(out)
	return err
}

// Do sends a command with at most 8 KiB of data-out, or with room for in bytes of
// data-in, and waits for its end.
func (s *Session) Do(cdb, out []byte, in int) (a Answer, err error) {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpSCSICommand)
	flags, n := byte(iscsi.FlagFinal|iscsi.AttrSimple), in
	if in > 0 {
		flags |= iscsi.FlagRead
	}
	if len(out) > 0 {
		flags, n = flags|iscsi.FlagWrite, len(out)
	}
	h.SetFlags(flags)
	h.SetLUN(s.lun)
	s.itt++
	h.SetITT(s.itt)
	h.SetExpectedLength(uint32(n))
	h.SetCmdSN(s.cmdSN)
	h.SetExpStatSN(s.expSN)
	s.cmdSN++
	copy(h.CDB(), cdb)
	if err := s.send(&h, out); err != nil {
		return a, err
	}
	for {
		p, err := s.r.Next()
		if err != nil {
			return a, err
		}
		head := *p
		data, err := s.r.Data()
		if err != nil {
			return a, err
		}
		switch head.Opcode() {
		case iscsi.OpNopIn, iscsi.OpAsync:
			continue
		case iscsi.OpDataIn:
			a.Data = append(a.Data, data...)
			if head.Flags()&iscsi.FlagStatus == 0 {
				continue
			}
		case iscsi.OpSCSIResponse:
			if len(data) >= 2+14 {
				a.Key, a.ASC, a.ASCQ = data[4]&0xf, data[14], data[15]
			}
		default:
			return a, fmt.Errorf("%v for a command", head.Opcode())
		}
		a.Status, s.expSN = head.Status(), head.StatSN()+1
		return a, nil
	}
}

// Close drops the connection.
func (s *Session) Close() error { return s.nc.Close() }
