package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"lunshift/tests/peer"
)

const (
	// sparseSize is of LUNs that are so large that hardly a block is written twice.
	sparseSize = 64 << 30
	// rewritten is the part of them that is written again and again.
	rewritten = 16 * mib
)

// firstWrites is what the first write to a block costs over a later one.
func (b *bench) firstWrites() error {
	t := b.newTable("First writes of 4 KiB, at random, in phase migrating, against rewrites of the same volume. LUNs are in memory, the state on a disk.\n"+
		"Aims: at depth 32 at least 0.60 × the IOPS of rewrites; at depth 1 a p50 that is higher by at most 1.50 × one fdatasync of the state's disk.",
		"destination", "depth", "p50 µs first", "again", "more", "fdatasync", "× fdatasync", "", "IOPS first", "again", "× again", "", "µs CPU/IO first", "again")
	defer t.end()
	for _, kind := range []struct {
		name string
		file bool
		more []string
	}{
		{"tgtd, each first write flushed (cache = volatile)", false, []string{`destination_cache = "volatile"`}},
		{"tgtd, cache = nonvolatile", false, []string{`destination_cache = "nonvolatile"`}},
		{"file", true, nil},
	} {
		if err := errors.Join(b.firstWritesTo(t, kind.name, kind.file, kind.more), b.endAll()); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) firstWritesTo(t *table, name string, file bool, more []string) error {
	from, to, err := b.blankPair(sparseSize, 0)
	if err != nil {
		return err
	}
	// A thick source has every block copied, and the throttle keeps that from coming far.
	old, err := b.tgtd(oldIQN, false, from)
	if err != nil {
		return err
	}
	destination := to
	if !file {
		new, err := b.tgtd(newIQN, true, to)
		if err != nil {
			return err
		}
		destination = new.LUN(newIQN, 1).URL()
	}
	through, err := b.serve(old.LUN(oldIQN, 1).URL(), destination, more...)
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"throttle", volumeName, "--rate", "1"}, {"start", volumeName}} {
		if err := through.command(args...); err != nil {
			return err
		}
	}
	again := work{Bytes: 4096, Depth: 32, Write: true, Within: rewritten}
	if err := b.fill(through.unit, rewritten); err != nil {
		return err
	}
	for _, depth := range []int{1, 32} {
		var firsts, agains []outcome
		var syncs []time.Duration
		for range b.rounds {
			sync, err := oneFdatasync(b.state)
			if err != nil {
				return err
			}
			syncs = append(syncs, sync)
			o, err := b.load(through.unit, work{Bytes: 4096, Depth: depth, Write: true}, through.pid)
			if err != nil {
				return err
			}
			firsts = append(firsts, o)
			again.Depth = depth
			if o, err = b.load(through.unit, again, through.pid); err != nil {
				return err
			}
			agains = append(agains, o)
		}
		f, a, sync := medians(firsts), medians(agains), median(syncs)
		more := f.P50 - a.P50
		near, fast := "", ""
		if depth == 1 {
			near = atMost(float64(more), float64(sync), 1.5)
		} else {
			fast = atLeast(f.IOPS, a.IOPS, 0.6)
		}
		t.row(name, fmt.Sprint(depth), micros(f.P50), micros(a.P50), micros(more), micros(sync), ratio(float64(more), float64(sync)), near,
			iops(f.IOPS), iops(a.IOPS), ratio(f.IOPS, a.IOPS), fast, micros(f.CPU[0]), micros(a.CPU[0]))
	}
	return nil
}

// oneFdatasync is the median time of one fdatasync of a small write, over space that was
// written before, on the disk of dir.
func oneFdatasync(dir string) (time.Duration, error) {
	file, err := os.Create(filepath.Join(dir, "fdatasync"))
	if err != nil {
		return 0, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	const size = 2 * mib
	if _, err := file.Write(make([]byte, size)); err != nil {
		return 0, err
	}
	if err := file.Sync(); err != nil {
		return 0, err
	}
	var took []time.Duration
	for at := int64(0); at < size; at += 4096 {
		began := time.Now()
		if _, err := file.WriteAt(make([]byte, 4096), at); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// fill writes every block of the first size bytes of a unit.
func (b *bench) fill(unit peer.LUN, size uint64) error {
	shell, err := unit.Shell(b.ctx)
	if err != nil {
		return err
	}
	for at := uint64(0); at < size; at += mib {
		if _, err := shell.Do(b.ctx, peer.Write(0x55, at, mib)); err != nil {
			return errors.Join(err, shell.Close())
		}
	}
	return shell.Close()
}
