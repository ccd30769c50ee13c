package target

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"lunshift/iscsi"
)

// portal is one address that is listened on.
type portal struct {
	net.Listener
	group uint16 // its portal group (RFC 7143 13.9)
}

// Listen binds every portal, or none and says which could not be bound.
func (s *Server) Listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	var all []portal
	for _, p := range s.cfg.Portals {
		l, err := net.Listen(network(p.Address), p.Address)
		if err != nil {
			for _, o := range all {
				o.Close()
			}
			var op *net.OpError
			if errors.As(err, &op) {
				err = op.Err
			}
			return fmt.Errorf("portal %s: %w", p.Address, err)
		}
		all = append(all, portal{l, p.Group})
	}
	s.listeners = append(s.listeners, all...)
	return nil
}

// network keeps a portal to its own version of IP: by itself Go listens for both where
// the address is that of all interfaces.
func network(address string) string {
	at, err := netip.ParseAddrPort(address)
	switch {
	case err != nil:
		return "tcp"
	case at.Addr().Is4():
		return "tcp4"
	}
	return "tcp6"
}

// Addrs are the addresses bound, in the order of Portals.
func (s *Server) Addrs() []net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var a []net.Addr
	for _, l := range s.listeners {
		a = append(a, l.Addr())
	}
	return a
}

// Serve accepts connections until the server is shut down or closed, and then
// gives ErrClosed; when ctx ends it closes the server and gives ctx's error.
// It listens first if that was not done.
func (s *Server) Serve(ctx context.Context) error {
	if len(s.Addrs()) == 0 {
		if err := s.Listen(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	if s.closed || s.serving {
		s.mu.Unlock()
		return ErrClosed
	}
	w, err := newWatcher()
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.serving, s.watcher = true, w
	go w.run() // finish waits for it
	for _, l := range s.listeners {
		s.pending.Go(func() { s.accept(l) })
	}
	s.pending.Go(s.watch)
	s.pending.Go(s.watchData)
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return errors.Join(ctx.Err(), s.Close())
	case <-s.ending:
		return ErrClosed
	}
}

// accept takes connections of one portal. Each gets a place to log in, or is refused.
func (s *Server) accept(l portal) {
	for {
		nc, err := l.Accept()
		if err != nil {
			select {
			case <-s.ending:
				return
			default:
			}
			// Out of descriptors and the like pass; the portal stays.
			s.log.WithError(err).Warn("portal cannot accept")
			select {
			case <-s.ending:
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		s.admitConnection(nc, l.group)
	}
}

func (s *Server) admitConnection(nc net.Conn, group uint16) {
	from := remote(nc)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		nc.Close()
		return
	}
	displaced, why := s.makeRoom(from)
	if why == "" {
		c := newConn(s, nc, group)
		s.conns[c] = struct{}{}
		s.places.enter(c)
		s.pending.Go(c.serve)
		s.mu.Unlock()
		if displaced != nil {
			displaced.close(errDisplaced)
		}
		return
	}
	// What is refused has a goroutine only while there are few of them.
	select {
	case s.refusals <- struct{}{}:
		s.pending.Go(func() {
			defer func() { <-s.refusals }()
			s.refuse(nc)
		})
	default:
		nc.Close()
	}
	s.mu.Unlock()
	s.notices.tell(s.log, "connection of "+from.String()+" refused: "+why)
}

const (
	// mostRefusals bounds the connections that are being told why they are refused.
	mostRefusals = 32
	// refusalTimeout bounds each of them.
	refusalTimeout = time.Second
)

// refuse answers the first login request with status 0302h (out of resources) at little
// cost, and closes the connection.
func (s *Server) refuse(nc net.Conn) {
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(refusalTimeout))
	var h iscsi.BHS
	if _, err := io.ReadFull(nc, h[:]); err != nil || h.Opcode() != iscsi.OpLoginRequest {
		return
	}
	rest := int64(h.AHSLength() + (h.DataLength()+3)&^3)
	if rest > 1<<16 {
		return
	}
	if _, err := io.CopyN(io.Discard, nc, rest); err != nil {
		return
	}
	var r iscsi.BHS
	r.SetOpcode(iscsi.OpLoginResponse)
	r.SetFlags(byte(h.CSG() << 2))
	r.SetISID(h.ISID())
	r.SetTSIH(h.TSIH())
	r.SetITT(h.ITT())
	r.SetStatSN(h.ExpStatSN())
	r.SetExpCmdSN(h.CmdSN())
	r.SetMaxCmdSN(h.CmdSN())
	r.SetLoginStatus(iscsi.LoginOutOfResources)
	if _, err := nc.Write(r[:]); err != nil {
		return
	}
	// Until the initiator has taken it: a close with data unread would reset the
	// connection before that.
	if t, ok := nc.(*net.TCPConn); ok {
		t.CloseWrite()
	}
	io.CopyN(io.Discard, nc, 1<<16)
}
