package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"lunshift/lun"
)

const (
	// grain is the size in bytes of the load's commands, and of what the oracle
	// knows a version of.
	grain       = 4096
	grainBlocks = grain / blockSize
)

// oracle knows what each grain of the unit must hold: the version that was last
// acknowledged. Version 0 is zeroes.
type oracle struct {
	versions []uint32 // each changed by the one worker that owns the grain
}

func newOracle(size uint64) *oracle {
	return &oracle{make([]uint32, size/grain)}
}

// content fills p, a grain, with what version of the grain at index i is.
func content(p []byte, i int, version uint32) {
	if version == 0 {
		clear(p)
		return
	}
	// A splitmix64 stream seeded by place and version: no two grains are alike.
	x := uint64(i)<<32 | uint64(version)
	for at := 0; at < len(p); at += 8 {
		x += 0x9e3779b97f4a7c15
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(p[at:], z^z>>31)
	}
}

// fill writes version 1 to about allocatedPct percent of dev, in runs of one to four
// chunks.
func (o *oracle) fill(ctx context.Context, dev lun.Device) error {
	p := make([]byte, chunk)
	per := chunk / grain
	for c := 0; c < len(o.versions)/per; {
		run := 1 + rand.IntN(4)
		use := rand.IntN(100) < allocatedPct
		for ; run > 0 && c < len(o.versions)/per; run, c = run-1, c+1 {
			if !use {
				continue
			}
			for i := range per {
				o.versions[c*per+i] = 1
				content(p[i*grain:(i+1)*grain], c*per+i, 1)
			}
			if err := dev.WriteAt(ctx, p, lun.LBA(c*chunk/blockSize)); err != nil {
				return err
			}
		}
	}
	return nil
}

// check reads all of dev and compares every block.
func (o *oracle) check(ctx context.Context, dev lun.Device) (blocks uint64, err error) {
	p, want := make([]byte, chunk), make([]byte, grain)
	for first := 0; first < len(o.versions); first += chunk / grain {
		n := min(chunk/grain, len(o.versions)-first)
		if err := dev.ReadAt(ctx, p[:n*grain], lun.LBA(first*grainBlocks)); err != nil {
			return blocks, fmt.Errorf("check the new LUN: %w", err)
		}
		for i := range n {
			content(want, first+i, o.versions[first+i])
			if got := p[i*grain : (i+1)*grain]; !bytes.Equal(got, want) {
				return blocks, fmt.Errorf("the new LUN is wrong at LBA %d: it does not hold version %d, which was acknowledged",
					(first+i)*grainBlocks, o.versions[first+i])
			}
			blocks += grainBlocks
		}
	}
	return blocks, nil
}

// LoadRate is what the load saw over a time.
type LoadRate struct {
	IOPS            float64 `json:"iops"`
	P99Milliseconds float64 `json:"p99_ms"`
}

// load keeps reads and writes on a unit and checks what each read returns. A command
// that fails while the load is being pointed elsewhere is sent again there.
type load struct {
	oracle  *oracle
	workers int
	written atomic.Uint64
	failed  chan error  // the first failure
	moving  atomic.Bool // failures are expected until the load is pointed elsewhere

	mu      sync.Mutex // protects the fields below
	device  lun.Device
	moved   chan struct{} // closed when device is replaced
	answers *hdrhistogram.Histogram
	since   time.Time
	first   chan time.Time // takes the first answer after a retarget; nil else

	quit chan struct{} // closed by stop
	wg   sync.WaitGroup
	once sync.Once
	err  error // of stop
}

func newLoad(o *oracle, dev lun.Device, workers int) *load {
	return &load{
		oracle: o, workers: workers, failed: make(chan error, 1),
		device: dev, moved: make(chan struct{}), quit: make(chan struct{}), answers: newHistogram(), since: time.Now(),
	}
}

// newHistogram takes microseconds up to a minute.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, 60_000_000, 3) }

func (l *load) start(ctx context.Context) {
	for w := range l.workers {
		l.wg.Go(func() {
			if err := l.work(ctx, w); err != nil && ctx.Err() == nil {
				select {
				case l.failed <- err:
				default:
				}
			}
		})
	}
}

// stop ends the load and gives the device up. Commands under way end first: of a write
// that was cut short nobody could say what the unit holds.
func (l *load) stop() error {
	l.once.Do(func() {
		close(l.quit)
		l.wg.Wait()
		l.err = l.device.Close()
		select {
		case err := <-l.failed:
			l.err = errors.Join(err, l.err)
		default:
		}
	})
	return l.err
}

// run lets the load go on for d.
func (l *load) run(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case err := <-l.failed:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rate is what the load saw since it was asked before.
func (l *load) rate() LoadRate {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := LoadRate{
		IOPS:            float64(l.answers.TotalCount()) / time.Since(l.since).Seconds(),
		P99Milliseconds: float64(l.answers.ValueAtQuantile(99)) / 1000,
	}
	l.answers, l.since = newHistogram(), time.Now()
	return r
}

// retarget points the load at dev, as an initiator is at cutover, and waits for the
// first answer from there.
func (l *load) retarget(ctx context.Context, dev lun.Device) (time.Time, error) {
	first := make(chan time.Time, 1)
	l.mu.Lock()
	old := l.device
	l.device, l.first = dev, first
	close(l.moved)
	l.moved = make(chan struct{})
	l.mu.Unlock()
	l.moving.Store(false)
	if err := old.Close(); err != nil {
		return time.Time{}, err
	}
	select {
	case at := <-first:
		return at, nil
	case err := <-l.failed:
		return time.Time{}, err
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

// work writes and reads grains that no other worker touches. As only one command at
// a time is under way on a grain, what must be read is known exactly.
func (l *load) work(ctx context.Context, worker int) error {
	p, want := make([]byte, grain), make([]byte, grain)
	version := uint32(1)
	for !l.quitting() && ctx.Err() == nil {
		i := l.pick(worker)
		at := lun.LBA(i * grainBlocks)
		if rand.IntN(3) == 0 {
			version++
			content(p, i, version)
			if err := l.do(ctx, func(d lun.Device) error { return d.WriteAt(ctx, p, at) }); err != nil {
				return err
			}
			l.oracle.versions[i] = version
			l.written.Add(grain)
			continue
		}
		if err := l.do(ctx, func(d lun.Device) error { return d.ReadAt(ctx, p, at) }); err != nil {
			return err
		}
		if content(want, i, l.oracle.versions[i]); !bytes.Equal(p, want) {
			return fmt.Errorf("a read of LBA %d did not return version %d, which was acknowledged", at, l.oracle.versions[i])
		}
	}
	return nil
}

func (l *load) quitting() bool {
	select {
	case <-l.quit:
		return true
	default:
		return false
	}
}

// pick is a grain of the worker's own, in the part of the unit that the load works on:
// one chunk in eight, all over the unit.
func (l *load) pick(worker int) int {
	const per = chunk / grain
	n := len(l.oracle.versions) / (8 * per)
	i := rand.IntN(max(n, 1))*8*per + rand.IntN(per/l.workers)*l.workers + worker
	return min(i, len(l.oracle.versions)-l.workers+worker)
}

// do sends a command, and sends it again when the load was pointed elsewhere
// meanwhile.
func (l *load) do(ctx context.Context, command func(lun.Device) error) error {
	for {
		l.mu.Lock()
		dev, moved := l.device, l.moved
		l.mu.Unlock()
		began := time.Now()
		err := command(dev)
		if err == nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.first != nil && dev == l.device {
				l.first <- time.Now()
				l.first = nil
			}
			return l.answers.RecordValue(max(1, time.Since(began).Microseconds()))
		}
		if !l.moving.Load() {
			select {
			case <-moved: // while the command was under way
				continue
			default:
				return err
			}
		}
		select {
		case <-moved:
		case <-l.quit: // nothing will be moved any more
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
