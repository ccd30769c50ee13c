package target

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"lunshift/iscsi"
)

// longestAHS is that of a bidirectional command with an extended CDB, in bytes.
const longestAHS = 256 + 8

// longestName is that of an iSCSI name, in bytes (RFC 7143 4.2.7.1).
const longestName = 223

// Limits of one login. A declared text limit of 1 MiB takes 128 requests of 8 KiB, the
// default MaxRecvDataSegmentLength (RFC 7143 13.12), which holds during a login.
const (
	mostLoginRequests = 256
	loginSegment      = 8192
)

var (
	errLoginRefused = errors.New("login refused")
	// errCutOver is a refusal that initiators meet again and again until their
	// configuration follows: it is no fault.
	errCutOver = fmt.Errorf("%w: the target was cut over", errLoginRefused)
	// errMoved is no fault either.
	errMoved = fmt.Errorf("%w: the target is elsewhere", errLoginRefused)
	// errLeaving: initiators were asked to leave, and come again.
	errLeaving = fmt.Errorf("%w: the target is being cut over", errLoginRefused)
	// errAuthentication: the initiator did not prove what it must.
	errAuthentication = errors.New("authentication failed")
)

// negotiation is the login of one connection, apart from I/O: requests in,
// responses out (RFC 7143 6.3, 11.12, 11.13).
type negotiation struct {
	// peer is the initiator as far as it is known.
	peer
	// ask gives the terms of a target or, for discovery, of the server; false where
	// nothing is there for this initiator.
	ask func(p *peer, discovery bool, target string) (terms, bool)
	// attempt allows a proof to be looked at and counts it as failed; succeeded takes that
	// back.
	attempt   func() bool
	succeeded func()
	// await waits for the end of a departure; false where the login is to be refused.
	await      func(*Departure) bool
	challenges *challenges
	neg        *iscsi.Negotiation
	maxText    int // bytes

	begun     bool
	requests  int
	stage     int
	itt       uint32
	isid      iscsi.ISID
	tsih      uint16
	cid       uint16
	target    string
	discovery bool
	text      []byte // of requests with the C bit
	rest      []byte // of an answer that is longer than one PDU
	declared  bool   // MaxRecvDataSegmentLength was sent
	named     bool   // TargetAlias was

	terms     terms
	settled   bool // the initiator proved what it must
	method    bool // AuthMethod was negotiated
	chap      *iscsi.CHAPTarget
	challenge []byte // the one that was sent
	counted   bool   // the failure was
}

// step takes a request and its text, and gives the response with its text. done says
// that the full feature phase begins with it. A response whose status is not
// success ends the connection; why says what was wrong.
func (n *negotiation) step(h *iscsi.BHS, data []byte) (r iscsi.BHS, text []byte, done bool, why error) {
	fail := func(status uint16, format string, args ...any) (iscsi.BHS, []byte, bool, error) {
		return refusal(h, status), nil, false, fmt.Errorf("%w: "+format, append([]any{errLoginRefused}, args...)...)
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
	if n.requests++; n.requests > mostLoginRequests {
		return fail(iscsi.LoginInvalidRequest, "more than %d login requests", mostLoginRequests)
	}
	transit, more := h.Flags()&iscsi.FlagTransit != 0, h.Flags()&iscsi.FlagContinue != 0
	if h.CSG() != n.stage || transit && (more || h.NSG() <= h.CSG() || h.NSG() == 2) {
		return fail(iscsi.LoginInvalidRequest, "stage %d to %d in stage %d", h.CSG(), h.NSG(), n.stage)
	}
	r = response(h)
	r.SetFlags(byte(n.stage << 2))
	if len(n.rest) > 0 {
		if more || len(data) > 0 {
			return fail(iscsi.LoginInvalidRequest, "text while the answer to the text before is not taken")
		}
	} else {
		if len(n.text)+len(data) > n.maxText {
			return fail(iscsi.LoginOutOfResources, "login text longer than %d bytes", n.maxText)
		}
		n.text = append(n.text, data...)
		if more {
			return r, nil, false, nil
		}
		pairs, err := iscsi.ParseText(n.text)
		n.text = n.text[:0]
		if err != nil {
			return fail(iscsi.LoginInitiatorError, "%w", err)
		}
		answers, status, err := n.answer(pairs, transit)
		if err != nil {
			r, _, _, why := fail(status, "%w", err)
			return r, iscsi.AppendText(nil, answers...), false, why
		}
		n.rest = iscsi.AppendText(nil, answers...)
	}
	if len(n.rest) > loginSegment {
		text, n.rest = n.rest[:loginSegment], n.rest[loginSegment:]
		r.SetFlags(iscsi.FlagContinue | byte(n.stage<<2))
		return r, text, false, nil
	}
	text, n.rest = n.rest, nil
	if transit && n.settled {
		r.SetFlags(iscsi.FlagTransit | byte(n.stage<<2) | byte(h.NSG()))
		n.stage = h.NSG()
		done = n.stage == iscsi.StageFullFeature
	}
	return r, text, done, nil
}

// response begins the answer to a login request.
func response(h *iscsi.BHS) (r iscsi.BHS) {
	r.SetOpcode(iscsi.OpLoginResponse)
	r.SetISID(h.ISID())
	r.SetTSIH(h.TSIH())
	r.SetITT(h.ITT())
	return r
}

// refusal is the answer that ends a login.
func refusal(h *iscsi.BHS, status uint16) iscsi.BHS {
	r := response(h)
	r.SetFlags(byte(h.CSG() << 2))
	r.SetLoginStatus(status)
	return r
}

// answer settles the keys of one step. With an error it gives what goes with the status.
func (n *negotiation) answer(pairs []iscsi.Pair, transit bool) (out []iscsi.Pair, status uint16, err error) {
	first := n.initiator == ""
	if first {
		if status, err := n.identify(pairs); err != nil {
			return nil, status, err
		}
		if len(n.terms.asks) == 0 { // nothing is to be proven
			if out, status, err := n.settle(); err != nil {
				return out, status, err
			}
		}
		if !n.discovery {
			out = append(out, iscsi.Pair{Key: "TargetPortalGroupTag", Value: fmt.Sprint(n.group)})
		}
	}
	chap := map[string]string{}
	var burst *iscsi.Pair // FirstBurstLength follows MaxBurstLength
	for i, p := range pairs {
		switch p.Key {
		case "InitiatorName", "TargetName", "SessionType":
			if !first {
				return nil, iscsi.LoginInitiatorError, fmt.Errorf("%s after the first request", p.Key)
			}
			continue
		case "InitiatorAlias":
			continue
		case "AuthMethod":
			method, status, err := n.chooseMethod(p.Value)
			if err != nil {
				return nil, status, err
			}
			out = append(out, iscsi.Pair{Key: p.Key, Value: method})
			continue
		case "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R":
			if _, twice := chap[p.Key]; twice || n.chap == nil || n.stage != iscsi.StageSecurity {
				return nil, iscsi.LoginInitiatorError, fmt.Errorf("%s out of place", p.Key)
			}
			chap[p.Key] = p.Value
			continue
		case "FirstBurstLength":
			if burst == nil {
				burst = &pairs[i]
				continue
			}
		}
		if out, err = n.operational(out, p); err != nil {
			return nil, iscsi.LoginInitiatorError, err
		}
	}
	if burst != nil {
		if out, err = n.operational(out, *burst); err != nil {
			return nil, iscsi.LoginInitiatorError, err
		}
	}
	if len(chap) > 0 {
		answers, status, err := n.authenticate(pairs)
		if err != nil {
			return answers, status, err
		}
		out = append(out, answers...)
	}
	if !n.settled && n.chap == nil && (transit || n.stage != iscsi.StageSecurity) {
		if out, status, err := n.withoutProof(); err != nil {
			return out, status, err
		}
	}
	if node := n.terms.node; n.settled && !n.named && !n.discovery && node != nil && node.alias != "" {
		n.named = true
		out = append(out, iscsi.Pair{Key: "TargetAlias", Value: node.alias})
	}
	if n.stage == iscsi.StageOperational && !n.declared {
		n.declared = true
		out = append(out, iscsi.Pair{Key: "MaxRecvDataSegmentLength", Value: fmt.Sprint(n.neg.Want.MaxRecv)})
	}
	return out, 0, nil
}

// operational answers one operational key.
func (n *negotiation) operational(out []iscsi.Pair, p iscsi.Pair) ([]iscsi.Pair, error) {
	answer, known, err := n.neg.Respond(p)
	switch {
	case err != nil:
		return nil, err
	case !known:
		answer = iscsi.NotUnderstood
	case answer == "":
		return out, nil
	}
	return append(out, iscsi.Pair{Key: p.Key, Value: answer}), nil
}

// chooseMethod takes the first method of a list that the terms allow (RFC 7143 12.1).
func (n *negotiation) chooseMethod(list string) (method string, status uint16, err error) {
	if n.stage != iscsi.StageSecurity {
		return "", iscsi.LoginInitiatorError, errors.New("AuthMethod outside the security stage")
	}
	if n.method {
		return "", iscsi.LoginInitiatorError, errors.New("AuthMethod negotiated twice")
	}
	n.method = true
	for m := range strings.SplitSeq(list, ",") {
		switch {
		case m == "CHAP" && len(n.terms.asks) > 0:
			n.chap = &iscsi.CHAPTarget{Choose: n.terms.choose, Issued: n.challenges.issued}
			return m, 0, nil
		case m == iscsi.None && n.terms.open:
			return m, 0, nil // settled with the end of the stage
		}
	}
	if len(n.terms.asks) == 0 {
		return "", iscsi.LoginAuthFailed, fmt.Errorf("initiator %s insists on authentication, the target asks for none", n.initiator)
	}
	return "", iscsi.LoginAuthFailed, fmt.Errorf("initiator %s: %w: it does not offer CHAP", n.initiator, errAuthentication)
}

// withoutProof goes on for an initiator that proves nothing.
func (n *negotiation) withoutProof() ([]iscsi.Pair, uint16, error) {
	if !n.terms.open {
		return nil, iscsi.LoginAuthFailed, fmt.Errorf("initiator %s: %w: it does not authenticate and must", n.initiator, errAuthentication)
	}
	return n.settle()
}

// authenticate takes the keys of one step of CHAP (RFC 7143 12.1.3). Its errors hold
// nothing of what was sent.
func (n *negotiation) authenticate(pairs []iscsi.Pair) ([]iscsi.Pair, uint16, error) {
	failed := func(err error) error {
		return fmt.Errorf("initiator %s: %w: %w", n.initiator, errAuthentication, err)
	}
	switch {
	case n.settled:
		return nil, iscsi.LoginInitiatorError, fmt.Errorf("initiator %s: CHAP goes on after its end", n.initiator)
	case n.challenge == nil:
		out, err := n.chap.Challenge(pairs)
		if err != nil {
			return nil, iscsi.LoginAuthFailed, failed(err)
		}
		n.challenge = n.chap.Open()
		n.challenges.issue(n.challenge)
		return out, 0, nil
	}
	if !n.attempt() {
		return nil, iscsi.LoginServiceUnavailable, failed(errBlocked)
	}
	n.counted = true
	out, err := n.chap.Verify(pairs)
	if err != nil {
		return nil, iscsi.LoginAuthFailed, failed(err)
	}
	n.succeeded()
	n.counted = false
	n.proved, n.trusted = n.chap.Initiator, n.terms.trust
	if out, status, err := n.settle(); err != nil {
		return out, status, err
	}
	return out, 0, nil
}

// settle ends the question who the initiator is: it is let in, or told where else to go.
// While that is not decided it waits.
func (n *negotiation) settle() (out []iscsi.Pair, status uint16, err error) {
	n.settled = true
	if d := n.terms.leaving; d != nil {
		now, ok := terms{}, false
		if n.await(d) {
			now, ok = n.ask(&n.peer, false, n.target)
		}
		if !ok || now.leaving != nil || !now.satisfied(&n.peer) {
			return nil, iscsi.LoginServiceUnavailable, fmt.Errorf("initiator %s asks for target %s: %w", n.initiator, n.target, errLeaving)
		}
		n.terms = now
	}
	switch r := n.terms.moved; {
	case r != nil && r.over():
		return nil, iscsi.LoginTargetRemoved, fmt.Errorf("initiator %s asks for target %q: %w", n.initiator, n.target, errCutOver)
	case r != nil:
		// In a redirection the portal group tag is left out (RFC 7143 13.8).
		return []iscsi.Pair{{Key: "TargetAddress", Value: r.Address}}, r.status(),
			fmt.Errorf("initiator %s asks for target %s: %w, at %s", n.initiator, n.target, errMoved, r.Address)
	case n.terms.gone:
		return nil, iscsi.LoginTargetRemoved, fmt.Errorf("initiator %s asks for target %q: %w", n.initiator, n.target, errCutOver)
	}
	return nil, 0, nil
}

// identify takes the keys that the first request must bring (RFC 7143 6.3).
func (n *negotiation) identify(pairs []iscsi.Pair) (status uint16, err error) {
	name, ok := iscsi.Lookup(pairs, "InitiatorName")
	if !ok {
		return iscsi.LoginMissingParameter, errors.New("no InitiatorName")
	}
	err = checkName(name)
	if err == nil {
		err = checkName(fold(name)) // which may have more bytes
	}
	if err != nil {
		return iscsi.LoginInitiatorError, fmt.Errorf("InitiatorName: %w", err)
	}
	n.initiator = fold(name)
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
		n.terms, _ = n.ask(&n.peer, true, "")
		return 0, nil
	}
	if !ok {
		return iscsi.LoginMissingParameter, errors.New("no TargetName")
	}
	if len(n.target) > longestName {
		return iscsi.LoginNotFound, fmt.Errorf("initiator %s asks for a target name of %d bytes", name, len(n.target))
	}
	if n.terms, ok = n.ask(&n.peer, false, n.target); !ok {
		// The same for a target that is not here and for one that admits others only: a
		// stranger is not to learn which names exist.
		return iscsi.LoginNotFound, fmt.Errorf("initiator %s asks for target %q, which is not here or does not admit it", name, n.target)
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
	want.MaxOutstandingR2T = cfg.MaxOutstandingR2T
	n := &negotiation{
		peer: c.peer, neg: iscsi.NewNegotiation(want), maxText: cfg.MaxText, challenges: c.srv.challenges,
		attempt:   func() bool { return c.srv.failures.attempt(c.from) },
		succeeded: func() { c.srv.failures.succeeded(c.from) },
		await:     c.srv.await,
		ask: func(p *peer, discovery bool, target string) (terms, bool) {
			if discovery {
				return c.srv.admitToDiscovery(p), true
			}
			return c.srv.admit(target, p)
		},
	}
	defer func() { c.srv.challenges.forget(n.challenge) }()
	if err := c.loginSteps(n); err != nil {
		if errors.Is(err, errLoginRefused) || errors.Is(err, io.EOF) {
			return err
		}
		c.mu.Lock()
		known := c.closing || c.draining // the end has another cause
		c.mu.Unlock()
		if known {
			return errLoginRefused
		}
		if n := (net.Error)(nil); errors.As(err, &n) && n.Timeout() {
			err = fmt.Errorf("no login within %v", cfg.LoginTimeout)
		}
		// Strangers can cause these at will.
		c.srv.notices.tell(c.log, fmt.Sprintf("connection dropped: %v", err))
		return errLoginRefused
	}
	// A drain between must win over the deadline that is lifted here.
	end := time.Time{}
	if c.node == nil { // anybody can begin a discovery session
		end = time.Now().Add(cfg.LoginTimeout)
	}
	c.nc.SetDeadline(end)
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
		if !n.begun && c.srv.failures.blocked(c.from) {
			return c.refuseLogin(&head)
		}
		r, text, done, why := n.step(&head, data)
		if why == nil && done {
			if status, err := c.begin(n); err != nil {
				r = refusal(&head, status)
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
			c.loginFailed(n, r.LoginStatus(), why)
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

// errBlocked: too many logins of the address failed of late.
var errBlocked = errors.New("too many logins of this address failed within a minute")

// refuseLogin answers the first request of an address that is blocked, unheard.
func (c *conn) refuseLogin(head *iscsi.BHS) error {
	r := refusal(head, iscsi.LoginServiceUnavailable)
	c.mu.Lock()
	c.numbers(&r)
	c.w.Append(&r, nil, nil, nil)
	c.lastWords()
	c.mu.Unlock()
	c.srv.notices.tell(c.log, fmt.Sprintf("%v: %v", errLoginRefused, errBlocked))
	return errLoginRefused
}

// loginFailed logs a login that ended, and counts it where it was a try in vain.
func (c *conn) loginFailed(n *negotiation, status uint16, why error) {
	if status>>8 == 2 && status != iscsi.LoginTargetRemoved && !n.counted {
		c.srv.failures.note(c.from)
	}
	if errors.Is(why, errCutOver) || errors.Is(why, errMoved) || errors.Is(why, errLeaving) {
		c.log.Info(why.Error())
	} else {
		c.log.Warn(why.Error())
	}
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
	c.initiator, c.proved, c.trusted = n.initiator, n.proved, n.trusted
	c.isid, c.cid, c.node = n.isid, n.cid, n.terms.node
	c.log = c.log.WithField("initiator", c.initiator)
	if n.tsih != 0 {
		// A session has one connection here: there is none to join.
		return iscsi.LoginNoSession, fmt.Errorf("%w: session %d does not exist or takes no further connection", errLoginRefused, n.tsih)
	}
	limit := time.After(c.srv.cfg.LoginTimeout)
	for {
		old, why := c.srv.register(c)
		if why != "" {
			return iscsi.LoginOutOfResources, fmt.Errorf("%w: initiator %s: %s", errLoginRefused, c.initiator, why)
		}
		if old == nil {
			break
		}
		if old.proved.Secret != "" && old.proved != c.proved && !(c.node.lists(&c.peer) && !c.node.lists(&old.peer)) {
			return iscsi.LoginAuthFailed, fmt.Errorf("%w: initiator %s: %w: its session was begun by who proved to be another", errLoginRefused, c.initiator, errAuthentication)
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
		// What was retired, moved or taken off since the login began takes nobody any more.
		now, ok := c.srv.admit(c.node.iqn, &c.peer)
		switch {
		case ok && now.moved == nil && now.gone && now.node == c.node:
			return iscsi.LoginTargetRemoved, fmt.Errorf("initiator %s asks for target %q: %w", c.initiator, c.node.iqn, errCutOver)
		case ok && now.leaving != nil:
			return iscsi.LoginServiceUnavailable, fmt.Errorf("initiator %s asks for target %s: %w", c.initiator, c.node.iqn, errLeaving)
		case !ok || now.moved != nil || now.node != c.node || !c.node.sees(&c.peer):
			return iscsi.LoginServiceUnavailable, fmt.Errorf("%w: target %s changed while initiator %s logged in", errLoginRefused, c.node.iqn, c.initiator)
		}
		c.arrive()
		c.log.WithField("target", c.node.iqn).Info("session began")
	}
	return 0, nil
}

// register enters c among the sessions, or gives the session that stands in its way, or
// says why there is no room. An I_T nexus has one session at a time: initiator name and
// ISID make the initiator port, target name and portal group tag the target port (RFC
// 7143 4.4.1).
func (s *Server) register(c *conn) (old *conn, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.node != nil {
		for o := range s.conns {
			if o != c && o.loggedIn && o.node == c.node && o.initiator == c.initiator && o.isid == c.isid && o.group == c.group {
				return o, ""
			}
		}
	}
	if c.node != nil {
		if why := s.roomForSession(c); why != "" {
			return nil, why
		}
	}
	if c.tsih = s.places.handle(); c.tsih == 0 {
		return nil, fmt.Sprintf("%d sessions exist, as many as can be told apart", mostHandles)
	}
	c.loggedIn = true
	if c.node != nil { // a discovery session stays where others may displace it
		s.places.loggedIn(c)
	}
	return nil, ""
}
