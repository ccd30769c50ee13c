package target

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
)

// Config is what a Server is made of. Past a limit that it sets an initiator gets the
// protocol's own refusal, and nobody else is disturbed.
type Config struct {
	// Portals are where to listen.
	Portals []Portal
	// Discovery is what an initiator must prove before it sees a target name in a
	// discovery session; nil for nothing.
	Discovery *Authentication
	Log       logrus.FieldLogger

	// MaxRecvDataSegmentLength is the longest data segment the target accepts, in
	// bytes, 512 to 16 MiB less one; 0 is 256 KiB (RFC 7143 13.12).
	MaxRecvDataSegmentLength uint32
	// MaxBurstLength and FirstBurstLength are in bytes, 512 to 16 MiB less one
	// (RFC 7143 13.13, 13.14); 0 is 1 MiB and 256 KiB.
	MaxBurstLength, FirstBurstLength uint32
	// MaxOutstandingR2T is how many R2Ts of one command may be open, 1 to 64; 0 is 8
	// (RFC 7143 13.17).
	MaxOutstandingR2T uint32
	// MaxText is the longest text of a login or a text request over all its PDUs, in
	// bytes, 8 KiB to 1 MiB; 0 is 64 KiB.
	MaxText int

	// MaxConnections is how many connections may be logged in to targets at a time, each
	// one a session, at most 65535 (RFC 7143 11.12.6); 0 is 1024. A session that ends in
	// favour of its successor (RFC 7143 6.3.5) makes room for it. Discovery sessions
	// do not count.
	MaxConnections int
	// ConnectionsPerAddress is how many of them may come from one IP address, and how
	// many may be logging in from it; 0 is 256. Here and below an IPv6 network of 64 bits
	// counts as one address.
	ConnectionsPerAddress int
	// ConnectionsLoggingIn is how many connections may be logging in at a time; 0 is
	// 256. They take no places of sessions. A discovery session keeps its place among
	// them, and lasts one LoginTimeout at most. Where all are taken, a newcomer gets the
	// place of another: from an address with sessions before one that some unit's
	// networks name, before any other; among equals that of the oldest from the address
	// with the most places, if it has more than the newcomer's has.
	ConnectionsLoggingIn int
	// SessionsPerUnit is how many sessions may see one logical unit; 0 is 256. It is
	// looked at when a session begins.
	SessionsPerUnit int
	// LoginTimeout is how long a connection may take to log in, and after that how long
	// a discovery session may last; 0 is 15 s.
	LoginTimeout time.Duration
	// LoginFailures is how many logins of one IP address may fail within a minute,
	// which begins with the first, before further ones are refused unheard (login
	// status 0301h) until it is over; 0 is 20. A login fails when the initiator
	// does not prove what it must, is not admitted or breaks the protocol.
	LoginFailures int
	// CommandsPerSession is the command window of a session, 1 to 4096; 0 is 128.
	CommandsPerSession int
	// BytesInFlight bounds the memory for the data of all commands together, in bytes,
	// at least 64 MiB; 0 is 256 MiB. A command is counted from when it is admitted,
	// with what its data will take; it takes it with the first byte. What does not fit
	// waits. A quarter is for data that arrives before its command is admitted;
	// when that is used up such a command ends with TASK SET FULL. One session has
	// three sixteenths at most, but not less than 40 MiB, and an eighth for data that
	// comes early. Besides, a connection on which something is being read or sent has
	// up to 768 KiB of buffers.
	BytesInFlight int64
	// DataTimeout is how long an initiator may take to send the next part of a
	// command's data-out before its session is dropped; 0 is 2 min. It is looked at
	// every half of it.
	DataTimeout time.Duration
	// NopInterval is twice the time between two looks at each session. One that was silent
	// since the last look is pinged, and dropped if it does not answer until the next.
	// One that takes nothing of what was sent for a whole NopInterval is dropped as well,
	// whatever it sends. 0 is 15 s, negative never pings and drops none.
	NopInterval time.Duration
}

// Portal is one TCP address to listen on and the portal group that it belongs to
// (RFC 7143 4.4.1).
type Portal struct {
	// Address is host:port.
	Address string
	// Group is the target portal group tag, 1 to 65535; 0 is 1 (RFC 7143 13.9).
	Group uint16
}

// Unit is one logical unit and its place.
type Unit struct {
	// IQN is the target's name, LUN the unit's number in it, 0 to 16383.
	IQN    string
	LUN    uint64
	Device lun.Updater
	// Vendor, Product, Revision are the INQUIRY identification, at most 8, 16
	// and 4 characters; Serial is VPD page 80h, at most 64. Where Vendor, Product or
	// Revision is empty the target's own is used; where Serial is empty it is
	// made from IQN and LUN.
	Vendor, Product, Revision, Serial string
	// NAA is the NAA designator of VPD page 83h; 0 makes one from IQN and LUN.
	NAA uint64
	// Identity, unless nil, is what INQUIRY says in the place of the five above: that of
	// another unit, to which initiators then have one more path.
	Identity *lun.Identity
	// Access is the state that the unit begins with.
	Access AccessState
	// Alias is the TargetAlias; may be empty.
	Alias string
	// Initiators may see the unit; the first that matches counts, and
	// for a name that one of them has in full only those that have. Empty is any
	// initiator on the loopback of this host, and no other.
	Initiators []Initiator
	// PortalGroups are the groups whose portals lead to the unit; empty is all.
	PortalGroups []uint16
	// Reservations keeps the persistent reservations of the unit; nil keeps them for
	// as long as the server lives, and APTPL is refused (SPC-4 5.12.5).
	Reservations ReservationStore
	// ReservationsByName makes registrations those of an initiator name: they stay with
	// an initiator that changes its ISID between logins. Otherwise they are those of an
	// initiator port, which has the ISID in its name (RFC 7143 4.4.1, SPC-4 5.12.1).
	ReservationsByName bool
}

// ReservationStore keeps the persistent reservations of one logical unit over a
// restart. What it keeps is the target's own form, of MostReservationData bytes at most.
type ReservationStore interface {
	// Load gives what was saved last; nil where nothing ever was.
	Load() ([]byte, error)
	// Save returns once data is on stable storage. After an error the store has what it
	// had, or data.
	Save(ctx context.Context, data []byte) error
}

// MostReservationData bounds what a ReservationStore is asked to keep, in bytes.
const MostReservationData = 512 << 10

// New checks cfg and makes a Server that does not listen yet.
func New(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		l := logrus.New()
		l.SetLevel(logrus.PanicLevel)
		cfg.Log = l
	}
	err := errors.Join(
		limit(&cfg.MaxRecvDataSegmentLength, 256<<10, 512, 1<<24-1, "MaxRecvDataSegmentLength"),
		limit(&cfg.MaxBurstLength, 1<<20, 512, 1<<24-1, "MaxBurstLength"),
		limit(&cfg.FirstBurstLength, 256<<10, 512, 1<<24-1, "FirstBurstLength"),
		limit(&cfg.MaxOutstandingR2T, 8, 1, 64, "MaxOutstandingR2T"),
		limit(&cfg.MaxText, 64<<10, 8<<10, 1<<20, "MaxText"),
		limit(&cfg.MaxConnections, 1024, 1, mostHandles, "MaxConnections"),
		limit(&cfg.ConnectionsPerAddress, 256, 1, 1<<20, "ConnectionsPerAddress"),
		limit(&cfg.ConnectionsLoggingIn, 256, 1, 1<<20, "ConnectionsLoggingIn"),
		limit(&cfg.SessionsPerUnit, 256, 1, 1<<20, "SessionsPerUnit"),
		limit(&cfg.LoginTimeout, 15*time.Second, time.Millisecond, time.Hour, "LoginTimeout"),
		limit(&cfg.LoginFailures, 20, 1, 1<<20, "LoginFailures"),
		limit(&cfg.CommandsPerSession, 128, 1, 4096, "CommandsPerSession"),
		limit(&cfg.BytesInFlight, 256<<20, 2*maxTransfer, 1<<50, "BytesInFlight"),
		limit(&cfg.DataTimeout, 2*time.Minute, time.Millisecond, 24*time.Hour, "DataTimeout"),
	)
	if cfg.Discovery != nil {
		if bad := cfg.Discovery.check(); bad != nil {
			err = errors.Join(err, fmt.Errorf("target: discovery: %w", bad))
		}
	}
	if err != nil {
		return nil, err
	}
	cfg.Portals = slices.Clone(cfg.Portals)
	cfg.FirstBurstLength = min(cfg.FirstBurstLength, cfg.MaxBurstLength)
	if cfg.NopInterval == 0 {
		cfg.NopInterval = 15 * time.Second
	}
	for i := range cfg.Portals {
		cfg.Portals[i].Group = max(cfg.Portals[i].Group, 1)
	}
	return &Server{
		cfg: cfg, log: cfg.Log, bytes: newAdmission(cfg.BytesInFlight),
		failures: newFailures(cfg.LoginFailures), challenges: newChallenges(), notices: newNotices(),
		refusals: make(chan struct{}, mostRefusals),
		ending:   make(chan struct{}),
		networks: networks{}, targets: map[string]*node{}, redirects: map[string]*Redirection{}, conns: map[*conn]struct{}{},
	}, nil
}

// limit sets a limit of 0 to its default and holds it against its range.
func limit[T int | int64 | uint32 | time.Duration](v *T, def, low, high T, name string) error {
	if *v == 0 {
		*v = def
	}
	if *v < low || *v > high {
		return fmt.Errorf("target: %s %v is not %v to %v", name, *v, low, high)
	}
	return nil
}
