package control

import (
	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/target"
)

// redirect sends logins to a target to where its volumes moved, once all of them are
// cut over and where the configuration names a place; otherwise they are not sent on.
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
	s.log.Infof("logins to %s are sent to %s", iqn, r.Address)
}

// redirection is where logins to a target are to be sent; false for nowhere.
func (s *Service) redirection(iqn string) (target.Redirection, bool) {
	var r target.Redirection
	everywhere := false // some volume is reached by every portal
	for _, e := range s.list() {
		v := e.settings()
		if v.IQN != iqn {
			continue
		}
		if v.Redirect.Address == "" || e.status().Phase != proxy.Cutover && !e.isGone() {
			return r, false
		}
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
	return r, r.Address != ""
}
