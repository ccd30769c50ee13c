package control

import (
	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/target"
)

// redirect sends logins to a target to where its volumes moved, once all of them are
// cut over and where the configuration names a place.
func (s *Service) redirect(iqn string) {
	var r target.Redirection
	everywhere := false // some volume is reached by every portal
	for _, e := range s.entries {
		if e.conf.IQN != iqn {
			continue
		}
		if e.conf.Redirect.Address == "" || e.status().Phase != proxy.Cutover && !e.isGone() {
			return
		}
		r.Address, r.Group = e.conf.Redirect.Address, e.conf.Redirect.Group
		// Its units may be here no more, so it holds whom they admit.
		who := initiators(e.conf)
		if len(who) == 0 {
			who = []target.Initiator{{Name: "*", Networks: conf.Loopback()}}
		}
		r.Initiators = append(r.Initiators, who...)
		r.PortalGroups = append(r.PortalGroups, e.conf.PortalGroups...)
		everywhere = everywhere || len(e.conf.PortalGroups) == 0
	}
	if r.Address == "" {
		return
	}
	if everywhere {
		r.PortalGroups = nil
	}
	if err := s.target.Redirect(iqn, r); err != nil {
		s.log.WithError(err).Error("logins are refused, not redirected")
		return
	}
	s.log.Infof("logins to %s are sent to %s", iqn, r.Address)
}
