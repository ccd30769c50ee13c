package conf

import (
	"fmt"
	"time"
)

// Limits is the [service.limits] table: what initiators may take. Past a limit an
// initiator gets the protocol's own refusal, and nobody else is disturbed.
type Limits struct {
	// Connections is how many connections that have logged in to targets are held at a
	// time, 1 to 65535; each is one session.
	Connections int
	// ConnectionsPerAddress is how many of them one IP address may have, and how many may
	// be logging in from it, 1 to 1048576. Here and below an IPv6 network of 64 bits counts
	// as one address.
	ConnectionsPerAddress int
	// ConnectionsLoggingIn is how many connections may be logging in at a time, 1 to
	// 1048576, discovery sessions among them; they come on top of Connections.
	ConnectionsLoggingIn int
	// SessionsPerVolume is how many sessions may see one volume, 1 to 1048576.
	SessionsPerVolume int
	// CommandsPerSession is the command window of a session, 1 to 4096 (RFC 7143
	// 4.2.2.1).
	CommandsPerSession int
	// BytesInFlight bounds the data of all commands together, 64 MiB to 1 PiB.
	BytesInFlight Size
	// InitiatorLoginTimeout is how long an initiator may take to log in, and after that how
	// long a discovery session may last, 1 s to 1 h.
	InitiatorLoginTimeout time.Duration
	// LoginFailures is how many logins of one IP address may fail within a minute
	// before further ones are refused unheard, 1 to 1048576.
	LoginFailures int
	// DataTimeout is how long an initiator may take to send the next part of a
	// command's data, 1 s to 24 h.
	DataTimeout time.Duration
	// NopInterval is how long a session may be silent at most before it is pinged, 1 s to
	// 1 h; 0 never pings. It is dropped where half of it brings no answer.
	NopInterval time.Duration
	// MaxRecvDataSegmentLength, MaxBurstLength and FirstBurstLength are in bytes, 512
	// to 16777215 (RFC 7143 13.12 to 13.14); FirstBurstLength is at most
	// MaxBurstLength.
	MaxRecvDataSegmentLength, MaxBurstLength, FirstBurstLength Size
	// MaxOutstandingR2T is how many R2Ts of one command may be open, 1 to 64 (RFC 7143
	// 13.17).
	MaxOutstandingR2T uint32
	// TextLength is the longest text of a login or a text request, 8 KiB to 1 MiB.
	TextLength Size
	// FlagMemory bounds the bitmaps of partly written regions that are held in memory,
	// of all volumes together, 1 MiB to 1 TiB. The rest is read from the state
	// directory when it is asked for.
	FlagMemory Size
}

// maxSegment is the greatest length that keys of RFC 7143 13.12 to 13.14 take, in
// bytes.
const maxSegment = 1<<24 - 1

func defaultLimits() Limits {
	return Limits{
		Connections:              1024,
		ConnectionsPerAddress:    256,
		ConnectionsLoggingIn:     256,
		SessionsPerVolume:        256,
		CommandsPerSession:       128,
		BytesInFlight:            256 << 20,
		InitiatorLoginTimeout:    15 * time.Second,
		LoginFailures:            20,
		DataTimeout:              2 * time.Minute,
		NopInterval:              15 * time.Second,
		MaxRecvDataSegmentLength: 256 << 10,
		MaxBurstLength:           1 << 20,
		FirstBurstLength:         256 << 10,
		MaxOutstandingR2T:        8,
		TextLength:               64 << 10,
		FlagMemory:               64 << 20,
	}
}

func limitSettings(l *Limits) []setting {
	const many = 1 << 20
	return []setting{
		{"connections", integer(&l.Connections, 1, 1<<16-1)}, // as many as TSIHs tell apart
		{"connections_per_address", integer(&l.ConnectionsPerAddress, 1, many)},
		{"connections_logging_in", integer(&l.ConnectionsLoggingIn, 1, many)},
		{"sessions_per_volume", integer(&l.SessionsPerVolume, 1, many)},
		{"commands_per_session", integer(&l.CommandsPerSession, 1, 4096)},
		{"bytes_in_flight", sizeWithin(&l.BytesInFlight, 64<<20, 1<<50)},
		{"initiator_login_timeout", duration(&l.InitiatorLoginTimeout, time.Second, time.Hour)},
		{"login_failures", integer(&l.LoginFailures, 1, many)},
		{"data_timeout", duration(&l.DataTimeout, time.Second, 24*time.Hour)},
		{"nop_interval", func(v any) error {
			if v == "0" || v == "0s" {
				l.NopInterval = 0
				return nil
			}
			if err := duration(&l.NopInterval, time.Second, time.Hour)(v); err != nil {
				return fmt.Errorf("%w, or \"0s\" for no pings", err)
			}
			return nil
		}},
		{"max_recv_data_segment_length", segment(&l.MaxRecvDataSegmentLength)},
		{"max_burst_length", segment(&l.MaxBurstLength)},
		{"first_burst_length", segment(&l.FirstBurstLength)},
		{"max_outstanding_r2t", integer(&l.MaxOutstandingR2T, 1, 64)},
		{"text_length", sizeWithin(&l.TextLength, 8<<10, 1<<20)},
		{"flag_memory", sizeWithin(&l.FlagMemory, 1<<20, 1<<40)},
	}
}

// limits reads [service.limits]. m is what the file has of it.
func (d *decoder) limits(l *Limits, m map[string]any) {
	const path = "service.limits"
	faulty := d.table(m, path, path, limitSettings(l))
	if l.FirstBurstLength <= l.MaxBurstLength || faulty["first_burst_length"] || faulty["max_burst_length"] {
		return
	}
	if _, given := m["first_burst_length"]; given {
		d.fault(path+".first_burst_length", path+".first_burst_length",
			fmt.Sprintf("is more than max_burst_length (%s); it is at most that (RFC 7143 13.14)", l.MaxBurstLength))
	}
	l.FirstBurstLength = l.MaxBurstLength // the default of one follows the other
}

// segment takes a length of RFC 7143 13.12 to 13.14, which must fit 24 bits: 16MiB is
// one byte less.
func segment(to *Size) func(any) error {
	take := sizeWithin(to, 512, maxSegment+1)
	return func(v any) error {
		if err := take(v); err != nil {
			return err
		}
		*to = min(*to, maxSegment)
		return nil
	}
}

func sizeWithin(to *Size, low, high Size) func(any) error {
	return func(v any) error {
		var s Size
		if err := size(&s)(v); err != nil {
			return err
		}
		if s < low || s > high {
			return fmt.Errorf("is %s; it is from %s to %s", s, low, high)
		}
		*to = s
		return nil
	}
}
