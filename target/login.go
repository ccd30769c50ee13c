package target

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"lunshift/iscsi"
)

// longestAHS is that of a bidirectional command with an extended CDB, in bytes.
const longestAHS = 256 + 8

var (
	errLoginRefused = errors.New("login refused")
	// errCutOver is a refusal that initiators meet again and again until their
	// configuration follows: it is no fault.
	errCutOver = fmt.Errorf("%w: the target was cut over", errLoginRefused)
)

// negotiation is the login of one connection, apart from I/O: requests in,
// responses out (RFC 7143 6.3, 11.12, 11.13).
type negotiation struct {
	// resolve says whether a target may be logged in to: a login status.
	resolve func(initiator, iqn string) uint16
	neg     *iscsi.Negotiation

	begun     bool
	stage     int
	itt       uint32
	isid      iscsi.ISID
	tsih      uint16
	cid       uint16
	initiator string
	target    string
	discovery bool
	alias     string
	group     uint16 // of the portal
	text      []byte // of requests with the C bit
	declared  bool   // MaxRecvDataSegmentLength was sent
}

// step takes a request and its text, and gives the response with its text. done says
// that the full feature phase begins with it. A response whose status is not
// success ends the connection; why says what was wrong.
func (n *negotiation) step(h *iscsi.BHS, data []byte) (r iscsi.BHS, text []byte, done bool, why error) {
	r.SetOpcode(iscsi.OpLoginResponse)
	r.SetISID(h.ISID())
	r.SetTSIH(h.TSIH())
	r.SetITT(h.ITT())
	fail := func(status uint16, format string, args ...any) (iscsi.BHS, []byte, bool, error) {
		r.SetFlags(byte(h.CSG() << 2))
		r.SetLoginStatus(status)
		return r, nil, false, fmt.Errorf("%w: "+format, append([]any{errLoginRefused}, args...)...)
	}
	if h[3] > 0 { // Version-min; this is version 0
		return fail(iscsi.LoginUnsupportedVersion, "version %d", h[3])
	}
	if !n.begun {
		n.begun = true
		n.itt, n.isid, n.tsih, n.cid, n.stage = h.ITT(), h.ISID(), h.TSIH(), h.CID(), h.CSG()
		if n.stage != iscsi.StageSecurity && n.stage != iscsi.StageOperational {
			return fail(iscsi.LoginInvalidRequest, "login begins in stage %d", n.stage)
		}
	} else if h.ITT() != n.itt || h.ISID() != n.isid || h.TSIH() != n.tsih || h.CID() != n.cid {
		return fail(iscsi.LoginInvalidRequest, "login changed its identity midway")
	}
	transit, more := h.Flags()&iscsi.FlagTransit != 0, h.Flags()&iscsi.FlagContinue != 0
	if h.CSG() != n.stage || transit && (more || h.NSG() <= h.CSG() || h.NSG() == 2) {
		return fail(iscsi.LoginInvalidRequest, "stage %d to %d in stage %d", h.CSG(), h.NSG(), n.stage)
	}
	if len(n.text)+len(data) > iscsi.MaxText {
		return fail(iscsi.LoginOutOfResources, "login text longer than %d bytes", iscsi.MaxText)
	}
	n.text = append(n.text, data...)
	r.SetFlags(byte(n.stage << 2))
	if more {
		return r, nil, false, nil
	}
	pairs, err := iscsi.ParseText(n.text)
	n.text = n.text[:0]
	if err != nil {
		return fail(iscsi.LoginInitiatorError, "%v", err)
	}
	answers, status, err := n.answer(pairs)
	if err != nil {
		return fail(status, "%w", err)
	}
	if transit {
		r.SetFlags(iscsi.FlagTransit | byte(n.stage<<2) | byte(h.NSG()))
		n.stage = h.NSG()
		done = n.stage == iscsi.StageFullFeature
	}
	return r, iscsi.AppendText(nil, answers...), done, nil
}

// answer settles the keys of one step.
func (n *negotiation) answer(pairs []iscsi.Pair) (out []iscsi.Pair, status uint16, err error) {
	first := n.initiator == ""
	if first {
		if status, err := n.identify(pairs); err != nil {
			return nil, status, err
		}
		if !n.discovery {
			if n.alias != "" {
				out = append(out, iscsi.Pair{Key: "TargetAlias", Value: n.alias})
			}
			out = append(out, iscsi.Pair{Key: "TargetPortalGroupTag", Value: fmt.Sprint(n.group)})
		}
	}
	for _, p := range pairs {
		switch p.Key {
		case "InitiatorName", "TargetName", "SessionType":
			if !first {
				return nil, iscsi.LoginInitiatorError, fmt.Errorf("%s after the first request", p.Key)
			}
			continue
		case "InitiatorAlias":
			continue
		case "AuthMethod":
			if n.stage != iscsi.StageSecurity {
				return nil, iscsi.LoginInitiatorError, errors.New("AuthMethod outside the security stage")
			}
			if !slices.Contains(strings.Split(p.Value, ","), iscsi.None) {
				return nil, iscsi.LoginAuthFailed, fmt.Errorf("initiator %s insists on authentication, the target asks for none", n.initiator)
			}
			out = append(out, iscsi.Pair{Key: p.Key, Value: iscsi.None})
			continue
		}
		answer, known, err := n.neg.Respond(p)
		switch {
		case err != nil:
			return nil, iscsi.LoginInitiatorError, err
		case !known:
			out = append(out, iscsi.Pair{Key: p.Key, Value: iscsi.NotUnderstood})
		case answer != "":
			out = append(out, iscsi.Pair{Key: p.Key, Value: answer})
		}
	}
	if n.stage == iscsi.StageOperational && !n.declared {
		n.declared = true
		out = append(out, iscsi.Pair{Key: "MaxRecvDataSegmentLength", Value: fmt.Sprint(n.neg.Want.MaxRecv)})
	}
	return out, 0, nil
}

// identify takes the keys that the first request must bring (RFC 7143 6.3).
func (n *negotiation) identify(pairs []iscsi.Pair) (status uint16, err error) {
	name, ok := iscsi.Lookup(pairs, "InitiatorName")
	if !ok {
		return iscsi.LoginMissingParameter, errors.New("no InitiatorName")
	}
	if err := checkName(name); err != nil {
		return iscsi.LoginInitiatorError, fmt.Errorf("InitiatorName: %w", err)
	}
	n.initiator = name
	switch kind, ok := iscsi.Lookup(pairs, "SessionType"); {
	case ok && kind == "Discovery":
		n.discovery = true
		n.neg.Discovery = true
	case ok && kind != "Normal":
		return iscsi.LoginBadSessionType, errors.New("SessionType is neither Normal nor Discovery")
	}
	n.target, ok = iscsi.Lookup(pairs, "TargetName")
	if n.discovery {
		n.target = ""
		return 0, nil
	}
	if !ok {
		return iscsi.LoginMissingParameter, errors.New("no TargetName")
	}
	switch status := n.resolve(name, n.target); status {
	case iscsi.LoginSuccess:
	case iscsi.LoginTargetRemoved:
		return status, fmt.Errorf("initiator %s asks for target %q: %w", name, n.target, errCutOver)
	default:
		return status, fmt.Errorf("initiator %s asks for target %q, which is not here", name, n.target)
	}
	return 0, nil
}

// login brings the connection to the full feature phase.
func (c *conn) login() error {
	c.nc.SetDeadline(time.Now().Add(c.srv.cfg.LoginTimeout))
	cfg := &c.srv.cfg
	want := iscsi.DefaultParams()
	want.HeaderDigest, want.DataDigest = true, true
	want.InitialR2T = false
	want.MaxRecv = cfg.MaxRecvDataSegmentLength
	want.MaxBurstLength, want.FirstBurstLength = cfg.MaxBurstLength, cfg.FirstBurstLength
	want.DefaultTime2Wait, want.DefaultTime2Retain = 2, 0
	n := &negotiation{group: c.group, neg: iscsi.NewNegotiation(want), resolve: func(_, iqn string) uint16 {
		found, status := c.srv.find(iqn)
		if found != nil {
			c.node = found
		}
		return status
	}}
	if err := c.loginSteps(n); err != nil {
		if n := (net.Error)(nil); errors.As(err, &n) && n.Timeout() && !errors.Is(err, errLoginRefused) {
			return fmt.Errorf("no login within %v", cfg.LoginTimeout)
		}
		return err
	}
	// A drain between must win over the deadline that is lifted here.
	c.nc.SetDeadline(time.Time{})
	c.mu.Lock()
	if c.draining {
		c.nc.SetReadDeadline(time.Unix(1, 0))
	}
	c.mu.Unlock()
	return nil
}

func (c *conn) loginSteps(n *negotiation) error {
	for {
		h, err := c.r.Next()
		if err != nil {
			return err
		}
		if h.Opcode() != iscsi.OpLoginRequest {
			return fmt.Errorf("protocol error: %v before login", h.Opcode())
		}
		head := *h
		data, err := c.r.Data()
		if err != nil {
			return err
		}
		if !n.begun {
			c.expCmdSN = head.CmdSN()
			c.statSN = head.ExpStatSN()
		}
		if c.node != nil {
			n.alias = c.node.alias
		}
		r, text, done, why := n.step(&head, data)
		if why == nil && done {
			if status, err := c.begin(n); err != nil {
				r.SetFlags(byte(head.CSG() << 2))
				r.SetLoginStatus(status)
				text, done, why = nil, false, err
			} else {
				r.SetTSIH(c.tsih)
			}
		}
		c.mu.Lock()
		if r.LoginStatus() == iscsi.LoginSuccess {
			c.status(&r)
		} else {
			c.numbers(&r)
		}
		c.w.Append(&r, nil, text, nil)
		err = c.w.Flush()
		if done {
			c.w.HeaderDigest, c.w.DataDigest = c.params.HeaderDigest, c.params.DataDigest
			c.full = true
		}
		c.mu.Unlock()
		if why != nil {
			if errors.Is(why, errCutOver) {
				c.log.Info(why.Error())
			} else {
				c.log.Warn(why.Error())
			}
			return why
		}
		if err != nil {
			return err
		}
		if done {
			c.r.MaxAHS = longestAHS
			c.r.HeaderDigest, c.r.DataDigest = c.params.HeaderDigest, c.params.DataDigest
			return nil
		}
	}
}

// find gives a target by name, or the login status that says why not.
func (s *Server) find(iqn string) (*node, uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.targets[iqn]
	switch {
	case n == nil:
		return nil, iscsi.LoginNotFound
	case n.gone:
		return nil, iscsi.LoginTargetRemoved
	}
	return n, iscsi.LoginSuccess
}

// begin makes the session. An older session of the same initiator port ends first,
// its tasks included (session reinstatement, RFC 7143 6.3.5).
func (c *conn) begin(n *negotiation) (status uint16, err error) {
	n.neg.Finish()
	c.params = n.neg.Params
	if !n.declared {
		c.params.MaxRecv = 8192
	}
	c.r.MaxData = int(c.params.MaxRecv)
	c.initiator, c.isid = n.initiator, n.isid
	c.log = c.log.WithField("initiator", c.initiator)
	if n.tsih != 0 {
		// A session has one connection here: there is none to join.
		return iscsi.LoginNoSession, fmt.Errorf("%w: session %d does not exist or takes no further connection", errLoginRefused, n.tsih)
	}
	if n.discovery {
		c.node = nil
	}
	limit := time.After(c.srv.cfg.LoginTimeout)
	for {
		old := c.srv.register(c)
		if old == nil {
			break
		}
		old.close(errors.New("session reinstated by its initiator"))
		select {
		case <-old.done:
		case <-limit:
			return iscsi.LoginServiceUnavailable, fmt.Errorf("%w: the initiator's former session has commands that do not end", errLoginRefused)
		case <-c.srv.ending:
			return iscsi.LoginServiceUnavailable, ErrClosed
		}
	}
	if c.node != nil {
		// A target retired since its name was looked up takes nobody any more.
		if now, status := c.srv.find(c.node.iqn); now != c.node {
			if status == iscsi.LoginTargetRemoved {
				return status, fmt.Errorf("initiator %s asks for target %q: %w", c.initiator, c.node.iqn, errCutOver)
			}
			if status == iscsi.LoginSuccess {
				status = iscsi.LoginNotFound
			}
			return status, fmt.Errorf("%w: target %s was removed", errLoginRefused, c.node.iqn)
		}
		c.mu.Lock()
		for id := range c.units() {
			c.attention[id] = []sense{attnPowerOn}
		}
		c.mu.Unlock()
		c.log.WithField("target", c.node.iqn).Info("session began")
	}
	return 0, nil
}

// register enters c among the sessions, or gives the session that stands in its way.
func (s *Server) register(c *conn) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.node != nil {
		for o := range s.conns {
			if o != c && o.loggedIn && o.node == c.node && o.initiator == c.initiator && o.isid == c.isid {
				return o
			}
		}
	}
	used := func(h uint16) bool {
		for o := range s.conns {
			if o.loggedIn && o.tsih == h {
				return true
			}
		}
		return false
	}
	for s.tsih++; s.tsih == 0 || used(s.tsih); s.tsih++ {
	}
	c.tsih, c.loggedIn = s.tsih, true
	return nil
}
