package control

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"lunshift/conf"
	"lunshift/iscsi"
	"lunshift/target"
)

// targetConfig is the target that the configuration asks for.
func targetConfig(service conf.Service, log logrus.FieldLogger) target.Config {
	l := service.Limits
	cfg := target.Config{
		Discovery: authentication(service.Discovery), Log: log,
		MaxRecvDataSegmentLength: uint32(l.MaxRecvDataSegmentLength),
		MaxBurstLength:           uint32(l.MaxBurstLength),
		FirstBurstLength:         uint32(l.FirstBurstLength),
		MaxOutstandingR2T:        l.MaxOutstandingR2T,
		MaxText:                  int(l.TextLength),
		MaxConnections:           l.Connections,
		ConnectionsPerAddress:    l.ConnectionsPerAddress,
		ConnectionsLoggingIn:     l.ConnectionsLoggingIn,
		SessionsPerUnit:          l.SessionsPerVolume,
		LoginTimeout:             l.InitiatorLoginTimeout,
		LoginFailures:            l.LoginFailures,
		CommandsPerSession:       l.CommandsPerSession,
		BytesInFlight:            int64(l.BytesInFlight),
		DataTimeout:              l.DataTimeout,
		NopInterval:              l.NopInterval,
	}
	if l.NopInterval == 0 {
		cfg.NopInterval = -1
	}
	for _, p := range service.Portals {
		cfg.Portals = append(cfg.Portals, target.Portal{Address: p.Address, Group: p.Group})
	}
	return cfg
}

// initiators are whom a volume admits, for the target.
func initiators(v conf.Volume) []target.Initiator {
	var all []target.Initiator
	for _, i := range v.Initiators {
		all = append(all, target.Initiator{Name: i.Name, Networks: i.Networks, Authentication: authentication(i.CHAP)})
	}
	return all
}

func authentication(c conf.CHAP) *target.Authentication {
	if c.Secret == "" {
		return nil
	}
	return &target.Authentication{
		Initiator: iscsi.Credentials{Name: c.User, Secret: c.Secret.Reveal()},
		Target:    iscsi.Credentials{Name: c.TargetUser, Secret: c.TargetSecret.Reveal()},
	}
}

// Proof is what an initiator must prove at its login.
type Proof string

// The proofs.
const (
	NoProof    Proof = "none"
	CHAP       Proof = "chap"
	MutualCHAP Proof = "mutual-chap"
)

// InitiatorReport is one entry of who may come in.
type InitiatorReport struct {
	// Name is an initiator name, or the beginning of names where it ends in "*".
	Name string `json:"name"`
	// Networks are where it may come from; empty is anywhere.
	Networks []string `json:"networks"`
	Proof    Proof    `json:"authentication"`
	// CHAPUser and TargetUser are the CHAP names of both sides; empty where one proves
	// nothing.
	CHAPUser   string `json:"chap_user,omitempty"`
	TargetUser string `json:"target_user,omitempty"`
}

func proof(c conf.CHAP) Proof {
	switch {
	case c.Secret == "":
		return NoProof
	case c.TargetSecret == "":
		return CHAP
	}
	return MutualCHAP
}

// admit fills in who may come in by the configuration, and what to know about it.
func (r *VolumeReport) admit(service conf.Service, v conf.Volume) {
	r.Initiators, r.PortalGroups, r.ReservationBy = []InitiatorReport{}, v.PortalGroups, v.ReservationBy
	r.Redirect = v.Redirect.Address
	r.LoopbackOnly, r.Warnings = len(v.Initiators) == 0, []string{}
	warn := func(format string, args ...any) {
		r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: ", v.Name)+fmt.Sprintf(format, args...))
	}
	for _, i := range v.Initiators {
		entry := InitiatorReport{Name: i.Name, Networks: []string{}, Proof: proof(i.CHAP), CHAPUser: i.CHAP.User, TargetUser: i.CHAP.TargetUser}
		for _, p := range i.Networks {
			entry.Networks = append(entry.Networks, p.String())
		}
		r.Initiators = append(r.Initiators, entry)
		if entry.Proof == NoProof && !loopback(i.Networks) {
			warn("%s needs no authentication: whoever can send from there and takes that name reads and writes the volume; add chap_user and chap_secret_file", entry.who())
		}
	}
	onLoopback := slices.ContainsFunc(service.Portals, func(p conf.Portal) bool {
		at, err := netip.ParseAddrPort(p.Address)
		return err == nil && (at.Addr().IsLoopback() || at.Addr().IsUnspecified()) &&
			(len(v.PortalGroups) == 0 || slices.Contains(v.PortalGroups, p.Group))
	})
	if r.LoopbackOnly && !onLoopback {
		warn("nobody can come in: without a [[volume.initiator]] only this host's loopback may, and none of the volume's portals is there")
	}
}

// compareAccess warns where the running service lets other initiators in than the file, asks
// them for other proofs or sends them elsewhere. Secrets are not compared: nothing tells them.
func (r *VolumeReport) compareAccess(running VolumeReport) {
	if !r.Served {
		return
	}
	same := running.LoopbackOnly == r.LoopbackOnly && running.ReservationBy == r.ReservationBy &&
		running.Redirect == r.Redirect &&
		slices.Equal(running.PortalGroups, r.PortalGroups) &&
		slices.EqualFunc(running.Initiators, r.Initiators, func(a, b InitiatorReport) bool {
			return a.Name == b.Name && a.Proof == b.Proof && a.CHAPUser == b.CHAPUser && a.TargetUser == b.TargetUser && slices.Equal(a.Networks, b.Networks)
		})
	if !same {
		r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: the running service lets others in than the file says: lunshift reload lets the file count, but for reservation_by, which needs a restart", r.Name))
	}
}

// who is the entry in words.
func (i InitiatorReport) who() string {
	from := "anywhere"
	if len(i.Networks) > 0 {
		from = strings.Join(i.Networks, ", ")
	}
	name := i.Name
	if name == "*" {
		name = "any initiator"
	}
	return name + " from " + from
}

// loopback tells whether all of the networks are this host's own.
func loopback(networks []netip.Prefix) bool {
	inside := func(p netip.Prefix) bool {
		return slices.ContainsFunc(conf.Loopback(), func(own netip.Prefix) bool {
			return own.Bits() <= p.Bits() && own.Contains(p.Addr())
		})
	}
	return len(networks) > 0 && !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return !inside(p) })
}
