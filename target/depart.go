package target

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// Place is where a logical unit is on a Server.
type Place struct {
	IQN string
	LUN uint64
}

// Departure is the time in which the initiators of targets were asked to leave and it is
// not decided yet where they are to go. Logins to these targets wait for a while and end
// with status 0301h (service unavailable) then: an initiator that left finds neither the
// units here, which are about to change hands, nor the place that takes over from them,
// which may not. Sessions that stay are served on.
type Departure struct {
	srv     *Server
	nodes   []*node
	begun   time.Time
	decided chan struct{} // closed by End
	asked   map[*conn]bool
}

const (
	// departureWait is how long a login waits for the end of a departure, but not longer
	// than half a LoginTimeout. Initiators allow a login 15 s or so.
	departureWait = 5 * time.Second
	// departureLook is the time between looks for sessions that were still logging in when
	// the others were asked.
	departureLook = 20 * time.Millisecond
)

// Depart begins a departure of the targets whose units are all among the places, or retired:
// the initiators of others cannot leave, as a session is with all units of its target. The
// caller must End it. Nobody is asked to leave before Wait.
func (s *Server) Depart(places ...Place) (*Departure, error) {
	d := &Departure{srv: s, begun: time.Now(), decided: make(chan struct{}), asked: map[*conn]bool{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range places {
		n, _, err := s.mapped(p.IQN, p.LUN)
		if err != nil {
			return nil, err
		}
		if slices.Contains(d.nodes, n) {
			continue
		}
		others := false
		for id, u := range *n.units.Load() {
			among := slices.ContainsFunc(places, func(p Place) bool { return fold(p.IQN) == n.iqn && p.LUN == id })
			others = others || !among && !u.gate.closed()
		}
		switch {
		case others:
		case n.leaving != nil:
			return nil, fmt.Errorf("target %s: its initiators are being asked to leave already", n.iqn)
		default:
			d.nodes = append(d.nodes, n)
		}
	}
	for _, n := range d.nodes {
		n.leaving = d
	}
	return d, nil
}

// Wait asks every session of the targets to log out (RFC 7143 11.9.1, event 1) and returns
// who is still there when ctx ends, oldest first; nobody when all have left.
func (d *Departure) Wait(ctx context.Context) []SessionInfo {
	seconds := uint16(3)
	if at, ok := ctx.Deadline(); ok {
		seconds = uint16(min(max(time.Until(at).Seconds(), 1), 60))
	}
	tick := time.NewTicker(departureLook)
	defer tick.Stop()
	for {
		left := d.sessions()
		for _, c := range left {
			if !d.asked[c] && c.askLogout(seconds) {
				d.asked[c] = true
			}
		}
		if len(left) == 0 {
			return nil
		}
		select {
		case <-left[0].done:
		case <-tick.C:
		case <-ctx.Done():
			return infos(d.sessions())
		}
	}
}

// Drop ends the sessions that are still there and returns when they are gone. Their commands
// are cancelled and not answered.
func (d *Departure) Drop() {
	left := d.sessions()
	for _, c := range left {
		c.close(fmt.Errorf("%s did not leave target %s, and is not waited for any longer", c.initiator, c.node.iqn))
	}
	for _, c := range left {
		<-c.done
	}
}

// End lets logins in again, or what they meet by then. A second call does nothing.
func (d *Departure) End() {
	s := d.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range d.nodes {
		if n.leaving == d {
			n.leaving = nil
		}
	}
	d.nodes = nil
	select {
	case <-d.decided:
	default:
		close(d.decided)
	}
}

// sessions are those of the targets.
func (d *Departure) sessions() (all []*conn) {
	s := d.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.loggedIn && c.node != nil && slices.Contains(d.nodes, c.node) {
			all = append(all, c)
		}
	}
	return all
}

// await waits for the end of a departure, for as long as a login may. It is false where the
// login is to be refused.
func (s *Server) await(d *Departure) bool {
	limit := time.NewTimer(min(departureWait, s.cfg.LoginTimeout/2))
	defer limit.Stop()
	select {
	case <-d.decided:
		return true
	case <-limit.C:
	case <-s.ending:
	}
	return false
}
