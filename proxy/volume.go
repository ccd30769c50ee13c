// Package proxy is the volume: one source and one destination logical unit, and
// the virtual logical unit in front of them.
package proxy

import (
	"context"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/state"
	"lunshift/target"
)

// Config is what a Volume is made of.
type Config struct {
	Name string
	// IQN and LUN are where initiators find the volume.
	IQN string
	LUN uint64
	// Source and Destination are open; the Volume does not close them.
	Source, Destination lun.Device
	// SourceAddress and DestinationAddress are shown to people; no secrets.
	SourceAddress, DestinationAddress string
	// RegionSize is the unit of copying in bytes, a power of two from 64 KiB to 64 MiB.
	RegionSize uint64
	// CopyDepth is how many regions are copied at once, 1 to 256.
	CopyDepth int
	// CopyRate limits the copy in bytes per second; 0 is no limit. A rate set by
	// Throttle is kept in the state and wins over it.
	CopyRate uint64
	// Overwrite allows a destination that is not blank.
	Overwrite bool
	// Autostart starts the migration when the Volume is opened in phase ready.
	Autostart bool

	Store  *state.Store
	Target *target.Server
	Log    logrus.FieldLogger
}

// Volume is one migration. All methods may be called concurrently.
type Volume struct{}

// Check gives every reason for which a migration from source to destination would be
// refused, each one line; none means that Start would go ahead. It reads both
// devices and writes nothing.
func Check(ctx context.Context, source, destination lun.Device, overwrite bool) []error

// Open takes up a volume from its state, or begins a new one in phase ready. It
// puts the volume on the target and, where the state says migrating, goes on
// copying.
func Open(ctx context.Context, cfg Config) (*Volume, error)

// Name is the volume's name.
func (v *Volume) Name() string

// Status is a snapshot.
func (v *Volume) Status() Status

// Start begins the migration: ready → migrating. In a later phase but cutover it
// does nothing.
func (v *Volume) Start(ctx context.Context) error

// Pause stops the copier, never the initiators. Kept over restarts.
func (v *Volume) Pause(ctx context.Context) error

// Resume undoes Pause.
func (v *Volume) Resume(ctx context.Context) error

// Throttle limits the copy to rate bytes per second, 0 for no limit. Kept over restarts.
func (v *Volume) Throttle(ctx context.Context, rate uint64) error

// Cutover ends the migration: synced → cutover. From its return on no initiator I/O
// goes through the volume. Done already, it does nothing.
func (v *Volume) Cutover(ctx context.Context) error

// Wait returns when the volume is in phase p or past it.
func (v *Volume) Wait(ctx context.Context, p Phase) error

// Remove forgets the state of a volume in phase cutover and takes it off the target.
func (v *Volume) Remove(ctx context.Context) error

// Close takes the volume off the target, stops the copier and lets commands in
// flight finish. The state stays.
func (v *Volume) Close(ctx context.Context) error
