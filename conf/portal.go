package conf

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Portal is an address that initiators connect to, and the portal group that it
// belongs to (RFC 7143 4.4.1).
type Portal struct {
	// Address is "ip:port", "[ip]:port" where the IP address is version 6.
	Address string
	// Group is the target portal group tag, 1 to 65535.
	Group uint16
}

func (p Portal) String() string { return fmt.Sprintf("%s,%d", p.Address, p.Group) }

func portals(to *[]Portal) func(any) error {
	return func(v any) error {
		var given []Portal
		err := list(v, `["0.0.0.0:3260"]`, "initiators need at least one address such as \"0.0.0.0:3260\"", func(s string) error {
			p, err := parsePortal(s)
			if err != nil {
				return err
			}
			twice := slices.ContainsFunc(given, func(o Portal) bool { return o.Address == p.Address })
			if twice && !strings.HasSuffix(p.Address, ":0") {
				return fmt.Errorf("has %s twice", p.Address)
			}
			given = append(given, p)
			return nil
		})
		if err == nil {
			*to = given
		}
		return err
	}
}

// parsePortal reads "ip:port" or "ip:port,group".
func parsePortal(text string) (Portal, error) {
	const hint = `it is ip:port, such as "0.0.0.0:3260" or "[::]:3260", with ",group" behind it where there are several portal groups`
	address, tag, grouped := strings.Cut(text, ",")
	group := uint64(1)
	if grouped {
		var err error
		if group, err = strconv.ParseUint(tag, 10, 16); err != nil || group == 0 {
			return Portal{}, fmt.Errorf("%s has no portal group from 1 to 65535; %s", shown(text), hint)
		}
	}
	at, err := netip.ParseAddrPort(address)
	if err == nil {
		if at.Addr().Is4In6() {
			return Portal{}, fmt.Errorf("%s is an IPv4 address in IPv6 form; write %s", shown(text), netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
		}
		return Portal{Address: address, Group: uint16(group)}, nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return Portal{}, fmt.Errorf("%s is no portal; %s", shown(text), hint)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return Portal{}, fmt.Errorf("%s has no port number from 0 to 65535; %s", shown(text), hint)
	}
	return Portal{}, fmt.Errorf("%s is no IP address; %s", shown(host), hint)
}

// list hands each text of a list to take. An empty list is a fault with the reason.
func list(v any, example, empty string, take func(string) error) error {
	values, ok := v.([]any)
	if !ok {
		return fmt.Errorf("is %s; it is a list such as %s", kindOf(v), example)
	}
	if len(values) == 0 {
		return fmt.Errorf("is empty; %s", empty)
	}
	var faults elementFaults
	for i, e := range values {
		s, ok := e.(string)
		if !ok {
			faults = append(faults, elementFault{i, fmt.Sprintf("holds %s; it is a list such as %s", kindOf(e), example)})
			continue
		}
		if err := take(s); err != nil {
			faults = append(faults, elementFault{i, err.Error()})
		}
	}
	if len(faults) > 0 {
		return faults
	}
	return nil
}

// portalGroups takes the groups that lead to a volume.
func portalGroups(to *[]uint16) func(any) error {
	return func(v any) error {
		values, ok := v.([]any)
		if !ok {
			return fmt.Errorf("is %s; it is a list of portal groups such as [1, 2]", kindOf(v))
		}
		if len(values) == 0 {
			return fmt.Errorf("is empty, so that nobody could reach the volume; name at least one portal group, or leave it out for all")
		}
		var given []uint16
		var faults elementFaults
		for i, e := range values {
			n, ok := e.(int64)
			switch {
			case !ok || n < 1 || n > 65535:
				faults = append(faults, elementFault{i, fmt.Sprintf("holds %s; a portal group is a number from 1 to 65535", kindOf(e))})
			case slices.Contains(given, uint16(n)):
				faults = append(faults, elementFault{i, fmt.Sprintf("has %d twice", n)})
			default:
				given = append(given, uint16(n))
			}
		}
		if len(faults) > 0 {
			return faults
		}
		*to = given
		return nil
	}
}

// groupsWithPortals refuses a portal group that has no portal.
func (d *decoder) groupsWithPortals(path, label string, v *Volume) {
	if d.portals == nil {
		return // they are faulty themselves
	}
	for i, group := range v.PortalGroups {
		if slices.ContainsFunc(d.portals, func(p Portal) bool { return p.Group == group }) {
			continue
		}
		d.fault(fmt.Sprintf("%s.portal_groups[%d]", path, i), label+".portal_groups",
			fmt.Sprintf("no portal is in group %d; add one to service.portals, such as \"10.0.0.20:3260,%d\"", group, group))
	}
}
