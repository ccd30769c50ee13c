package control

import (
	"fmt"

	"lunshift/conf"
	"lunshift/proxy"
)

// compareIdentity says whether initiators could find the identity that the configuration
// asks for, and what hosts must not do then.
func (r *VolumeReport) compareIdentity(v conf.Volume) {
	r.Identity = v.Identity
	of := r.Source
	if v.Identity == conf.IdentityDestination {
		of = r.Destination
	}
	if v.Identity == conf.IdentityOwn || !of.Open {
		return
	}
	if !of.Presentable {
		*r = r.refuse("volume %s: %v", v.Name, proxy.Identity(v.Identity).Refused())
		return
	}
	warn := func(format string, args ...any) {
		r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: identity = %q: ", v.Name, v.Identity)+fmt.Sprintf(format, args...))
	}
	switch s, d := r.Source, r.Destination; {
	case v.Identity == conf.IdentitySource:
		if r.Phase != proxy.Ready && r.Phase != proxy.RolledBack {
			return
		}
		warn("hosts take the volume for one more path to the old LUN: before the start take the array's own paths away from every host (log out, unmap), as they lead to stale data afterwards")
		warn("reservations on the array's own paths do not hold on the volume, nor the other way round: clusters that use them must be stopped, and come back to the volume alone")
	case r.Phase != proxy.Cutover:
		warn("hosts take the volume for one more path to the new LUN: show them the array's own paths after the cutover and not before, when these lead to what is not copied yet and writes there are refused")
		if s.Open && s.Size != d.Size {
			warn("the destination has %d bytes and the volume %d, and multipath puts no paths of two sizes into one map: give it the same size, or let hosts change over with a stop", d.Size, s.Size)
		}
	}
}
