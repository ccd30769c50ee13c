package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"lunshift/lun"
	"lunshift/target"
)

// slow is a device each of whose reads and writes takes a time of its own more.
type slow struct {
	lun.Updater
	delay time.Duration
}

func (s *slow) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	return s.Updater.ReadAt(ctx, p, start)
}

func (s *slow) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	return s.Updater.WriteAt(ctx, p, start)
}

func (s *slow) pause(ctx context.Context) error {
	t := time.NewTimer(s.delay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// runArray is the process of an array of slow devices: one target, a logical unit
// per file from LUN 1 on. It tells its portal on its first line.
func runArray(args []string) error {
	flags := flag.NewFlagSet("array", flag.ContinueOnError)
	delay := flags.Duration("delay", time.Millisecond, "of each read and write")
	iqn := flags.String("iqn", "", "target name")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	server, err := target.New(target.Config{Portals: []string{"127.0.0.1:0"}})
	if err != nil {
		return err
	}
	for i, path := range flags.Args() {
		dev, err := lun.Open(ctx, path, lun.Options{})
		if err != nil {
			return err
		}
		defer dev.Close()
		unit := target.Unit{IQN: *iqn, LUN: uint64(i + 1), Device: &slow{lun.Serialize(dev), *delay}}
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
