package iscsi

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Params are the operational parameters of a session and its connection (RFC
// 7143 13). Lengths are bytes, times seconds.
type Params struct {
	HeaderDigest, DataDigest bool // CRC32C
	MaxConnections           uint32
	InitialR2T               bool
	ImmediateData            bool
	MaxBurstLength           uint32
	FirstBurstLength         uint32
	DefaultTime2Wait         uint32
	DefaultTime2Retain       uint32
	MaxOutstandingR2T        uint32
	DataPDUInOrder           bool
	DataSequenceInOrder      bool
	ErrorRecoveryLevel       uint32

	// MaxRecv is what this side takes in one data segment, PeerMaxRecv what the
	// other side declared (MaxRecvDataSegmentLength, 13.12).
	MaxRecv, PeerMaxRecv uint32
}

// DefaultParams are the values that hold when nothing is negotiated.
func DefaultParams() Params {
	return Params{
		MaxConnections: 1, InitialR2T: true, ImmediateData: true,
		MaxBurstLength: 262144, FirstBurstLength: 65536,
		DefaultTime2Wait: 2, DefaultTime2Retain: 20, MaxOutstandingR2T: 1,
		DataPDUInOrder: true, DataSequenceInOrder: true,
		MaxRecv: 8192, PeerMaxRecv: 8192,
	}
}

type keyKind int

const (
	kindDigest keyKind = iota // list of None and CRC32C
	kindMin                   // number, the lesser of both
	kindMax                   // number, the greater of both
	kindAnd                   // boolean, Yes when both say so
	kindOr                    // boolean, Yes when either says so
	kindOwn                   // number each side declares for itself
)

// operational is the table of the keys that are negotiated (RFC 7143 13).
// normal marks those that are irrelevant in a discovery session.
var operational = []struct {
	name     string
	kind     keyKind
	min, max uint32
	normal   bool
	number   func(*Params) *uint32
	boolean  func(*Params) *bool
}{
	{name: "HeaderDigest", kind: kindDigest, boolean: func(p *Params) *bool { return &p.HeaderDigest }},                                               // 13.1
	{name: "DataDigest", kind: kindDigest, boolean: func(p *Params) *bool { return &p.DataDigest }},                                                   // 13.1
	{name: "MaxConnections", kind: kindMin, min: 1, max: 65535, normal: true, number: func(p *Params) *uint32 { return &p.MaxConnections }},           // 13.2
	{name: "InitialR2T", kind: kindOr, normal: true, boolean: func(p *Params) *bool { return &p.InitialR2T }},                                         // 13.10
	{name: "ImmediateData", kind: kindAnd, normal: true, boolean: func(p *Params) *bool { return &p.ImmediateData }},                                  // 13.11
	{name: "MaxRecvDataSegmentLength", kind: kindOwn, min: 512, max: 1<<24 - 1, number: func(p *Params) *uint32 { return &p.PeerMaxRecv }},            // 13.12
	{name: "MaxBurstLength", kind: kindMin, min: 512, max: 1<<24 - 1, normal: true, number: func(p *Params) *uint32 { return &p.MaxBurstLength }},     // 13.13
	{name: "FirstBurstLength", kind: kindMin, min: 512, max: 1<<24 - 1, normal: true, number: func(p *Params) *uint32 { return &p.FirstBurstLength }}, // 13.14
	{name: "DefaultTime2Wait", kind: kindMax, max: 3600, number: func(p *Params) *uint32 { return &p.DefaultTime2Wait }},                              // 13.15
	{name: "DefaultTime2Retain", kind: kindMin, max: 3600, number: func(p *Params) *uint32 { return &p.DefaultTime2Retain }},                          // 13.16
	{name: "MaxOutstandingR2T", kind: kindMin, min: 1, max: 65535, normal: true, number: func(p *Params) *uint32 { return &p.MaxOutstandingR2T }},     // 13.17
	{name: "DataPDUInOrder", kind: kindOr, normal: true, boolean: func(p *Params) *bool { return &p.DataPDUInOrder }},                                 // 13.18
	{name: "DataSequenceInOrder", kind: kindOr, normal: true, boolean: func(p *Params) *bool { return &p.DataSequenceInOrder }},                       // 13.19
	{name: "ErrorRecoveryLevel", kind: kindMin, max: 2, number: func(p *Params) *uint32 { return &p.ErrorRecoveryLevel }},                             // 13.20
}

// Negotiation settles operational keys for one side. The same value serves the
// whole login: it remembers which keys were settled, as a key may be negotiated
// once only (RFC 7143 6.3).
type Negotiation struct {
	// Params begin as the defaults and become what was agreed.
	Params Params
	// Want is what this side would have.
	Want Params
	// Discovery makes keys of normal sessions Irrelevant.
	Discovery bool

	settled uint32 // by index into operational
	offered uint32
	fixed   uint32 // by index into fixedKeys
}

// NewNegotiation begins with the defaults of RFC 7143; want is what this side
// would have.
func NewNegotiation(want Params) *Negotiation {
	n := &Negotiation{Params: DefaultParams(), Want: want}
	n.Params.MaxRecv = want.MaxRecv
	return n
}

// Offer gives the keys an initiator sends: all that may differ from the defaults.
func (n *Negotiation) Offer() []Pair {
	var out []Pair
	for i := range operational {
		k := &operational[i]
		if n.Discovery && k.normal {
			continue
		}
		n.offered |= 1 << i
		switch k.kind {
		case kindDigest:
			v := None
			if *k.boolean(&n.Want) {
				// Alone: who asks for a digest must not go without one unawares.
				v = "CRC32C"
			}
			out = append(out, Pair{k.name, v})
		case kindOwn:
			out = append(out, Pair{k.name, strconv.FormatUint(uint64(n.Want.MaxRecv), 10)})
		case kindAnd, kindOr:
			out = append(out, Pair{k.name, yesNo(*k.boolean(&n.Want))})
		default:
			out = append(out, Pair{k.name, strconv.FormatUint(uint64(*k.number(&n.Want)), 10)})
		}
	}
	return out
}

// Respond takes a key the other side offered and gives the answer. known is false
// when the key is no operational key. A declarative key has no answer:
// answer is then empty. An error ends the login.
func (n *Negotiation) Respond(p Pair) (answer string, known bool, err error) {
	if answer, known, err = n.respondFixed(p); known {
		return answer, known, err
	}
	for i := range operational {
		k := &operational[i]
		if k.name != p.Key {
			continue
		}
		if n.settled&(1<<i) != 0 {
			return "", true, fmt.Errorf("%s negotiated twice", p.Key)
		}
		n.settled |= 1 << i
		if n.Discovery && k.normal {
			return Irrelevant, true, nil
		}
		switch k.kind {
		case kindDigest:
			for v := range strings.SplitSeq(p.Value, ",") {
				if v == None || v == "CRC32C" && *k.boolean(&n.Want) {
					*k.boolean(&n.Params) = v != None
					return v, true, nil
				}
			}
			return RejectValue, true, nil
		case kindAnd, kindOr:
			v, err := parseBool(p)
			if err != nil {
				return "", true, err
			}
			v = combine(k.kind, v, *k.boolean(&n.Want))
			*k.boolean(&n.Params) = v
			return yesNo(v), true, nil
		case kindOwn:
			v, err := parseNumber(p, k.min, k.max)
			if err != nil {
				return "", true, err
			}
			*k.number(&n.Params) = v
			return "", true, nil
		default:
			v, err := parseNumber(p, k.min, k.max)
			if err != nil {
				return "", true, err
			}
			if w := *k.number(&n.Want); k.kind == kindMin {
				v = min(v, w)
			} else {
				v = max(v, w)
			}
			if k.name == "FirstBurstLength" && n.settledKey("MaxBurstLength") {
				v = min(v, n.Params.MaxBurstLength)
			}
			*k.number(&n.Params) = v
			return strconv.FormatUint(uint64(v), 10), true, nil
		}
	}
	return "", false, nil
}

// respondFixed answers the keys to which this end has one answer whatever it is set to.
func (n *Negotiation) respondFixed(p Pair) (answer string, known bool, err error) {
	i := slices.Index(fixedKeys[:], p.Key)
	if i < 0 {
		return "", false, nil
	}
	if n.fixed&(1<<i) != 0 {
		return "", true, fmt.Errorf("%s negotiated twice", p.Key)
	}
	n.fixed |= 1 << i
	switch p.Key {
	case "IFMarker", "OFMarker":
		if p.Value == No {
			return No, true, nil
		}
		return RejectValue, true, nil
	case "TaskReporting":
		if n.Discovery {
			return Irrelevant, true, nil
		}
		if slices.Contains(strings.Split(p.Value, ","), "RFC3720") {
			return "RFC3720", true, nil
		}
		return RejectValue, true, nil
	case "iSCSIProtocolLevel":
		if n.Discovery {
			return Irrelevant, true, nil
		}
		v, err := parseNumber(p, 0, 31)
		if err != nil {
			return "", true, err
		}
		return strconv.FormatUint(uint64(min(v, protocolLevel)), 10), true, nil
	}
	return RejectValue, true, nil
}

// protocolLevel is that of RFC 7143 itself (13.24).
const protocolLevel = 1

// fixedKeys are markers, which are obsolete and never NotUnderstood (RFC 7143 13.25),
// the keys of 13.23 and 13.24, and those that only a target may send or that have no
// place in a login (13.3 to 13.9).
var fixedKeys = [...]string{
	"IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt", "TaskReporting", "iSCSIProtocolLevel",
	"SendTargets", "TargetAlias", "TargetAddress", "TargetPortalGroupTag",
}

func (n *Negotiation) settledKey(name string) bool {
	for i := range operational {
		if operational[i].name == name {
			return n.settled&(1<<i) != 0
		}
	}
	return false
}

// Apply takes the other side's answer to an offered key. An answer that the
// offer did not allow is an error.
func (n *Negotiation) Apply(p Pair) (known bool, err error) {
	for i := range operational {
		k := &operational[i]
		if k.name != p.Key {
			continue
		}
		if n.offered&(1<<i) == 0 && k.kind != kindOwn {
			return true, fmt.Errorf("%s=%s was not asked for", p.Key, clip([]byte(p.Value)))
		}
		if n.settled&(1<<i) != 0 {
			return true, fmt.Errorf("%s negotiated twice", p.Key)
		}
		n.settled |= 1 << i
		if k.kind == kindDigest {
			want := *k.boolean(&n.Want)
			switch {
			case want && p.Value == "CRC32C":
				*k.boolean(&n.Params) = true
			case want:
				return true, fmt.Errorf("the target answers %s=%s to CRC32C: switch the digest on there or do without it here", p.Key, clip([]byte(p.Value)))
			case p.Value == RejectValue:
				return true, fmt.Errorf("%s rejected by the target", p.Key)
			case p.Value != None && p.Value != NotUnderstood && p.Value != Irrelevant:
				return true, fmt.Errorf("%s=%s was not offered", p.Key, clip([]byte(p.Value)))
			}
			return true, nil
		}
		switch p.Value {
		case NotUnderstood, Irrelevant, RejectValue:
			return true, nil // the default holds
		}
		switch k.kind {
		case kindAnd, kindOr:
			v, err := parseBool(p)
			if err != nil {
				return true, err
			}
			if combine(k.kind, v, *k.boolean(&n.Want)) != v {
				return true, fmt.Errorf("%s=%s does not follow from the offer", p.Key, p.Value)
			}
			*k.boolean(&n.Params) = v
		default:
			v, err := parseNumber(p, k.min, k.max)
			if err != nil {
				return true, err
			}
			w := *k.number(&n.Want)
			if k.kind == kindMin && v > w || k.kind == kindMax && v < w {
				return true, fmt.Errorf("%s=%d does not follow from the offer %d", p.Key, v, w)
			}
			*k.number(&n.Params) = v
		}
		return true, nil
	}
	return false, nil
}

// Finish checks what hangs together once all keys are settled, and cuts
// FirstBurstLength to MaxBurstLength (RFC 7143 13.14).
func (n *Negotiation) Finish() {
	n.Params.FirstBurstLength = min(n.Params.FirstBurstLength, n.Params.MaxBurstLength)
}

func combine(k keyKind, a, b bool) bool {
	if k == kindAnd {
		return a && b
	}
	return a || b
}

func yesNo(b bool) string {
	if b {
		return Yes
	}
	return No
}

func parseBool(p Pair) (bool, error) {
	switch p.Value {
	case Yes:
		return true, nil
	case No:
		return false, nil
	}
	return false, fmt.Errorf("%s=%s is neither Yes nor No", p.Key, clip([]byte(p.Value)))
}

// parseNumber reads a decimal or hexadecimal number (RFC 7143 6.1).
func parseNumber(p Pair, lo, hi uint32) (uint32, error) {
	s, base := p.Value, 10
	if len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") {
		s, base = s[2:], 16
	}
	v, err := strconv.ParseUint(s, base, 32)
	if err != nil || v < uint64(lo) || v > uint64(hi) {
		return 0, fmt.Errorf("%s=%s is not a number from %d to %d", p.Key, clip([]byte(p.Value)), lo, hi)
	}
	return uint32(v), nil
}
