// Package demo does lunshift's main job in one process: it makes an old and a new
// logical unit with known content, serves both as iSCSI targets, runs a volume
// between them, keeps a verified read and write load on its front, migrates, cuts
// over, and checks every block of the new unit against what the load was told was
// written. Everything between is the real thing: iSCSI over TCP, Badger, files.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

const (
	portal       = "127.0.0.1:0"
	oldIQN       = "iqn.2026-11.net.example:old"
	newIQN       = "iqn.2026-11.net.example:new"
	frontIQN     = "iqn.2026-11.net.example:demo"
	volumeName   = "demo"
	blockSize    = 512
	allocatedPct = 40
	chunk        = 1 << 20 // bytes; the old unit is allocated in runs of a few of these
)

// Options says how large the demonstration is. The zero value of a field is its
// default.
type Options struct {
	// Size of the two units in bytes; default 1 GiB.
	Size uint64
	// Workers is how many commands the load keeps in flight; default 8.
	Workers int
	// Lead is how long the load runs before the start, and again after the copy;
	// default 3 s.
	Lead time.Duration
	// Rate limits the copy in bytes per second, so that there is something to see;
	// default 128 MiB.
	Rate uint64
	// Units and State are the folders of the two units and of the state; default
	// temporary ones, removed at the end: the units in memory where there is room,
	// as an array answers from its cache, the state on disk.
	Units, State string
	// Out takes the story and the table; nil is silence. Progress takes the bar, a
	// terminal as a rule.
	Out, Progress io.Writer
	Log           logrus.FieldLogger
}

// Report is what happened.
type Report struct {
	Size      uint64 `json:"size_bytes"`
	Allocated uint64 `json:"allocated_bytes"`
	Copied    uint64 `json:"copied_bytes"`
	Skipped   uint64 `json:"skipped_bytes"`
	Written   uint64 `json:"load_written_bytes"`
	// CopySeconds is from start to synced.
	CopySeconds float64  `json:"copy_seconds"`
	Before      LoadRate `json:"before"`
	During      LoadRate `json:"during"`
	After       LoadRate `json:"after"`
	// HoldMilliseconds is how long the volume held commands at the cutover,
	// GapMilliseconds the time from the cutover to the load's first answer from the
	// new unit.
	HoldMilliseconds float64 `json:"cutover_hold_ms"`
	GapMilliseconds  float64 `json:"cutover_gap_ms"`
	BlocksChecked    uint64  `json:"blocks_checked"`
	NewAllocated     uint64  `json:"new_allocated_bytes"`
}

// unit is a logical unit that the demonstration serves over iSCSI.
type unit struct {
	file   lun.Device
	server *target.Server
	url    string
}

// Run does it all. It returns an error if any block was wrong, or any step failed.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	o = o.withDefaults()
	for _, f := range []struct {
		path *string
		in   string
	}{{&o.Units, memory(2 * o.Size)}, {&o.State, os.TempDir()}} {
		if *f.path != "" {
			continue
		}
		folder, err := newFolder(f.in)
		if err != nil {
			return nil, err
		}
		defer folder.remove()
		*f.path = folder.content()
	}
	say := func(format string, args ...any) { fmt.Fprintf(o.Out, format+"\n", args...) }

	say("Making an old LUN (%s, about %d %% allocated) and a blank new one in %s.", size(o.Size), allocatedPct, o.Units)
	oldUnit, err := serveFile(ctx, o, "old", oldIQN)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, oldUnit.close()) }()
	newUnit, err := serveFile(ctx, o, "new", newIQN)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, newUnit.close()) }()
	oracle := newOracle(o.Size)
	if err := oracle.fill(ctx, oldUnit.file); err != nil {
		return nil, fmt.Errorf("fill the old LUN: %w", err)
	}

	store, err := state.Open(o.State, state.Options{Log: o.Log})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	front, err := listen(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, front.Close()) }()
	source, err := lun.Open(ctx, oldUnit.url, lun.Options{Log: o.Log})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	destination, err := lun.Open(ctx, newUnit.url, lun.Options{Log: o.Log})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, destination.Close()) }()
	volume, err := proxy.Open(ctx, proxy.Config{
		Name: volumeName, IQN: frontIQN, Source: source, Destination: destination,
		SourceAddress: oldUnit.url, DestinationAddress: newUnit.url,
		RegionSize: 1 << 20, CopyDepth: 8, CopyRate: o.Rate, Store: store, Target: front, Log: o.Log,
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, volume.Shutdown(context.WithoutCancel(ctx))) }()

	frontURL := url(front, frontIQN)
	say("The volume answers at %s; a load of %d commands in flight writes and checks there.", frontURL, o.Workers)
	at, err := lun.Open(ctx, frontURL, lun.Options{Log: o.Log})
	if err != nil {
		return nil, err
	}
	return migrate(ctx, o, volume, newUnit, newLoad(oracle, at, o.Workers), say)
}

// migrate runs the load through the phases and checks the outcome.
func migrate(ctx context.Context, o Options, volume *proxy.Volume, newUnit *unit, load *load, say func(string, ...any)) (_ *Report, err error) {
	r := &Report{Size: o.Size}
	load.start(ctx)
	defer func() { err = errors.Join(err, load.stop()) }()

	if err := load.run(ctx, o.Lead); err != nil {
		return nil, err
	}
	r.Before = load.rate()
	say("Starting the migration.")
	began := time.Now()
	if err := volume.Start(ctx); err != nil {
		return nil, err
	}
	if err := watch(ctx, o, volume, load); err != nil {
		return nil, err
	}
	r.CopySeconds = time.Since(began).Seconds()
	r.During = load.rate()
	if err := load.run(ctx, o.Lead); err != nil {
		return nil, err
	}
	r.After = load.rate()

	say("Every block is valid on the new LUN: cutting over, and pointing the load at the new LUN.")
	load.moving.Store(true)
	began = time.Now()
	if err := volume.Cutover(ctx, proxy.CutoverOptions{}); err != nil {
		return nil, err
	}
	at, err := lun.Open(ctx, newUnit.url, lun.Options{Log: o.Log})
	if err != nil {
		return nil, err
	}
	first, err := load.retarget(ctx, at)
	if err != nil {
		return nil, err
	}
	r.GapMilliseconds = float64(first.Sub(began).Microseconds()) / 1000
	if err := load.run(ctx, o.Lead/3); err != nil {
		return nil, err
	}
	if err := load.stop(); err != nil {
		return nil, err
	}
	s := volume.Status()
	r.Allocated, r.Copied, r.Skipped, r.Written = s.Allocated, s.Copied, s.Skipped, load.written.Load()
	if s.Hold != nil {
		r.HoldMilliseconds = *s.Hold
	}
	say("Checking every block of the new LUN.")
	if r.BlocksChecked, err = load.oracle.check(ctx, newUnit.file); err != nil {
		return nil, err
	}
	if r.NewAllocated, err = allocated(ctx, newUnit.file); err != nil {
		return nil, err
	}
	r.print(o.Out)
	return r, nil
}

// watch shows the copy's progress until the volume is synced.
func watch(ctx context.Context, o Options, volume *proxy.Volume, load *load) error {
	bar := progressbar.NewOptions64(int64(o.Size),
		progressbar.OptionSetWriter(o.Progress), progressbar.OptionShowBytes(true),
		progressbar.OptionSetDescription("copying"), progressbar.OptionSetWidth(30),
		progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionOnCompletion(func() { fmt.Fprintln(o.Progress) }))
	done := make(chan error, 1)
	go func() { done <- volume.Wait(ctx, proxy.Synced) }()
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			return bar.Finish()
		case err := <-load.failed:
			return err
		case <-t.C:
			if err := bar.Set64(int64(o.Size - volume.Status().Remaining)); err != nil {
				return err
			}
		}
	}
}

func (o Options) withDefaults() Options {
	if o.Size == 0 {
		o.Size = 1 << 30
	}
	if o.Workers == 0 {
		o.Workers = 8
	}
	if o.Lead == 0 {
		o.Lead = 3 * time.Second
	}
	if o.Rate == 0 {
		o.Rate = 128 << 20
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Log == nil {
		l := logrus.New()
		l.SetOutput(io.Discard)
		o.Log = l
	}
	return o
}

// serveFile makes a sparse file and serves it as LUN 0 of iqn.
func serveFile(ctx context.Context, o Options, name, iqn string) (*unit, error) {
	path := filepath.Join(o.Units, name+".img")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(int64(o.Size)), f.Close()); err != nil {
		return nil, err
	}
	file, err := lun.Open(ctx, path, lun.Options{BlockSize: blockSize, Log: o.Log})
	if err != nil {
		return nil, err
	}
	server, err := listen(o)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	u := &unit{file, server, url(server, iqn)}
	err = server.AddUnit(target.Unit{
		IQN: iqn, Device: lun.Serialize(file),
		Vendor: "DEMO", Product: name, Revision: "1", Serial: name, NAA: 0x3<<60 | rand.Uint64()>>4,
	})
	if err != nil {
		return nil, errors.Join(err, u.close())
	}
	return u, nil
}

func (u *unit) close() error { return errors.Join(u.server.Close(), u.file.Close()) }

// listen makes a target on a free port of the loopback address, and serves.
func listen(o Options) (*target.Server, error) {
	s, err := target.New(target.Config{Portals: []target.Portal{{Address: portal}}, Log: o.Log})
	if err != nil {
		return nil, err
	}
	if err := s.Listen(); err != nil {
		return nil, err
	}
	go func() {
		if err := s.Serve(context.Background()); err != nil && !errors.Is(err, target.ErrClosed) {
			o.Log.Errorf("demo: serve: %v", err)
		}
	}()
	return s, nil
}

func url(s *target.Server, iqn string) string {
	return fmt.Sprintf("iscsi://%s/%s/0", s.Addrs()[0], iqn)
}

func allocated(ctx context.Context, dev lun.Device) (bytes uint64, err error) {
	for rest := dev.Info().All(); !rest.Empty(); {
		list, err := dev.Extents(ctx, rest)
		if err != nil {
			return 0, err
		}
		for _, a := range list {
			if a.Allocated {
				bytes += dev.Info().Bytes(a.Extent)
			}
			rest = lun.Extent{Start: a.End(), Blocks: uint64(rest.End() - a.End())}
		}
	}
	return bytes, nil
}
