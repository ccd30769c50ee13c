package iscsi

import (
	"bytes"
	"fmt"
	"strings"
)

// Limits of text (RFC 7143 6.1): a key name has at most 63 bytes, a value at
// most 255 unless the key says otherwise; the large ones are binary values of CHAP
// and the list of a SendTargets answer.
const (
	maxKeyName = 63
	maxValue   = 8192
	maxPairs   = 128
	// MaxText bounds the text of one negotiation step that is spread over several
	// PDUs, in bytes.
	MaxText = 64 << 10
)

// Values with a meaning of their own (RFC 7143 6.2).
const (
	NotUnderstood = "NotUnderstood"
	Irrelevant    = "Irrelevant"
	RejectValue   = "Reject"
	None          = "None"
	Yes           = "Yes"
	No            = "No"
)

// Pair is one key=value.
type Pair struct{ Key, Value string }

// ParseText takes text apart: key=value, each ended by a zero byte (RFC 7143 6.1).
func ParseText(b []byte) ([]Pair, error) {
	var pairs []Pair
	for len(b) > 0 {
		one, rest, _ := bytes.Cut(b, []byte{0})
		b = rest
		if len(one) == 0 { // padding that a peer counted as data
			continue
		}
		key, value, ok := bytes.Cut(one, []byte{'='})
		switch {
		case !ok:
			return nil, fmt.Errorf("text %q has no =", clip(one))
		case len(key) == 0 || len(key) > maxKeyName:
			return nil, fmt.Errorf("text key of %d bytes", len(key))
		case len(value) > maxValue:
			return nil, fmt.Errorf("value of %s has %d bytes, at most %d", clip(key), len(value), maxValue)
		case len(pairs) == maxPairs:
			return nil, fmt.Errorf("more than %d text keys", maxPairs)
		}
		pairs = append(pairs, Pair{string(key), string(value)})
	}
	return pairs, nil
}

// AppendText puts pairs behind b in wire form.
func AppendText(b []byte, pairs ...Pair) []byte {
	for _, p := range pairs {
		b = append(b, p.Key...)
		b = append(b, '=')
		b = append(b, p.Value...)
		b = append(b, 0)
	}
	return b
}

// Lookup gives the value of the first pair with that key.
func Lookup(pairs []Pair, key string) (string, bool) {
	for _, p := range pairs {
		if p.Key == key {
			return p.Value, true
		}
	}
	return "", false
}

// clip makes foreign bytes fit for a message.
func clip(b []byte) string { return strings.ToValidUTF8(string(b[:min(len(b), 64)]), "?") }
