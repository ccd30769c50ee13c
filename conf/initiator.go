package conf

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const (
	// minCHAPSecret is in bytes, the 96 bits of RFC 7143 9.2.1.
	minCHAPSecret = 12
	// maxCHAPUser is in bytes; initiators hold no longer ones.
	maxCHAPUser = 255
	// maxInitiators and maxNetworks bound the lists of a volume and of an entry.
	maxInitiators, maxNetworks = 1024, 256
)

// Initiator is one [[volume.initiator]] table: who may come in. The first that matches
// an initiator counts; for a name that one of them has in full, the first of those that have.
type Initiator struct {
	// Name is an initiator name, or the beginning of names where it ends in "*", in small
	// letters: that is how names are compared (RFC 7143 4.2.7.2).
	Name string
	// Networks are where it may come from; empty is anywhere.
	Networks []netip.Prefix
	// CHAP is what it must prove; its zero value asks for nothing.
	CHAP CHAP
}

// CHAP is what an initiator proves at its login, and the target in turn (RFC 7143
// 12.1.3). Secrets have 12 to 255 bytes.
type CHAP struct {
	// User and Secret are the initiator's; both are empty where it proves nothing.
	User   string
	Secret Secret
	// TargetUser and TargetSecret are the target's own; both are empty where it proves
	// nothing (no mutual CHAP).
	TargetUser   string
	TargetSecret Secret
}

// chapKeys are the CHAP settings of one table as they are read.
type chapKeys struct {
	chap                     CHAP
	secretFile, targetSecret string
}

func (k *chapKeys) settings() []setting {
	return []setting{
		{"chap_user", all(text(&k.chap.User), func() error { return checkCHAPUser(k.chap.User) })},
		{"chap_secret_file", secretFile(&k.secretFile)},
		{"target_user", all(text(&k.chap.TargetUser), func() error { return checkCHAPUser(k.chap.TargetUser) })},
		{"target_secret_file", secretFile(&k.targetSecret)},
	}
}

func initiatorSettings(i *Initiator, keys *chapKeys) []setting {
	return append([]setting{
		{"name", all(text(&i.Name), func() error {
			i.Name = strings.ToLower(i.Name) // hosts have names with capitals
			return checkInitiator(i.Name)
		})},
		{"networks", networks(&i.Networks)},
	}, keys.settings()...)
}

// initiators reads the [[volume.initiator]] tables of a volume whose name is volume.
func (d *decoder) initiators(v any, volume, path, label string) []Initiator {
	entries, ok := v.([]any)
	if !ok {
		d.fault(path, label, fmt.Sprintf("is %s; each initiator opens with a line [[volume.initiator]]", kindOf(v)))
		return nil
	}
	switch {
	case len(entries) == 0:
		d.fault(path, label, "is empty; name the initiators that may come in, or leave it out for those on this host alone")
	case len(entries) > maxInitiators:
		d.fault(path, label, fmt.Sprintf("has %d entries; a volume has %d at most: let one entry stand for many by a \"*\" at the end of its name", len(entries), maxInitiators))
		return nil
	}
	var all []Initiator
	for n, e := range entries {
		at, name := fmt.Sprintf("%s[%d]", path, n), fmt.Sprintf("%s[%d]", label, n)
		m, ok := e.(map[string]any)
		if !ok {
			d.fault(at, name, fmt.Sprintf("is %s; each initiator opens with a line [[volume.initiator]]", kindOf(e)))
			continue
		}
		var i Initiator
		var keys chapKeys
		faulty := d.table(m, at, name, initiatorSettings(&i, &keys))
		if _, given := m["name"]; !given {
			d.fault(at, name+".name", "is missing; it is an initiator name, or the beginning of names with \"*\" at the end")
			faulty["name"] = true
		}
		who := fmt.Sprintf("user %s of volume %s", keys.chap.User, volume)
		i.CHAP = d.chap(keys, faulty, at, name, who, InitiatorSecretVariable(volume, keys.chap.User), volume != "")
		if faulty["name"] || faulty["networks"] {
			continue
		}
		if earlier := slices.IndexFunc(all, func(o Initiator) bool { return o.covers(i) }); earlier >= 0 {
			d.fault(at, name, fmt.Sprintf("never counts, because %s before it matches the same and the first that matches counts; put the narrower one first", describe(all[earlier])))
		}
		all = append(all, i)
	}
	return all
}

// chap finds the secrets of one table. Its variables are looked at where named says
// that they have a name; who tells people whose they are.
func (d *decoder) chap(keys chapKeys, faulty map[string]bool, path, label, who, variable string, named bool) CHAP {
	chap := keys.chap
	for _, side := range []struct {
		user, secret, file string
		name               string
		to                 *Secret
		variable, who      string
	}{
		{"chap_user", "chap_secret_file", keys.secretFile, chap.User, &chap.Secret, variable, who},
		{"target_user", "target_secret_file", keys.targetSecret, chap.TargetUser, &chap.TargetSecret, variable + "_TARGET", who + ", for the target"},
	} {
		if faulty[side.user] || faulty[side.secret] {
			faulty["chap"] = true
			continue
		}
		fault := func(key, format string, args ...any) {
			faulty["chap"] = true
			d.fault(path+"."+key, label+"."+key, fmt.Sprintf(format, args...))
		}
		if side.name == "" {
			if side.file != "" {
				fault(side.secret, "there is a secret but no %s; add it", side.user)
			}
			continue
		}
		if named && (side.user == "chap_user" || chap.User != "") {
			secret, err := d.fromEnvironment(side.variable, side.who, minCHAPSecret)
			if *side.to = secret; err != nil {
				fault(side.user, "%v", err)
				continue
			}
		}
		if *side.to == "" && side.file != "" {
			secret, err := readSecret(side.file, minCHAPSecret)
			if *side.to = secret; err != nil {
				fault(side.secret, "%v", err)
				continue
			}
		}
		if *side.to == "" {
			fault(side.user, "%s needs a secret; put it into %s, or into %s of the environment", side.name, side.secret, side.variable)
		}
	}
	if faulty["chap"] {
		return CHAP{}
	}
	switch {
	case chap.TargetUser != "" && chap.User == "":
		d.fault(path+".target_user", label+".target_user", "the target proves itself only to an initiator that does; add chap_user and its secret")
	case chap.Secret != "":
		d.proofs = append(d.proofs, proof{chap.Secret, path, label, false})
		if chap.TargetSecret != "" {
			d.proofs = append(d.proofs, proof{chap.TargetSecret, path, label, true})
		}
	}
	return chap
}

// proof is a secret and whose it is.
type proof struct {
	secret      Secret
	path, label string
	target      bool
}

// reflections refuses a secret that proves both an initiator and the target, wherever
// the two stand: who may ask the target for its proof could pass that off as an
// initiator's (RFC 7143 9.2.1).
func (d *decoder) reflections() {
	initiators := map[Secret]string{}
	for _, p := range d.proofs {
		if !p.target {
			initiators[p.secret] = p.label
		}
	}
	for _, p := range d.proofs {
		owner, same := initiators[p.secret]
		if !p.target || !same {
			continue
		}
		d.fault(p.path+".target_user", p.label+".target_user", fmt.Sprintf(
			"the target's secret is that of the initiator in %s; give the target another one (RFC 7143 9.2.1)", owner))
	}
}

// covers tells whether each initiator that o matches is matched by i, if it comes first. A
// name in full counts before every beginning of names, so none of these covers it.
func (i Initiator) covers(o Initiator) bool {
	prefix, many := strings.CutSuffix(i.Name, "*")
	wide := strings.HasSuffix(o.Name, "*")
	if many && !(wide && strings.HasPrefix(o.Name[:len(o.Name)-1], prefix)) || !many && i.Name != o.Name {
		return false
	}
	if len(i.Networks) == 0 {
		return true
	}
	return len(o.Networks) > 0 && !slices.ContainsFunc(o.Networks, func(inner netip.Prefix) bool {
		return !slices.ContainsFunc(i.Networks, func(outer netip.Prefix) bool {
			return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
		})
	})
}

func describe(i Initiator) string {
	text := i.Name
	for n, p := range i.Networks {
		if n == 0 {
			text += " from "
		} else {
			text += ", "
		}
		text += p.String()
	}
	return text
}

// Loopback are the networks of initiators on this host, which alone come in where a
// volume has no list.
func Loopback() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
}

// oneLogin refuses volumes of one target that ask one initiator for different proofs:
// it logs in to the target, once for all of them.
func (d *decoder) oneLogin(volumes []Volume) {
	type listed struct {
		index int
		list  []Initiator
	}
	byTarget := map[string][]listed{}
	for n, v := range volumes {
		entries := v.Initiators
		if len(entries) == 0 {
			entries = []Initiator{{Name: "*", Networks: Loopback()}}
		}
		for _, o := range byTarget[v.IQN] {
			other := volumes[o.index]
			if v.IQN == "" || !shareGroup(v.PortalGroups, other.PortalGroups) {
				continue
			}
			if who := contradiction(o.list, entries); who != "" {
				path, label := fmt.Sprintf("volume[%d].initiator", n), "volume["+v.Name+"].initiator"
				d.fault(path, label, fmt.Sprintf("asks %s for another proof than volume %s of the same iqn does, and one login leads to both; give them the same CHAP settings, or another iqn", who, other.Name))
				break
			}
		}
		byTarget[v.IQN] = append(byTarget[v.IQN], listed{n, entries})
	}
}

func shareGroup(a, b []uint16) bool {
	return len(a) == 0 || len(b) == 0 || slices.ContainsFunc(a, func(g uint16) bool { return slices.Contains(b, g) })
}

// contradiction is an initiator that both lists admit with different proofs; empty for
// none. Names and addresses fall into few classes that entries tell apart, so one of
// each is tried: every name as it stands, and one longer than every beginning; the
// first address of every network, and the first behind it.
func contradiction(a, b []Initiator) string {
	same := func(x, y Initiator) bool {
		return x.Name == y.Name && x.CHAP == y.CHAP && slices.Equal(x.Networks, y.Networks)
	}
	if slices.EqualFunc(a, b, same) {
		return ""
	}
	tried := map[string]bool{}
	for _, i := range slices.Concat(a, b) {
		name := i.Name
		if prefix, many := strings.CutSuffix(name, "*"); many {
			name = prefix + "\x00"
		}
		if tried[name] {
			continue
		}
		tried[name] = true
		first, second := applying(a, name), applying(b, name)
		both := slices.Concat(first, second)
		if len(first) == 0 || len(second) == 0 || !slices.ContainsFunc(both, func(o *Initiator) bool { return o.CHAP != both[0].CHAP }) {
			continue
		}
		addresses := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
		for _, o := range both {
			for _, p := range o.Networks {
				addresses = append(addresses, p.Addr())
				if next := lastOf(p).Next(); next.IsValid() {
					addresses = append(addresses, next)
				}
			}
		}
		x, y := byNetwork(first), byNetwork(second)
		for _, from := range addresses {
			if o, other := x.first(from), y.first(from); o != nil && other != nil && o.CHAP != other.CHAP {
				return fmt.Sprintf("initiator %s", describe(*other))
			}
		}
	}
	return ""
}

// applying are the entries that an initiator of that name may match: those that have it in
// full, and only where there is none those that have its beginning.
func applying(list []Initiator, name string) []*Initiator {
	var inFull, begun []*Initiator
	for n := range list {
		if i := &list[n]; i.Name == name {
			inFull = append(inFull, i)
		} else if prefix, many := strings.CutSuffix(i.Name, "*"); many && strings.HasPrefix(name, prefix) {
			begun = append(begun, i)
		}
	}
	if len(inFull) > 0 {
		return inFull
	}
	return begun
}

// networkIndex finds the first entry that an address matches without a look at each.
type networkIndex struct {
	entries  []*Initiator
	position map[netip.Prefix]int // of the first with that network
	lengths  []int                // of these networks, in bits
	anywhere int                  // position of the first without networks
}

func byNetwork(entries []*Initiator) networkIndex {
	x := networkIndex{entries, map[netip.Prefix]int{}, nil, len(entries)}
	for n, i := range entries {
		if len(i.Networks) == 0 {
			x.anywhere = min(x.anywhere, n)
		}
		for _, p := range i.Networks {
			if _, known := x.position[p]; !known {
				x.position[p] = n
			}
			if !slices.Contains(x.lengths, p.Bits()) {
				x.lengths = append(x.lengths, p.Bits())
			}
		}
	}
	return x
}

func (x *networkIndex) first(from netip.Addr) *Initiator {
	best := x.anywhere
	for _, bits := range x.lengths {
		if p, err := from.Prefix(bits); err == nil {
			if n, ok := x.position[p]; ok {
				best = min(best, n)
			}
		}
	}
	if best == len(x.entries) {
		return nil
	}
	return x.entries[best]
}

// lastOf is the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	bytes := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(bytes)
	return last
}

func networks(to *[]netip.Prefix) func(any) error {
	return func(v any) error {
		var given []netip.Prefix
		err := list(v, `["10.0.0.0/24"]`, "nobody matches then; name at least one network, or leave it out for anywhere", func(s string) error {
			p, err := parseNetwork(s)
			if err != nil {
				return err
			}
			if slices.Contains(given, p) {
				return fmt.Errorf("has %s twice", p)
			}
			given = append(given, p)
			return nil
		})
		if err != nil {
			return err
		}
		if len(given) > maxNetworks {
			return fmt.Errorf("has %d networks; an initiator has %d at most", len(given), maxNetworks)
		}
		*to = given
		return nil
	}
}

// parseNetwork reads "10.0.0.0/24", "2001:db8::/64", or one address.
func parseNetwork(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if a, single := netip.ParseAddr(s); err != nil && single == nil && a.Zone() == "" {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is no network; it is such as \"10.0.0.0/24\", \"2001:db8::/64\", or one address", s)
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%q is an IPv4 address in IPv6 form; write the IPv4 network", s)
	case p != p.Masked():
		return p, fmt.Errorf("%q has address bits behind its length; write %s for the network, or %s for the one address", s, p.Masked(), p.Addr())
	}
	return p, nil
}

// checkInitiator holds the name of an entry against what initiators can be called.
func checkInitiator(name string) error {
	prefix, many := strings.CutSuffix(name, "*")
	switch {
	case strings.Contains(prefix, "*"):
		return fmt.Errorf("%q has a \"*\" that is not at its end; it stands at the end alone", name)
	case !many:
		return checkISCSIName(name)
	case prefix == "":
		return nil
	case len(prefix) > maxISCSIName:
		return fmt.Errorf("has %d bytes before the \"*\"; an iSCSI name has at most %d (RFC 7143 4.2.7.1)", len(prefix), maxISCSIName)
	case !beginsName.MatchString(prefix):
		return fmt.Errorf("%q begins no iSCSI name; it is such as \"iqn.2026-11.net.example:*\", or \"*\" for all", name)
	}
	return nil
}

func checkCHAPUser(user string) error {
	switch {
	case user == "":
		return errors.New("is empty; it is the CHAP name, such as \"app1\"")
	case len(user) > maxCHAPUser:
		return fmt.Errorf("has %d bytes; a CHAP name has at most %d", len(user), maxCHAPUser)
	case strings.ContainsFunc(user, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%q has control characters; a CHAP name is one line of text", user)
	}
	return nil
}
