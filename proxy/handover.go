package proxy

import (
	"context"
	"fmt"
	"strings"
	"time"

	"lunshift/target"
)

// DefaultLogoutTimeout is how long sessions may take to leave at a cutover where nothing else
// is said.
const DefaultLogoutTimeout = 10 * time.Second

// mostNamed bounds the sessions that an error names.
const mostNamed = 8

// StayedError says that a cutover was undone because sessions did not log out when they were
// asked to. They were served on, and those that had left are let in again.
type StayedError struct {
	Volume   string
	Sessions []target.SessionInfo
	// Within is how long they were waited for.
	Within time.Duration
}

func (e *StayedError) Error() string {
	sessions := "1 session did"
	if n := len(e.Sessions); n > 1 {
		sessions = fmt.Sprintf("%d sessions did", n)
	}
	return fmt.Sprintf("volume %s: cutover undone, still %s: %s not log out within %s: %s; log them out there, or have them dropped with --force",
		e.Volume, Synced, sessions, e.Within, named(e.Sessions))
}

// named lists sessions in one line.
func named(all []target.SessionInfo) string {
	var names []string
	for i, s := range all {
		if i == mostNamed {
			names = append(names, fmt.Sprintf("and %d more", len(all)-i))
			break
		}
		names = append(names, fmt.Sprintf("%s at %s", s.Initiator, s.Address))
	}
	return strings.Join(names, ", ")
}

// handover is the time from when initiators are asked to leave until logins are answered
// again, by a volume that is cut over or by one that was not. In between nobody comes in.
//
// Asking comes before commands are held, and the record of the cutover after all have
// left: an initiator may end its commands before it logs out, which it could not while they
// are held; one that stays is served without a pause; and nobody is sent to the destination
// before it is durable that lunshift does not write there any more.
type handover struct {
	volumes   []*Volume
	departure *target.Departure
	stayed    []target.SessionInfo
}

// askToLeave asks the initiators of the volumes to log out and returns once all have. Those
// of a target which has other volumes too cannot, and are not asked. Who stays is a StayedError,
// but with force is for drop to end. The caller holds the step of each volume, and ends what
// is given.
func askToLeave(ctx context.Context, volumes []*Volume, force bool) (*handover, error) {
	h := &handover{volumes: volumes}
	within := time.Duration(0)
	var places []target.Place
	for _, v := range volumes {
		places = append(places, target.Place{IQN: v.cfg.IQN, LUN: v.cfg.LUN})
		within = max(within, v.set().logoutTimeout())
	}
	v := volumes[0]
	var err error
	if h.departure, err = v.cfg.Target.Depart(places...); err != nil {
		return nil, v.errorf("cutover not begun: %w", err)
	}
	waiting, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	began := time.Now()
	h.stayed = h.departure.Wait(waiting)
	switch {
	case ctx.Err() != nil: // sessions end with the service as well
		err = v.errorf("cutover undone, still %s: %w", v.Phase(), ctx.Err())
	case len(h.stayed) > 0 && !force:
		err = &StayedError{Volume: v.cfg.Name, Sessions: h.stayed, Within: within}
	case len(h.stayed) > 0:
		v.log.Warnf("cutover goes on without those who did not log out within %s: %s", within, named(h.stayed))
	default:
		v.log.Infof("all initiators have left (%s)", time.Since(began).Round(time.Millisecond))
	}
	if err != nil {
		h.end()
		return nil, err
	}
	return h, nil
}

// drop ends the sessions that stayed, once the cutover is recorded.
func (h *handover) drop() {
	h.departure.Drop()
	for _, v := range h.volumes {
		v.mu.Lock()
		v.dropped = h.stayed
		v.mu.Unlock()
	}
}

// end has logins answered again, by what the volumes are then.
func (h *handover) end() { h.departure.End() }

func (s Settings) logoutTimeout() time.Duration {
	if s.LogoutTimeout == 0 {
		return DefaultLogoutTimeout
	}
	return s.LogoutTimeout
}
