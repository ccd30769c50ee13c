package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"lunshift/proxy"
	"lunshift/state"
)

// How an event of the audit trail ended.
const (
	// resultBegun is that of a step under way; it stays where the service ended meanwhile.
	resultBegun = "begun"
	resultDone  = "done"
	// resultRefused: nothing was changed. resultFailed: it was tried.
	resultRefused = "refused"
	resultFailed  = "failed"
	// resultInterrupted: it was told to end first.
	resultInterrupted = "interrupted"
	// resultNoted is of what happened by itself.
	resultNoted = "noted"
	// resultUnknown is shown of what was begun by a service that is gone.
	resultUnknown = "unknown"
)

const (
	// mostText bounds the text of an event, in bytes.
	mostText = 8 << 10
	// trailLimit bounds the writing of how a step ended.
	trailLimit = 10 * time.Second
	// noLoginUID is what the kernel says where nobody logged in (audit(7)).
	noLoginUID = 1<<32 - 1
)

// itself is the service.
var itself = state.Who{Service: true}

type peerKey struct{}

// withPeer keeps with a connection of the control socket who is on the other side: who they
// were when they connected (unix(7), SO_PEERCRED).
func withPeer(ctx context.Context, c net.Conn) context.Context {
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return ctx
	}
	var peer *unix.Ucred
	if err := raw.Control(func(fd uintptr) { peer, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || peer == nil {
		return ctx
	}
	who := state.Who{UID: &peer.Uid, PID: peer.Pid}
	// The peer waits for its answer, so the process of that number is still the peer.
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/loginuid", peer.Pid)); err == nil {
		if id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil && id != noLoginUID {
			login := uint32(id)
			who.LoginUID = &login
		}
	}
	return context.WithValue(ctx, peerKey{}, who)
}

// asker is who sent a request. Where the kernel did not tell, all of it is empty.
func asker(r *http.Request) state.Who {
	who, _ := r.Context().Value(peerKey{}).(state.Who)
	who.User, who.Login = userName(who.UID), userName(who.LoginUID)
	return who
}

func userName(id *uint32) string {
	if id == nil {
		return ""
	}
	u, err := user.LookupId(strconv.FormatUint(uint64(*id), 10))
	if err != nil {
		return "" // the number says enough
	}
	return u.Username
}

// asked is a step in the audit trail: an event for each volume, from its beginning on.
type asked struct {
	s      *Service
	events []state.Event
	began  time.Time
}

// asks writes down that a step begins, before it does: what is done and not in the trail cannot
// be, but for a step that is unwritten. An empty volume is the service.
func (s *Service) asks(ctx context.Context, who state.Who, group, what string, options any, volumes ...string) (*asked, error) {
	a := &asked{s: s, began: time.Now()}
	text, err := json.Marshal(options)
	if err != nil {
		return nil, fmt.Errorf("%s: encode its options: %w", what, err)
	}
	if options == nil {
		text = nil
	}
	for _, volume := range volumes {
		a.events = append(a.events, state.Event{Volume: volume, Group: group, At: a.began, Who: who, What: what, Options: text, Result: resultBegun})
	}
	if a.events, err = s.store.Append(ctx, a.events...); err != nil {
		return nil, fmt.Errorf("%s not begun, as it cannot be written down: %w", what, err)
	}
	return a, nil
}

// ends writes down how the step ended. text says more of a step that was done.
func (a *asked) ends(text string, err error) {
	if len(a.events) == 0 {
		return
	}
	took := milliseconds(time.Since(a.began))
	for i := range a.events {
		e := &a.events[i]
		e.Result, e.Text, e.Took = outcome(err), clean(text, mostText), &took
		if err != nil {
			e.Text = clean(oneLine(err), mostText)
		}
	}
	// The stop of the service does not keep it from being written.
	ctx, cancel := context.WithTimeout(context.Background(), trailLimit)
	defer cancel()
	if err := a.s.store.Amend(ctx, a.events...); err != nil {
		a.s.log.WithError(err).Errorf("how %s ended is not in the audit trail: %s %s", a.events[0].What, a.events[0].Result, a.events[0].Text)
	}
}

// note writes down what happened by itself.
func (s *Service) note(ctx context.Context, events ...state.Event) error {
	for i := range events {
		e := &events[i]
		e.Who, e.Result, e.Text = itself, resultNoted, clean(e.Text, mostText)
		if e.At.IsZero() {
			e.At = time.Now()
		}
	}
	_, err := s.store.Append(ctx, events...)
	return err
}

// logNote is note where nothing else hangs on it.
func (s *Service) logNote(event state.Event) {
	if err := s.note(context.Background(), event); err != nil {
		s.log.WithError(err).Errorf("%s is not in the audit trail", event.What)
	}
}

// refusal marks errors of steps that changed nothing.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// outcome is how a step ended with err.
func outcome(err error) string {
	var mine refusal
	var units *proxy.Refusal
	var fenced *proxy.FencedError
	var stayed *proxy.StayedError
	switch kind := KindOf(err); {
	case err == nil:
		return resultDone
	case kind == Interrupted:
		return resultInterrupted
	case kind == Usage || kind == WrongPhase || kind == Configuration || kind == Unknown,
		errors.As(err, &mine), errors.As(err, &units), errors.As(err, &fenced), errors.As(err, &stayed), isUnknown(err):
		return resultRefused
	}
	return resultFailed
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// clean is a text of at most so many bytes that is fit for JSON.
func clean(text string, most int) string {
	text = strings.ToValidUTF8(text, "�")
	if len(text) <= most {
		return text
	}
	const cut = " …"
	at := most - len(cut)
	for at > 0 && !utf8.RuneStart(text[at]) {
		at--
	}
	return text[:at] + cut
}
