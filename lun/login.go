package lun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"lunshift/iscsi"
)

// Lengths this end asks for, in bytes.
const (
	wantMaxRecv    = 1 << 20
	wantMaxBurst   = 4 << 20
	wantFirstBurst = 256 << 10
	readBuffer     = 256 << 10
)

// chapAlgorithms are SHA3-256, SHA-1, MD5 and SHA-256 in the numbers of the IANA
// registry. Targets take the first they know. SHA-256 comes last because targets
// from before the registry, tgt among them, mean SHA-1 by its number 7 and then
// fail.
const chapAlgorithms = "8,6,5,7"

// maxLoginSteps bounds the exchanges of one login, maxRedirects the portals that
// send us on (RFC 7143 11.13.5, 0101h and 0102h).
const (
	maxLoginSteps = 24
	maxRedirects  = 4
)

// endpoint is what a session needs to log in.
type endpoint struct {
	addr Address
	opts Options
	isid iscsi.ISID
}

// link is a connection in full feature phase with nothing sent on it yet.
type link struct {
	nc        net.Conn
	r         *iscsi.Reader
	params    iscsi.Params
	cmdSN     uint32
	expStatSN uint32
	maxCmdSN  uint32
}

// loginError is a refusal of the target (RFC 7143 11.13.5).
type loginError struct{ status uint16 }

func (e *loginError) Error() string {
	what, ok := map[uint16]string{
		iscsi.LoginAuthFailed: "the initiator name, user or secret is wrong", iscsi.LoginForbidden: "this initiator has no access to the target",
		iscsi.LoginNotFound: "no such target there", iscsi.LoginTargetRemoved: "the target was removed",
		iscsi.LoginTooManyConnections: "too many connections", iscsi.LoginServiceUnavailable: "the service is not available now",
		iscsi.LoginOutOfResources: "the target is out of resources", iscsi.LoginTargetError: "the target has an error",
		iscsi.LoginMissingParameter: "a parameter is missing", iscsi.LoginUnsupportedVersion: "unsupported version",
	}[e.status]
	if !ok {
		what = "refused"
	}
	return fmt.Sprintf("login: %s (status %04Xh)", what, e.status)
}

func (e *loginError) Is(target error) bool {
	switch e.status {
	case iscsi.LoginAuthFailed, iscsi.LoginForbidden:
		return target == ErrAuth
	case iscsi.LoginNotFound, iscsi.LoginTargetRemoved:
		return false
	}
	return target == ErrUnavailable && e.status>>8 == 3
}

// login connects and logs in to a normal session, following redirections. A
// session that the target still keeps under the same ISID ends with that (session
// reinstatement, RFC 7143 6.3.5).
func (e *endpoint) login(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.LoginTimeout)
	defer cancel()
	portal := e.addr.Portal()
	for range maxRedirects {
		l, next, err := e.loginAt(ctx, portal)
		if err != nil {
			return nil, fmt.Errorf("%s at %s: %w", e.addr.Target, portal, err)
		}
		if next == "" {
			return l, nil
		}
		portal = next
	}
	return nil, fmt.Errorf("%s at %s: redirected more than %d times: %w", e.addr.Target, e.addr.Portal(), maxRedirects, ErrUnavailable)
}

func (e *endpoint) loginAt(ctx context.Context, portal string) (l *link, redirect string, err error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", portal)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrUnavailable, dialReason(ctx, err))
	}
	// The deadline of ctx, or its end, breaks whatever the exchange waits for.
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	x := &loginExchange{endpoint: e, link: link{nc: nc, r: iscsi.NewReader(nc, readBuffer), cmdSN: 1}}
	redirect, err = x.run()
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil && redirect == "" {
		x.r.HeaderDigest, x.r.DataDigest = x.params.HeaderDigest, x.params.DataDigest
		x.r.MaxData = int(x.params.MaxRecv)
		return &x.link, "", nil
	}
	nc.Close()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: login: %w", ErrUnavailable, ctx.Err())
	}
	return nil, redirect, err
}

func dialReason(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// loginExchange is one login in progress.
type loginExchange struct {
	*endpoint
	link
	negotiation *iscsi.Negotiation
	chap        *iscsi.CHAPInitiator
	stage       int
}

const loginITT = 1

func (x *loginExchange) run() (redirect string, err error) {
	want := iscsi.DefaultParams()
	want.HeaderDigest, want.DataDigest = x.opts.HeaderDigest, x.opts.DataDigest
	want.InitialR2T, want.ImmediateData = false, true
	want.MaxRecv, want.MaxBurstLength, want.FirstBurstLength = wantMaxRecv, wantMaxBurst, wantFirstBurst
	want.MaxOutstandingR2T = 8
	want.DefaultTime2Wait, want.DefaultTime2Retain = 0, 0
	x.negotiation = iscsi.NewNegotiation(want)

	out := []iscsi.Pair{
		{Key: "InitiatorName", Value: x.opts.InitiatorName},
		{Key: "SessionType", Value: "Normal"},
		{Key: "TargetName", Value: x.addr.Target},
	}
	if x.opts.Secret != "" {
		user := x.addr.User
		if user == "" {
			user = x.opts.InitiatorName
		}
		x.chap = &iscsi.CHAPInitiator{
			Own:    iscsi.Credentials{Name: user, Secret: x.opts.Secret},
			Target: iscsi.Credentials{Name: x.opts.TargetUser, Secret: x.opts.TargetSecret},
		}
		out = append(out, iscsi.Pair{Key: "AuthMethod", Value: "CHAP"})
	} else {
		out = append(out, iscsi.Pair{Key: "AuthMethod", Value: iscsi.None})
	}
	x.stage = iscsi.StageSecurity
	transit := x.chap == nil
	step, answered := 0, false
	for range maxLoginSteps {
		next := iscsi.StageOperational
		if x.stage == iscsi.StageOperational {
			next = iscsi.StageFullFeature
		}
		in, h, err := x.exchange(out, transit, next)
		if err != nil {
			return "", err
		}
		if status := h.LoginStatus(); status != iscsi.LoginSuccess {
			if status == iscsi.LoginMovedTemporarily || status == iscsi.LoginMovedPermanently {
				return redirectTo(in)
			}
			return "", &loginError{status}
		}
		moved := h.Flags()&iscsi.FlagTransit != 0
		if moved && (!transit || h.NSG() != next) {
			return "", errors.New("login: the target changed to a stage that was not asked for")
		}
		out = nil
		if x.stage == iscsi.StageSecurity {
			if out, err = x.security(in, &step, moved); err != nil {
				return "", err
			}
			transit = x.chap == nil || step >= 2
			if moved {
				x.stage, transit = iscsi.StageOperational, true
				out = append(out, x.negotiation.Offer()...)
			}
			continue
		}
		if out, err = x.operational(in); err != nil {
			return "", err
		}
		if moved {
			if len(out) > 0 {
				return "", errors.New("login: the target ended the negotiation with a key of its own open")
			}
			x.negotiation.Finish()
			x.params = x.negotiation.Params
			return "", nil
		}
		if answered && len(in) == 0 && len(out) == 0 {
			return "", errors.New("login: the target neither negotiates nor goes on")
		}
		answered = true
	}
	return "", errors.New("login: no end after many steps")
}

// security takes the target's keys of the security stage.
func (x *loginExchange) security(in []iscsi.Pair, step *int, moved bool) ([]iscsi.Pair, error) {
	if x.chap == nil {
		if m, ok := iscsi.Lookup(in, "AuthMethod"); ok && m != iscsi.None {
			return nil, fmt.Errorf("login: the target wants %s and no secret is set: %w", printable(m), ErrAuth)
		}
		return nil, nil
	}
	var out []iscsi.Pair
	var err error
	switch *step {
	case 0:
		if m, _ := iscsi.Lookup(in, "AuthMethod"); m != "CHAP" {
			return nil, fmt.Errorf("login: the target does not take CHAP: %w", ErrAuth)
		}
		out = []iscsi.Pair{{Key: "CHAP_A", Value: chapAlgorithms}}
	case 1:
		out, err = x.chap.Answer(in)
	case 2:
		err = x.chap.Check(in)
		if err != nil {
			err = fmt.Errorf("the target did not prove itself: %w", err)
		}
	}
	*step++
	if err != nil {
		return nil, fmt.Errorf("login: %w: %w", ErrAuth, err)
	}
	if moved && !x.chap.Done() {
		return nil, fmt.Errorf("login: the target skipped its own proof: %w", ErrAuth)
	}
	return out, nil
}

// operational takes the target's answers and offers.
func (x *loginExchange) operational(in []iscsi.Pair) (out []iscsi.Pair, err error) {
	for _, p := range in {
		known, err := x.negotiation.Apply(p)
		if err != nil {
			return nil, fmt.Errorf("login: %w", err)
		}
		if known {
			continue
		}
		switch p.Key {
		case "TargetPortalGroupTag", "TargetAlias", "TargetAddress", "TaskReporting", "iSCSIProtocolLevel":
		default:
			if p.Value != iscsi.NotUnderstood {
				out = append(out, iscsi.Pair{Key: p.Key, Value: iscsi.NotUnderstood})
			}
		}
	}
	return out, nil
}

// exchange sends one request and gathers the answer, which may be spread over
// several PDUs (RFC 7143 6.2).
func (x *loginExchange) exchange(pairs []iscsi.Pair, transit bool, next int) ([]iscsi.Pair, *iscsi.BHS, error) {
	text := iscsi.AppendText(nil, pairs...)
	if len(text) > 8192 {
		return nil, nil, errors.New("login: names and secrets are too long for one PDU")
	}
	var got []byte
	for range maxLoginSteps {
		if err := x.send(text, transit, next); err != nil {
			return nil, nil, err
		}
		h, err := x.r.Next()
		if err != nil {
			return nil, nil, fmt.Errorf("%w: login: %w", ErrUnavailable, err)
		}
		if h.Opcode() != iscsi.OpLoginResponse {
			return nil, nil, fmt.Errorf("login: answered with %v", h.Opcode())
		}
		if h.ITT() != loginITT {
			return nil, nil, errors.New("login: answer has another task tag")
		}
		head := *h
		data, err := x.r.Data()
		if err != nil {
			return nil, nil, fmt.Errorf("%w: login: %w", ErrUnavailable, err)
		}
		if head.LoginStatus() == iscsi.LoginSuccess {
			if head.CSG() != x.stage {
				return nil, nil, errors.New("login: answer is of another stage")
			}
			x.expStatSN, x.maxCmdSN = head.StatSN()+1, head.MaxCmdSN()
		}
		if len(got)+len(data) > iscsi.MaxText {
			return nil, nil, errors.New("login: answer is too long")
		}
		got = append(got, data...)
		if head.LoginStatus() != iscsi.LoginSuccess || head.Flags()&iscsi.FlagContinue == 0 {
			in, err := iscsi.ParseText(got)
			if err != nil {
				return nil, nil, fmt.Errorf("login: %w", err)
			}
			return in, &head, nil
		}
		text, transit = nil, false
	}
	return nil, nil, errors.New("login: answer does not end")
}

func (x *loginExchange) send(text []byte, transit bool, next int) error {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetImmediate()
	flags := byte(x.stage << 2)
	if transit {
		flags |= iscsi.FlagTransit | byte(next)
	}
	h.SetFlags(flags)
	h.SetISID(x.isid)
	h.SetITT(loginITT)
	h.SetCmdSN(x.cmdSN)
	h.SetExpStatSN(x.expStatSN)
	h.SetDataLength(len(text))
	p := append(append(make([]byte, 0, len(h)+len(text)+3), h[:]...), text...)
	for len(p)%4 != 0 {
		p = append(p, 0)
	}
	if _, err := x.nc.Write(p); err != nil {
		return fmt.Errorf("%w: login: %w", ErrUnavailable, err)
	}
	return nil
}

// redirectTo reads TargetAddress=host[:port][,group] (RFC 7143 13.8).
func redirectTo(in []iscsi.Pair) (string, error) {
	v, ok := iscsi.Lookup(in, "TargetAddress")
	if !ok {
		return "", errors.New("login: redirected to nowhere")
	}
	v, _, _ = strings.Cut(v, ",")
	var a Address
	a.Port = DefaultPort
	if err := a.parsePortal(v); err != nil {
		return "", fmt.Errorf("login: redirected to a bad address: %w", err)
	}
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))), nil
}

// printable makes what a target sent fit for a message.
func printable(s string) string { return strconv.QuoteToASCII(s[:min(len(s), 64)]) }
