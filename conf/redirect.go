package conf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// atDestination stands for redirect = true until the destination's address is known.
var atDestination = Portal{Address: "destination"}

func redirect(to *Portal) func(any) error {
	return func(v any) error {
		if own, ok := v.(bool); ok {
			*to = Portal{}
			if own {
				*to = atDestination
			}
			return nil
		}
		var s string
		if err := text(&s)(v); err != nil {
			return err
		}
		bad := fmt.Errorf("%s is no address to log in to; it is host:port of the new array, such as \"10.0.0.9:3260\", with \",group\" behind it where the portal group is not 1", shown(s))
		address, tag, grouped := strings.Cut(s, ",")
		group := uint64(1)
		if grouped {
			var err error
			if group, err = strconv.ParseUint(tag, 10, 16); err != nil || group == 0 {
				return bad
			}
		}
		host, port, err := net.SplitHostPort(address)
		n, err2 := strconv.ParseUint(port, 10, 16)
		odd := func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/@%", r) }
		ip, _ := netip.ParseAddr(host)
		if errors.Join(err, err2) != nil || n == 0 || host == "" || ip.IsUnspecified() || strings.ContainsFunc(host, odd) {
			return bad
		}
		*to = Portal{address, uint16(group)}
		return nil
	}
}

// redirection refuses a redirection to where initiators would not find the volume.
func (d *decoder) redirection(path, label string, v *Volume, faulty map[string]bool) {
	if v.Redirect.Address == "" {
		return
	}
	fault := func(format string, args ...any) {
		d.fault(path+".redirect", label+".redirect", fmt.Sprintf(format, args...))
	}
	if v.Redirect == atDestination {
		if faulty["destination"] {
			return
		}
		host, ok := strings.CutPrefix(v.Destination.Address, "iscsi://")
		if !ok {
			fault("is true, but the destination is no iSCSI unit that initiators could be sent to; name host:port of what serves it to them, or leave it out")
			return
		}
		host, _, _ = strings.Cut(host, "/")
		host = host[strings.LastIndexByte(host, '@')+1:]
		if _, _, err := net.SplitHostPort(host); err != nil {
			host += ":3260"
		}
		if err := redirect(&v.Redirect)(host); err != nil {
			fault("is true, but initiators cannot be sent to the destination: %v", err)
			return
		}
	}
	if slices.ContainsFunc(d.portals, func(p Portal) bool { return p.takes(v.Redirect.Address) }) {
		fault("%s is a portal of lunshift itself; name one of the new array", v.Redirect.Address)
	}
	rest, ok := strings.CutPrefix(v.Destination.Address, "iscsi://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 || faulty["destination"] || faulty["iqn"] || faulty["lun"] {
		return
	}
	if lun, err := strconv.ParseUint(parts[2], 10, 64); !strings.EqualFold(parts[1], v.IQN) || err == nil && lun != v.LUN {
		fault("initiators ask for %s LUN %d there, but the destination is %s LUN %s; give the volume the iqn and lun of the destination, or leave redirect out", v.IQN, v.LUN, parts[1], parts[2])
	}
}

// takes tells whether a connection to an address of the form host:port may come to the portal,
// as far as this host knows without asking for names.
func (p Portal) takes(address string) bool {
	if p.Address == address {
		return true
	}
	at, err := netip.ParseAddrPort(p.Address)
	host, port, err2 := net.SplitHostPort(address)
	if errors.Join(err, err2) != nil || port != strconv.Itoa(int(at.Port())) {
		return false
	}
	ip, err := netip.ParseAddr(host)
	switch {
	case strings.EqualFold(host, "localhost"):
		return at.Addr().IsUnspecified() || at.Addr().IsLoopback()
	case err != nil:
		return false
	case !at.Addr().IsUnspecified():
		return at.Addr() == ip.Unmap()
	case ip.Unmap().Is4() != at.Addr().Is4():
		return false
	case ip.Unmap().IsLoopback():
		return true
	}
	own, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(own, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(net.IP(ip.AsSlice()))
	})
}

// oneRedirect refuses volumes of one target that are sent to different places: a login is
// for all of them.
func (d *decoder) oneRedirect(volumes []Volume) {
	first := map[string]Volume{}
	for n, v := range volumes {
		other, known := first[v.IQN]
		if !known {
			first[v.IQN] = v
			continue
		}
		switch {
		case v.IQN == "":
		case v.Redirect != other.Redirect:
			d.fault(fmt.Sprintf("volume[%d].redirect", n), "volume["+v.Name+"].redirect",
				fmt.Sprintf("is not that of volume %s of the same iqn, and one login leads to both; give both the same, or leave it out of both", other.Name))
		case v.RedirectFor != other.RedirectFor:
			d.fault(fmt.Sprintf("volume[%d].redirect_for", n), "volume["+v.Name+"].redirect_for",
				fmt.Sprintf("is not that of volume %s of the same iqn, and one login leads to both; give both the same, or leave it out of both", other.Name))
		}
	}
}
