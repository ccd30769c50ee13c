package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/target"
)

// slow is a device each of whose reads and writes takes a time of its own more, and whose
// writes are limited in bytes per second.
type slow struct {
	lun.Updater
	delay  *delay
	writes *copier.Throttle
}

func (s *slow) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	if err := s.delay.wait(ctx); err != nil {
		return err
	}
	return s.Updater.ReadAt(ctx, p, start)
}

func (s *slow) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	if err := s.delay.wait(ctx); err != nil {
		return err
	}
	if err := s.writes.Wait(ctx, len(p)); err != nil {
		return err
	}
	return s.Updater.WriteAt(ctx, p, start)
}

// delay is a fixed time that many wait for at once. A thread of its own keeps it: timers of the Go runtime fire up to a
// millisecond late and many together, as no disk answers.
type delay struct {
	span  time.Duration
	queue chan waiter
}

type waiter struct {
	until time.Time
	over  chan struct{}
}

// newDelay starts the thread, which lives as long as the process.
func newDelay(span time.Duration) *delay {
	d := &delay{span, make(chan waiter, 1024)}
	go d.run()
	return d
}

func (d *delay) wait(ctx context.Context) error {
	if d.span == 0 {
		return nil
	}
	w := waiter{time.Now().Add(d.span), make(chan struct{})}
	d.queue <- w
	<-w.over
	return ctx.Err()
}

// run wakes the waiters in the order in which they came, which is that of their times.
func (d *delay) run() {
	runtime.LockOSThread()
	const slack = 1000 // ns that the kernel may be late
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, slack, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "bench: the slow array is a little slower:", err)
	}
	for w := range d.queue {
		for left := time.Until(w.until); left > 0; left = time.Until(w.until) {
			ts := unix.NsecToTimespec(left.Nanoseconds())
			unix.Nanosleep(&ts, nil) // an interrupted sleep goes on
		}
		close(w.over)
	}
}

// runArray is the process of an array of slow devices: one target, a logical unit
// per file from LUN 1 on. It tells its portal on its first line.
func runArray(args []string) error {
	flags := flag.NewFlagSet("array", flag.ContinueOnError)
	span := flags.Duration("delay", time.Millisecond, "of each read and write")
	rate := flags.Uint64("write-rate", 0, "of all writes, in bytes per second; 0 is no limit")
	iqn := flags.String("iqn", "", "target name")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// The sleeping thread keeps one processor of the Go runtime to itself.
	runtime.GOMAXPROCS(runtime.NumCPU() + 1)
	pace, writes := newDelay(*span), copier.NewThrottle(*rate)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	server, err := target.New(target.Config{Portals: []target.Portal{{Address: "127.0.0.1:0"}}})
	if err != nil {
		return err
	}
	for i, path := range flags.Args() {
		dev, err := lun.Open(ctx, path, lun.Options{})
		if err != nil {
			return err
		}
		defer dev.Close()
		unit := target.Unit{IQN: *iqn, LUN: uint64(i + 1), Device: &slow{lun.Serialize(dev), pace, writes}}
		if err := server.AddUnit(unit); err != nil {
			return err
		}
	}
	if err := server.Listen(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, server.Addrs()[0])
	if err := server.Serve(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	if err := server.Close(); err != nil && !errors.Is(err, target.ErrClosed) {
		return err
	}
	return nil
}
