package target

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"lunshift/iscsi"
)

// Redirection sends those who log in to a target elsewhere (RFC 7143 11.13.5).
type Redirection struct {
	// Address is host:port of the portal to log in to instead, the host a name or an IP
	// address, IPv6 in brackets.
	Address string
	// Group is the portal group tag there, which only discovery tells; 0 is 1.
	Group uint16
	// Permanent makes the status 0102h (moved permanently) rather than 0101h, the only
	// one that libiscsi 1.19 follows, and QEMU with it.
	Permanent bool
	// Until is when it ends; the zero value is never. From then on, and at all times where
	// Removed is set, logins end with status 0204h (target removed), and discovery lists
	// the target no more.
	Until   time.Time
	Removed bool
	// Initiators are who is told, after the same proof that a Unit asks. Empty is those
	// whom the units of the target admit; where it has none, the loopback of this host.
	Initiators []Initiator
	// PortalGroups are the groups whose portals lead to the target, where Initiators is
	// given; empty is all. A login at another portal is refused, not redirected.
	PortalGroups []uint16
}

// status is the login status.
func (r *Redirection) status() uint16 {
	if r.Permanent {
		return iscsi.LoginMovedPermanently
	}
	return iscsi.LoginMovedTemporarily
}

// over tells whether nobody is sent anywhere any more.
func (r *Redirection) over() bool {
	return r.Removed || !r.Until.IsZero() && !time.Now().Before(r.Until)
}

// Redirect sends every login to a target elsewhere from now on, whether the target has
// units here or none; sessions that exist go on. A later call replaces the earlier
// one.
func (s *Server) Redirect(iqn string, r Redirection) error {
	if err := checkName(iqn); err != nil {
		return fmt.Errorf("target name %q: %w", iqn, err)
	}
	host, port, err := net.SplitHostPort(r.Address)
	n, bad := strconv.ParseUint(port, 10, 16)
	if r.Removed {
		err, bad, n, host = nil, nil, 1, "-"
	}
	if err != nil || bad != nil || n == 0 || host == "" || strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c >= 0x7f || c == ',' }) {
		return fmt.Errorf("redirect %s: address %q is not host:port", iqn, r.Address)
	}
	if err := checkRules(r.Initiators); err != nil {
		return fmt.Errorf("redirect %s: %w", iqn, err)
	}
	r.Group, r.Initiators = max(r.Group, 1), foldNames(r.Initiators)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.redirects[fold(iqn)] = &r
	return nil
}

// StopRedirect lets logins to a target in again, or refuses them where it has no units.
func (s *Server) StopRedirect(iqn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.redirects, fold(iqn))
}
