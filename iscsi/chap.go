package iscsi

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
)

// CHAP (RFC 7143 12.1.3, RFC 1994): the target sends CHAP_A, CHAP_I and CHAP_C,
// the initiator answers CHAP_N and CHAP_R; with a challenge of its own, the target
// answers that too.

// chapAlgorithms are those of RFC 7143 12.1.3 and the IANA registry, strongest
// first.
var chapAlgorithms = []struct {
	number int
	make   func() hash.Hash
}{
	{8, func() hash.Hash { return sha3.New256() }},
	{7, sha256.New},
	{6, sha1.New},
	{5, md5.New},
}

// chapChallenge is the length of the challenges sent, in bytes.
const chapChallenge = 32

// maxChapBytes is the longest binary value RFC 7143 12.1.3 allows.
const maxChapBytes = 1024

// Errors of an authentication.
var (
	// ErrCHAP: the name or the response is wrong.
	ErrCHAP = errors.New("CHAP authentication failed")
	// ErrReflection: the peer sent back our own challenge (RFC 7143 12.1.3).
	ErrReflection = errors.New("CHAP challenge reflected")
)

// Credentials are a CHAP name and secret. Printed, they show the name alone.
type Credentials struct {
	Name   string
	Secret string `json:"-"`
}

func (c Credentials) String() string { return c.Name }

// GoString keeps the secret out of %#v as well.
func (c Credentials) GoString() string { return fmt.Sprintf("iscsi.Credentials{Name:%q}", c.Name) }

// CHAPInitiator is the initiator's side of one authentication.
type CHAPInitiator struct {
	Own Credentials
	// Target, when its Secret is set, makes the authentication mutual.
	Target Credentials

	algorithm int
	id        byte
	challenge []byte
	secured   bool
}

// Algorithms is the first step: CHAP_A with all that are known.
func (c *CHAPInitiator) Algorithms() []Pair {
	var s []string
	for _, a := range chapAlgorithms {
		s = append(s, strconv.Itoa(a.number))
	}
	return []Pair{{"CHAP_A", strings.Join(s, ",")}}
}

// Answer is the second step: it takes the target's CHAP_A, CHAP_I and CHAP_C.
func (c *CHAPInitiator) Answer(in []Pair) ([]Pair, error) {
	a, err := chapNumber(in, "CHAP_A", 255)
	if err != nil {
		return nil, err
	}
	id, err := chapNumber(in, "CHAP_I", 255)
	if err != nil {
		return nil, err
	}
	challenge, err := chapBytes(in, "CHAP_C")
	if err != nil {
		return nil, err
	}
	r, err := chapResponse(a, byte(id), c.Own.Secret, challenge)
	if err != nil {
		return nil, err
	}
	out := []Pair{{"CHAP_N", c.Own.Name}, {"CHAP_R", "0x" + hex.EncodeToString(r)}}
	if c.Target.Secret == "" {
		c.secured = true
		return out, nil
	}
	c.algorithm = a
	if c.id, c.challenge, err = newChallenge(); err != nil {
		return nil, err
	}
	return append(out, Pair{"CHAP_I", strconv.Itoa(int(c.id))}, Pair{"CHAP_C", "0x" + hex.EncodeToString(c.challenge)}), nil
}

// Check is the last step of a mutual authentication: it takes the target's CHAP_N
// and CHAP_R.
func (c *CHAPInitiator) Check(in []Pair) error {
	if c.Target.Secret == "" {
		return nil
	}
	if c.challenge == nil {
		return fmt.Errorf("target answered before it was asked: %w", ErrCHAP)
	}
	if err := chapCheck(in, c.algorithm, c.id, c.challenge, c.Target); err != nil {
		return err
	}
	c.secured = true
	return nil
}

// Done tells whether both sides are proven as far as was asked.
func (c *CHAPInitiator) Done() bool { return c.secured }

// CHAPSecrets are what an initiator proves to know, and what the target proves in turn; its
// Secret is empty where it has none.
type CHAPSecrets struct{ Initiator, Own Credentials }

// CHAPTarget is the target's side of one authentication.
type CHAPTarget struct {
	// Initiator is whom to expect; an empty Name takes any name with that secret.
	Initiator Credentials
	// Own, when its Secret is set, answers an initiator that asks the target to
	// prove itself.
	Own Credentials
	// Choose, where it is set, gives what a CHAP_N may prove, in place of the fields
	// above, which hold afterwards what was proven. A name that it knows nothing of fails
	// at the same cost as a wrong secret does.
	Choose func(name string) []CHAPSecrets
	// Issued, where it is set, tells whether this end has a challenge open somewhere:
	// one that comes back is refused, whichever connection it was sent on.
	Issued func(challenge []byte) bool

	algorithm int
	id        byte
	challenge []byte
	done      bool
}

// Challenge is the first step: it takes the initiator's CHAP_A and chooses the
// first algorithm of that list that is known.
func (c *CHAPTarget) Challenge(in []Pair) ([]Pair, error) {
	list, ok := Lookup(in, "CHAP_A")
	if !ok {
		return nil, fmt.Errorf("CHAP_A is missing: %w", ErrCHAP)
	}
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || chapHash(n) == nil {
			continue
		}
		c.algorithm = n
		if c.id, c.challenge, err = newChallenge(); err != nil {
			return nil, err
		}
		return []Pair{{"CHAP_A", s}, {"CHAP_I", strconv.Itoa(int(c.id))},
			{"CHAP_C", "0x" + hex.EncodeToString(c.challenge)}}, nil
	}
	return nil, fmt.Errorf("no common CHAP algorithm in %s: %w", clip([]byte(list)), ErrCHAP)
}

// Verify is the second step: it takes the initiator's CHAP_N and CHAP_R and gives the
// target's own proof when that was asked for.
func (c *CHAPTarget) Verify(in []Pair) ([]Pair, error) {
	if c.challenge == nil || c.done {
		return nil, fmt.Errorf("no challenge is open: %w", ErrCHAP)
	}
	challenge := c.challenge
	c.challenge = nil // good for one answer, right or wrong
	_, asked := Lookup(in, "CHAP_C")
	var reverse []byte
	var id int
	var err error
	if asked {
		if reverse, err = chapBytes(in, "CHAP_C"); err != nil {
			return nil, err
		}
		if hmac.Equal(reverse, challenge) || c.Issued != nil && c.Issued(reverse) {
			return nil, ErrReflection
		}
		if id, err = chapNumber(in, "CHAP_I", 255); err != nil {
			return nil, err
		}
	}
	all := []CHAPSecrets{{c.Initiator, c.Own}}
	if c.Choose != nil {
		name, _ := Lookup(in, "CHAP_N")
		if all = c.Choose(name); len(all) == 0 {
			all = []CHAPSecrets{{}}
		}
	}
	right := errors.New("nothing is asked")
	for _, one := range all { // all of them, so that the time tells nothing of which it is
		err := chapCheck(in, c.algorithm, c.id, challenge, one.Initiator)
		if err == nil && right != nil {
			c.Initiator, c.Own = one.Initiator, one.Own
		}
		if right != nil {
			right = err
		}
	}
	if right != nil {
		return nil, right
	}
	if !asked {
		c.done = true
		return nil, nil
	}
	if c.Own.Secret == "" {
		return nil, fmt.Errorf("initiator asks for a proof and the target has no secret: %w", ErrCHAP)
	}
	r, err := chapResponse(c.algorithm, byte(id), c.Own.Secret, reverse)
	if err != nil {
		return nil, err
	}
	c.done = true
	return []Pair{{"CHAP_N", c.Own.Name}, {"CHAP_R", "0x" + hex.EncodeToString(r)}}, nil
}

// Open gives the challenge that waits for its answer; nil where none does.
func (c *CHAPTarget) Open() []byte { return c.challenge }

// Done tells whether the initiator proved itself.
func (c *CHAPTarget) Done() bool { return c.done }

func newChallenge() (byte, []byte, error) {
	b := make([]byte, 1+chapChallenge)
	if _, err := rand.Read(b); err != nil {
		return 0, nil, fmt.Errorf("CHAP challenge: %w", err)
	}
	return b[0], b[1:], nil
}

func chapHash(number int) hash.Hash {
	for _, a := range chapAlgorithms {
		if a.number == number {
			return a.make()
		}
	}
	return nil
}

func chapResponse(algorithm int, id byte, secret string, challenge []byte) ([]byte, error) {
	h := chapHash(algorithm)
	if h == nil {
		return nil, fmt.Errorf("CHAP algorithm %d is not known: %w", algorithm, ErrCHAP)
	}
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil), nil
}

// chapCheck compares in constant time, and computes the response whether or not
// the name is right.
func chapCheck(in []Pair, algorithm int, id byte, challenge []byte, want Credentials) error {
	name, ok := Lookup(in, "CHAP_N")
	if !ok {
		return fmt.Errorf("CHAP_N is missing: %w", ErrCHAP)
	}
	got, err := chapBytes(in, "CHAP_R")
	if err != nil {
		return err
	}
	r, err := chapResponse(algorithm, id, want.Secret, challenge)
	if err != nil {
		return err
	}
	right := hmac.Equal(got, r)
	if !right || want.Name != "" && name != want.Name || want.Secret == "" {
		return ErrCHAP
	}
	return nil
}

func chapNumber(in []Pair, key string, most uint32) (int, error) {
	v, ok := Lookup(in, key)
	if !ok {
		return 0, fmt.Errorf("%s is missing: %w", key, ErrCHAP)
	}
	n, err := parseNumber(Pair{key, v}, 0, most)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, ErrCHAP)
	}
	return int(n), nil
}

func chapBytes(in []Pair, key string) ([]byte, error) {
	v, ok := Lookup(in, key)
	if !ok {
		return nil, fmt.Errorf("%s is missing: %w", key, ErrCHAP)
	}
	b, err := decodeBinary(v)
	if err != nil || len(b) == 0 || len(b) > maxChapBytes {
		return nil, fmt.Errorf("%s is not 1 to %d bytes: %w", key, maxChapBytes, ErrCHAP)
	}
	return b, nil
}

// decodeBinary reads a binary value, 0x… or 0b… (RFC 7143 6.1).
func decodeBinary(s string) ([]byte, error) {
	if len(s) < 2 || s[0] != '0' {
		return nil, errors.New("no binary value")
	}
	switch s[1] {
	case 'x', 'X':
		s = s[2:]
		if len(s)%2 == 1 {
			s = "0" + s
		}
		return hex.DecodeString(s)
	case 'b', 'B':
		return base64.StdEncoding.DecodeString(s[2:])
	}
	return nil, errors.New("no binary value")
}
