package lun

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sirupsen/logrus"
)

// Options says how a Device is opened. The zero value of a field is its default.
type Options struct {
	// ReadOnly opens a file or block device for reading alone and lets several
	// processes share it. On every device it makes WriteAt, Unmap and
	// WriteZeroes fail with sense DATA PROTECT, WRITE PROTECTED.
	ReadOnly bool
	// BlockSize is the logical block length of a file, 512 (default) to 65536, a
	// power of two. Others have their own.
	BlockSize uint32
	// Log takes what happens while no caller waits: reconnects, unit attentions.
	Log logrus.FieldLogger

	// The rest is for iSCSI.

	// InitiatorName is the iSCSI name this end logs in with; default
	// iqn.2026-11.dev.lunshift:<host name>.
	InitiatorName string
	// Secret is the CHAP secret that goes with Address.User.
	Secret string
	// TargetUser and TargetSecret are what the target must prove in turn (mutual
	// CHAP); empty asks for no proof. TargetUser may be left empty with
	// TargetSecret set: any name will do then.
	TargetUser, TargetSecret string
	// SessionKey makes the sessions recognisable: a later process that opens the same
	// logical unit with the same key and initiator name takes their place, and the
	// target ends the tasks that the earlier one left behind before it lets the
	// later one in (session reinstatement, RFC 7143 6.3.5). Two that are open at
	// the same time must not share a key: each would end the other's sessions.
	// Empty makes sessions that nothing else replaces.
	SessionKey string
	// Sessions is how many sessions share the load, 1 (default) to 16.
	Sessions int
	// QueueDepth is how many commands a session keeps in flight at most, 1 to 1024,
	// default 128; the target's command window may allow fewer.
	QueueDepth int
	// IOTimeout is how long a command waits for an answer or for the return of
	// the target, reconnects included, before ErrUnavailable; default 30 s.
	IOTimeout time.Duration
	// LoginTimeout bounds one attempt to connect and log in; default 10 s.
	LoginTimeout time.Duration
	// PingInterval is the idle time after which a NOP-Out asks whether the target
	// is there; a session without any answer for two intervals is dropped. Default 5 s.
	PingInterval time.Duration
	// HeaderDigest and DataDigest ask for CRC32C (RFC 7143 13.1); a target that does not
	// agree is not logged in to.
	HeaderDigest, DataDigest bool
}

func (o Options) withDefaults() Options {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	if o.Log == nil {
		l := logrus.New()
		l.SetOutput(io.Discard)
		o.Log = l
	}
	if o.InitiatorName == "" {
		o.InitiatorName = defaultInitiatorName()
	}
	o.Sessions = min(max(o.Sessions, 1), 16)
	if o.QueueDepth == 0 {
		o.QueueDepth = 128
	}
	o.QueueDepth = min(max(o.QueueDepth, 1), 1024)
	if o.IOTimeout <= 0 {
		o.IOTimeout = 30 * time.Second
	}
	if o.LoginTimeout <= 0 {
		o.LoginTimeout = 10 * time.Second
	}
	if o.PingInterval <= 0 {
		o.PingInterval = 5 * time.Second
	}
	return o
}

func defaultInitiatorName() string {
	host, _ := os.Hostname()
	name := []byte("iqn.2026-11.dev.lunshift:")
	for _, c := range []byte(host) {
		switch {
		case 'A' <= c && c <= 'Z':
			name = append(name, c+'a'-'A')
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '.':
			name = append(name, c)
		}
	}
	return string(name[:min(len(name), 223)])
}

// Open opens the device at address: iscsi://[user@]host[:port]/target-name/lun,
// or the path of a regular file or block device. The device stays usable after
// ctx ends; ctx bounds the opening alone.
func Open(ctx context.Context, address string, opts Options) (Device, error) {
	a, err := ParseAddress(address)
	if err != nil {
		return nil, err
	}
	opts = opts.withDefaults()
	if a.ISCSI() {
		return openISCSI(ctx, a, opts)
	}
	st, err := os.Stat(a.Path)
	if err != nil {
		return nil, fmt.Errorf("open %w", unwrapPath(err, a.Path))
	}
	switch mode := st.Mode(); {
	case mode.IsRegular():
		return openFile(a.Path, opts)
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		return openBlock(a.Path, opts)
	default:
		return nil, fmt.Errorf("open %s: neither a regular file nor a block device", a.Path)
	}
}
