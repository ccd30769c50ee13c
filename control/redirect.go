package control

import (
	"time"

	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/target"
)

// redirect sends logins to a target to where its volumes moved, once all of them are
// cut over, or refuses them where the configuration names no place or redirect_for is over.
func (s *Service) redirect(iqn string) {
	s.redirecting.Lock() // so that the last look at the volumes is the last one to count
	defer s.redirecting.Unlock()
	r, ok := s.redirection(iqn)
	if !ok {
		s.target.StopRedirect(iqn)
		return
	}
	if err := s.target.Redirect(iqn, r); err != nil {
		s.log.WithError(err).Error("logins are refused, not redirected")
		return
	}
	switch {
	case r.Removed:
		s.log.Infof("logins to %s are refused: it is cut over, and has no redirect", iqn)
	case r.Until.IsZero():
		s.log.Infof("logins to %s are sent to %s", iqn, r.Address)
	case time.Now().Before(r.Until):
		s.log.Infof("logins to %s are sent to %s %s", iqn, r.Address, untilText(r.Until))
	default:
		s.log.Infof("logins to %s are refused: they were sent to %s %s", iqn, r.Address, untilText(r.Until))
	}
}

// sentTo is where logins to a target are sent now, and until when, where there is an end; false
// where they are not.
func (s *Service) sentTo(iqn string) (address string, until time.Time, is bool) {
	r, ok := s.redirection(iqn)
	return r.Address, r.Until, ok && !r.Removed && (r.Until.IsZero() || time.Now().Before(r.Until))
}

// untilText is for people: until when logins are sent somewhere.
func untilText(until time.Time) string {
	if until.IsZero() {
		return "without end (redirect_for)"
	}
	return "until " + until.Format(time.RFC3339) + " (redirect_for)"
}

// cutoverOf is when a volume was cut over, which may be removed since. Where the state does
// not tell, nobody is turned away because of it.
func (s *Service) cutoverOf(name string) time.Time {
	record, found, err := s.store.Record(name)
	switch {
	case err != nil:
		s.log.WithError(err).Errorf("volume %s: it is not known when it was cut over", name)
	case found && record.CutoverAt != nil:
		return *record.CutoverAt
	case found: // removed by an older version
		return record.CreatedAt
	}
	return time.Now()
}

// redirection is where logins to a target are to be sent; false while one of its volumes is not
// cut over. Its time counts from the cutover of the last one.
func (s *Service) redirection(iqn string) (target.Redirection, bool) {
	var r target.Redirection
	var last time.Time
	var within time.Duration
	known := false
	everywhere := false // some volume is reached by every portal
	for _, e := range s.list() {
		v := e.settings()
		if v.IQN != iqn {
			continue
		}
		if e.status().Phase != proxy.Cutover && !e.isGone() {
			return r, false
		}
		if at := s.cutoverOf(e.name); at.After(last) {
			last = at
		}
		known, within = true, v.RedirectFor
		r.Removed = v.Redirect.Address == ""
		r.Address, r.Group = v.Redirect.Address, v.Redirect.Group
		// Its units may be here no more, so it holds whom they admit.
		who := initiators(v)
		if len(who) == 0 {
			who = []target.Initiator{{Name: "*", Networks: conf.Loopback()}}
		}
		r.Initiators = append(r.Initiators, who...)
		r.PortalGroups = append(r.PortalGroups, v.PortalGroups...)
		everywhere = everywhere || len(v.PortalGroups) == 0
	}
	if everywhere {
		r.PortalGroups = nil
	}
	if within > 0 {
		r.Until = last.Add(within)
	}
	return r, known
}
