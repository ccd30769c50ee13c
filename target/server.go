package target

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
)

// Config is what a Server is made of.
type Config struct {
	// Portals are the TCP addresses to listen on, host:port.
	Portals []string
	Log     logrus.FieldLogger
	// MaxRecvDataSegmentLength is the longest data segment the target accepts, in
	// bytes, 512 to 16 MiB; 0 is 256 KiB (RFC 7143 13.12).
	MaxRecvDataSegmentLength uint32
	// MaxBurstLength and FirstBurstLength are in bytes (RFC 7143 13.13, 13.14);
	// 0 is 1 MiB and 256 KiB.
	MaxBurstLength, FirstBurstLength uint32
	// MaxConnections is how many connections the server holds at a time, each one
	// a session; 0 is 1024.
	MaxConnections int
	// LoginTimeout is how long a connection may take to log in; 0 is 15 s.
	LoginTimeout time.Duration
	// CommandsPerSession is the command window of a session; 0 is 128.
	CommandsPerSession int
	// NopInterval is how long a session may be silent before it is pinged, and
	// then how long it may take to answer; 0 is 15 s, negative never pings.
	NopInterval time.Duration
	// BytesInFlight bounds the data of all commands larger than 64 KiB together,
	// in bytes; 0 is 256 MiB.
	BytesInFlight int64
}

// Unit is one logical unit and its place.
type Unit struct {
	IQN    string
	LUN    uint64
	Device lun.Updater
	// Vendor, Product, Revision are the INQUIRY identification, at most 8, 16
	// and 4 characters; Serial is VPD page 80h.
	Vendor, Product, Revision, Serial string
	// NAA is the NAA designator of VPD page 83h; 0 leaves it out.
	NAA uint64
	// Alias is the TargetAlias; may be empty.
	Alias string
}

// SessionInfo is one session as people see it.
type SessionInfo struct {
	Initiator string    `json:"initiator"`
	Address   string    `json:"address"`
	Since     time.Time `json:"since"`
}

// Server accepts initiators.
type Server struct{ cfg Config }

var errNotYet = errors.New("target: server not built")

func New(cfg Config) (*Server, error)                                      { return nil, errNotYet }
func (s *Server) Listen() error                                            { return errNotYet }
func (s *Server) Addrs() []net.Addr                                        { return nil }
func (s *Server) Serve(ctx context.Context) error                          { return errNotYet }
func (s *Server) Shutdown(ctx context.Context) error                       { return errNotYet }
func (s *Server) Close() error                                             { return nil }
func (s *Server) AddUnit(u Unit) error                                     { return errNotYet }
func (s *Server) RemoveUnit(iqn string, lun uint64) error                  { return errNotYet }
func (s *Server) Retire(ctx context.Context, iqn string, lun uint64) error { return errNotYet }
func (s *Server) Sessions(iqn string) []SessionInfo                        { return nil }
