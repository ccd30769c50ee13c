package proxy

import (
	"errors"
	"time"

	"lunshift/target"
)

// Cache says what the destination's cache is, where the device may say it wrongly.
type Cache string

// The caches. The empty one is CacheAuto.
const (
	// CacheAuto: what the device says (WCE of the caching mode page, SBC-3 6.4.5; volatile
	// for files).
	CacheAuto Cache = "auto"
	// CacheVolatile: it is flushed before the flags of first writes and copies are set.
	CacheVolatile Cache = "volatile"
	// CacheNonvolatile: what was written outlives a loss of power, and is not flushed
	// first. Where it is not true, a power loss loses acknowledged writes.
	CacheNonvolatile Cache = "nonvolatile"
)

// Settings are what of a Config may change while the volume is served; each is as there.
type Settings struct {
	CopyDepth     int
	CopyRate      uint64
	Readback      bool
	Mirror        bool
	VerifySample  uint64
	Overwrite     bool
	Seeded        bool
	Initiators    []target.Initiator
	PortalGroups  []uint16
	Identity      Identity
	LogoutTimeout time.Duration
}

func (c *Config) settings() Settings {
	return Settings{
		CopyDepth: c.CopyDepth, CopyRate: c.CopyRate, Readback: c.Readback, Mirror: c.Mirror, VerifySample: c.VerifySample,
		Overwrite: c.Overwrite, Seeded: c.Seeded, Initiators: c.Initiators, PortalGroups: c.PortalGroups,
		Identity: c.Identity, LogoutTimeout: c.LogoutTimeout,
	}
}

// Set takes the settings up at once, without holding a command of an initiator up. It waits for
// no step that is under way, which may have asked before. A rate that was set by Throttle
// stays. A session that is not admitted any more is dropped; the others go on. On an error
// nothing has changed.
func (v *Volume) Set(s Settings) error {
	v.setting.Lock() // so that the last one set is the last one in effect
	defer v.setting.Unlock()
	was := v.set().Identity
	if err := v.setIdentity(s.Identity); err != nil {
		return err
	}
	if v.Phase() != Cutover {
		// By the time a cutover retires the unit this may come late; it is of no use then.
		if err := v.cfg.Target.Admit(v.cfg.IQN, v.cfg.LUN, s.Initiators, s.PortalGroups); err != nil {
			return errors.Join(v.errorf("%w", err), v.setIdentity(was))
		}
	}
	if w := v.ways.Load(); w != nil {
		for _, p := range []*pass{w.forward, w.back} {
			p.copier.SetDepth(s.CopyDepth)
			p.copier.SetReadback(s.Readback)
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settings = s
	if v.record.RateLimit == nil {
		v.throttle.Set(s.CopyRate)
	}
	return nil
}

func (v *Volume) set() Settings {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.settings
}
