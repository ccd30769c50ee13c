package target

import (
	"fmt"
	"slices"

	"lunshift/lun"
)

// ReservationInfo is what initiators have reserved on a unit, as people see it.
type ReservationInfo struct {
	// Type is that of the persistent reservation (SPC-4 6.15.3.4), or RESERVE for that of
	// SPC-2; empty where there is none.
	Type string `json:"type,omitempty"`
	// Holders are the initiators that hold it, Registered those with a registration, each once.
	Holders    []string `json:"holders"`
	Registered []string `json:"registered"`
}

// Unreserved is of a unit on which nothing is.
func Unreserved() ReservationInfo {
	return ReservationInfo{Holders: []string{}, Registered: []string{}}
}

// Reservation gives what is reserved on a unit. ErrNoUnit where there is none.
func (s *Server) Reservation(iqn string, number uint64) (ReservationInfo, error) {
	s.mu.Lock()
	_, u, err := s.mapped(iqn, number)
	s.mu.Unlock()
	if err != nil {
		return Unreserved(), err
	}
	return u.reserved.info(), nil
}

func (r *reservations) info() ReservationInfo {
	r.mu.Lock()
	p, reserver := r.persistent.Load(), r.reserver
	r.mu.Unlock()
	info := Unreserved()
	add := func(to *[]string, name string) {
		if !slices.Contains(*to, name) {
			*to = append(*to, name)
		}
	}
	for _, x := range p.regs {
		add(&info.Registered, x.name)
		if p.holds(&x) {
			add(&info.Holders, x.name)
		}
	}
	switch {
	case reserver != nil:
		info.Type = "RESERVE"
		add(&info.Holders, reserver.initiator)
	case p.kind != 0:
		info.Type = lun.ReservationType(p.kind)
	}
	return info
}

// String is on one line; empty where there is nothing.
func (i ReservationInfo) String() string {
	switch {
	case i.Type != "":
		return fmt.Sprintf("%s, held by %s", i.Type, few(i.Holders))
	case len(i.Registered) > 0:
		return "none; registered: " + few(i.Registered)
	}
	return ""
}

// few lists some of the names.
func few(all []string) string {
	const most = 4
	text := ""
	for n, name := range all {
		switch {
		case n == most:
			return fmt.Sprintf("%s and %d more", text, len(all)-most)
		case n > 0:
			text += ", "
		}
		text += name
	}
	return text
}
