package control

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"lunshift/conf"
	"lunshift/proxy"
)

// queue lets some volumes copy at a time and has the others wait. Those that go back to their
// source come first, then those of a higher priority, then those that copy already, then it is the
// order of the configuration. A volume whose copy can do nothing does not count. Where one comes
// before another that copies, it takes its turn.
type queue struct {
	mu       sync.Mutex // protects what follows, and what is in seats
	parallel int        // how many copy at a time; 0 is all
	begun    bool       // before that there are no turns
	order    map[string]rank
	seats    map[string]*seat
}

// rank is where a volume stands in the configuration.
type rank struct{ priority, place int }

// seat is a volume's place in a queue.
type seat struct {
	q     *queue
	name  string
	is    standing
	first bool // before all that are not
	idle  bool
	came  chan struct{}      // closed when the turn comes
	leave context.CancelFunc // ends the turn
}

type standing int

const (
	seatAway standing = iota
	seatWaiting
	seatCopying
	seatLeaving // its turn was ended, and it copies until Give
)

func newQueue(cfg *conf.Config) *queue {
	q := &queue{seats: make(map[string]*seat)}
	q.arrange(cfg)
	return q
}

// arrange takes up what the configuration says now. A volume that it does not have comes after
// the others of priority 0.
func (q *queue) arrange(cfg *conf.Config) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.parallel, q.order = cfg.Service.Copy.Parallel, make(map[string]rank)
	for i, v := range cfg.Volumes {
		q.order[v.Name] = rank{v.Copy.Priority, i}
	}
	q.settle()
}

// begin gives out the first turns. By then all volumes that can be opened are there, so that it
// does not count which was first.
func (q *queue) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.begun = true
	q.settle()
}

// seat is that of a volume, the same at each call.
func (q *queue) seat(name string) *seat {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.seats[name] == nil {
		q.seats[name] = &seat{q: q, name: name}
	}
	return q.seats[name]
}

// sorted are the volumes that wait or copy, in the order in which they come; mu is held.
func (q *queue) sorted() []*seat {
	var all []*seat
	for _, s := range q.seats {
		if s.is == seatWaiting || s.is == seatCopying {
			all = append(all, s)
		}
	}
	rankOf := func(s *seat) rank {
		if r, ok := q.order[s.name]; ok {
			return r
		}
		return rank{place: len(q.order)}
	}
	slices.SortFunc(all, func(a, b *seat) int {
		x, y := rankOf(a), rankOf(b)
		return cmp.Or(-cmp.Compare(truth(a.first), truth(b.first)), cmp.Compare(y.priority, x.priority), cmp.Compare(b.is, a.is), cmp.Compare(x.place, y.place), cmp.Compare(a.name, b.name))
	})
	return all
}

// settle ends the turns of those that others come before, and gives turns as far as there is
// room: a turn that was ended takes its room until Give. mu is held.
func (q *queue) settle() {
	if !q.begun {
		return
	}
	all := q.sorted()
	turns := q.parallel
	if turns == 0 {
		turns = len(q.seats)
	}
	room := turns
	for _, s := range q.seats {
		if s.is == seatLeaving {
			room--
		}
	}
	for _, s := range all {
		if s.is == seatCopying && s.idle {
			continue
		}
		turns--
		if s.is != seatCopying {
			continue
		}
		room--
		if turns < 0 {
			s.is = seatLeaving
			s.leave()
		}
	}
	for _, s := range all {
		if s.is == seatWaiting && room > 0 {
			room--
			s.is = seatCopying
			close(s.came)
		}
	}
}

// Take implements proxy.Seat.
func (s *seat) Take(ctx context.Context, first bool) (context.Context, error) {
	turn, came := s.join(ctx, first)
	select {
	case <-came:
		return turn, nil
	case <-ctx.Done():
		s.Give()
		return nil, ctx.Err()
	}
}

// join has the volume wait for its turn; came is closed when it comes.
func (s *seat) join(ctx context.Context, first bool) (turn context.Context, came <-chan struct{}) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	turn, s.leave = context.WithCancel(ctx)
	s.is, s.first, s.idle, s.came = seatWaiting, first, false, make(chan struct{})
	came = s.came
	s.q.settle()
	return turn, came
}

// Idle implements proxy.Seat.
func (s *seat) Idle(idle bool) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.is == seatCopying && s.idle != idle {
		s.idle = idle
		s.q.settle()
	}
}

// Give implements proxy.Seat.
func (s *seat) Give() {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.leave()
	s.is = seatAway
	s.q.settle()
}

// Position implements proxy.Seat.
func (s *seat) Position() int {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.is != seatWaiting {
		return 0
	}
	n := 0
	for _, other := range s.q.sorted() {
		if other.is == seatWaiting {
			n++
		}
		if other == s {
			break
		}
	}
	return n
}

var _ proxy.Seat = (*seat)(nil)
