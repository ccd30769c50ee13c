package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"lunshift/tests/peer"
)

const (
	mib = 1 << 20
	// unitSize is of the LUNs that take loads, in bytes.
	unitSize = 256 * mib
)

// workloads are the same for all: 4 KiB at random, and 256 KiB in sequence (gotgt
// hangs on longer reads).
var workloads = []work{
	{Bytes: 4096, Depth: 1},
	{Bytes: 4096, Depth: 32},
	{Bytes: 4096, Depth: 128},
	{Bytes: 4096, Depth: 1, Write: true},
	{Bytes: 4096, Depth: 32, Write: true},
	{Bytes: 4096, Depth: 128, Write: true},
	{Bytes: 256 << 10, Depth: 8, Sequential: true},
	{Bytes: 256 << 10, Depth: 8, Sequential: true, Write: true},
}

// threeOnOneFile are lunshift, tgtd and gotgt, all serving one file.
func (b *bench) threeOnOneFile() ([]server, error) {
	path, err := b.file("unit.img", unitSize, 1)
	if err != nil {
		return nil, err
	}
	blank, err := b.file("blank.img", unitSize, 0)
	if err != nil {
		return nil, err
	}
	b.atEnd(func() error { return errors.Join(os.Remove(path), os.Remove(blank)) })
	ours, err := b.serve(path, blank)
	if err != nil {
		return nil, err
	}
	const iqn = "iqn.2026-11.net.example.bench:tgtd"
	d, err := b.tgtd(iqn, false, path)
	if err != nil {
		return nil, err
	}
	stock, err := b.gotgt(path)
	if err != nil {
		return nil, err
	}
	return []server{ours.server, {"tgtd", d.LUN(iqn, 1), d.PID()}, stock}, nil
}

// files is lunshift on a file against tgtd and gotgt on the same one.
func (b *bench) files() error {
	servers, err := b.threeOnOneFile()
	if err != nil {
		return err
	}
	t := b.newTable("A file LUN through lunshift (in phase ready), against tgtd and stock gotgt on the same file.\n"+
		"Aims: IOPS at least tgtd's (×tgtd ≥ 1.00), processor time per I/O at most tgtd's (≤ 1.00).",
		"", "IOPS lunshift", "tgtd", "gotgt", "×tgtd", "×gotgt", "", "µs CPU/IO lunshift", "tgtd", "gotgt", "×tgtd", "×gotgt", "", "p99 µs lunshift", "tgtd", "gotgt")
	defer t.end()
	for _, w := range workloads {
		rounds := make([][]outcome, len(servers))
		down := make([]bool, len(servers))
		for range b.rounds {
			for i, s := range servers {
				if down[i] {
					continue
				}
				o, err := b.load(s.unit, w, s.pid)
				if err != nil {
					// gotgt may give up; the other two must not.
					if s.name == "gotgt" && b.ctx.Err() == nil {
						down[i] = true
						continue
					}
					return err
				}
				rounds[i] = append(rounds[i], o)
			}
		}
		var m []outcome
		for _, r := range rounds {
			o := medians(r)
			if len(o.CPU) == 0 {
				o.CPU = []time.Duration{0}
			}
			m = append(m, o)
		}
		l, g, s := m[0], m[1], m[2]
		cpu := func(o outcome) float64 { return float64(o.CPU[0]) }
		t.row(w.String(), iops(l.IOPS), iops(g.IOPS), iops(s.IOPS), ratio(l.IOPS, g.IOPS), ratio(l.IOPS, s.IOPS), atLeast(l.IOPS, g.IOPS, 1),
			micros(l.CPU[0]), micros(g.CPU[0]), micros(s.CPU[0]), ratio(cpu(l), cpu(g)), ratio(cpu(l), cpu(s)), atMost(cpu(l), cpu(g), 1),
			micros(l.P99), micros(g.P99), micros(s.P99))
	}
	return nil
}

// perf is the same with a client that nobody here wrote.
func (b *bench) perf() error {
	servers, err := b.threeOnOneFile()
	if err != nil {
		return err
	}
	t := b.newTable("The same, random 4 KiB read at depth 32 by libiscsi's iscsi-perf, which itself bounds the IOPS.",
		"", "IOPS", "×tgtd", "µs CPU/IO", "×tgtd")
	defer t.end()
	seconds := max(1, int(b.span.Seconds()))
	rates, cpus := make([][]float64, len(servers)), make([][]time.Duration, len(servers))
	for range b.rounds {
		for i, s := range servers {
			before, err := peer.CPUTime(s.pid)
			if err != nil {
				return err
			}
			rate, ios, err := b.iscsiPerf(s.unit, seconds)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			after, err := peer.CPUTime(s.pid)
			if err != nil {
				return err
			}
			rates[i] = append(rates[i], rate)
			cpus[i] = append(cpus[i], time.Duration(float64(after-before)/ios))
		}
	}
	for i, s := range servers {
		rate, cpu := median(rates[i]), median(cpus[i])
		t.row(s.name, iops(rate), ratio(rate, median(rates[1])), micros(cpu), ratio(float64(cpu), float64(median(cpus[1]))))
	}
	return nil
}

var perfLine = regexp.MustCompile(`(?:iops average|average iops)\D*(\d+)`)

// iscsiPerf gives the mean rate, and how many I/Os there were.
func (b *bench) iscsiPerf(unit peer.LUN, seconds int) (rate, ios float64, err error) {
	began := time.Now()
	out, err := peer.Run(b.ctx, "iscsi-perf", "-r", "-b", "8", "-m", "32", "-t", strconv.Itoa(seconds), unit.URL())
	if err != nil {
		return 0, 0, err
	}
	m := perfLine.FindAllStringSubmatch(out, -1)
	if len(m) == 0 {
		return 0, 0, fmt.Errorf("iscsi-perf tells no average: %s", out)
	}
	if rate, err = strconv.ParseFloat(m[len(m)-1][1], 64); err != nil {
		return 0, 0, err
	}
	return rate, rate * min(time.Since(began).Seconds(), float64(seconds)), nil
}

// twoArrays are an old LUN and the way through lunshift to it and to a new one.
type twoArrays struct {
	through *gateway
	old     peer.LUN
	// beside is another LUN of the new array: from the start on nobody but lunshift
	// writes to the two that are migrated.
	beside peer.LUN
	pids   [2]int // of the old and the new array
}

const (
	oldIQN = "iqn.2001-04.com.example:old"
	newIQN = "iqn.2001-04.com.example:new"
)

// migration serves from and to by a tgtd each, and lunshift in front of them.
func (b *bench) migration(from, to string) (*twoArrays, error) {
	old, err := b.tgtd(oldIQN, true, from)
	if err != nil {
		return nil, err
	}
	beside, err := b.file("beside.img", unitSize, 0)
	if err != nil {
		return nil, err
	}
	b.atEnd(func() error { return os.Remove(beside) })
	new, err := b.tgtd(newIQN, true, to, beside)
	if err != nil {
		return nil, err
	}
	a := &twoArrays{old: old.LUN(oldIQN, 1), beside: new.LUN(newIQN, 2), pids: [2]int{old.PID(), new.PID()}}
	a.through, err = b.serve(a.old.URL(), new.LUN(newIQN, 1).URL())
	return a, err
}

// blankPair makes the two files of a migration.
func (b *bench) blankPair(size uint64, share float64) (from, to string, err error) {
	if from, err = b.file("old.img", size, share); err != nil {
		return "", "", err
	}
	if to, err = b.file("new.img", size, 0); err != nil {
		return "", "", err
	}
	b.atEnd(func() error { return errors.Join(os.Remove(from), os.Remove(to)) })
	return from, to, nil
}

// arrays is the way through lunshift to a LUN on tgtd against the direct one.
func (b *bench) arrays() error {
	from, to, err := b.blankPair(unitSize, 1)
	if err != nil {
		return err
	}
	a, err := b.migration(from, to)
	if err != nil {
		return err
	}
	t := b.newTable("A LUN on tgtd through lunshift, against directly; client, lunshift and arrays share the cores.\n"+
		"Aims: at depth 1 a p50 of at most 2.30 × direct, at depth 32 processor time per I/O of lunshift at most 1.30 × that of the tgtd behind it.",
		"", "p50 µs through", "direct", "×direct", "", "IOPS through", "direct", "×direct", "µs CPU/IO lunshift", "tgtd behind", "×tgtd", "")
	defer t.end()
	const first = "synced, mostly first writes" // which the aims do not mean
	measure := func(phase string, list []work, direct peer.LUN, behind int) error {
		for _, w := range list {
			var through, straight []outcome
			for range b.rounds {
				o, err := b.load(a.through.unit, w, a.through.pid, behind)
				if err != nil {
					return err
				}
				through = append(through, o)
				if o, err = b.load(direct, w); err != nil {
					return err
				}
				straight = append(straight, o)
			}
			l, d := medians(through), medians(straight)
			p50, cpu := "", ""
			if w.Bytes == 4096 && w.Depth == 1 && phase != first {
				p50 = atMost(float64(l.P50), float64(d.P50), 2.3)
			}
			if w.Bytes == 4096 && w.Depth == 32 && phase != first {
				cpu = atMost(float64(l.CPU[0]), float64(l.CPU[1]), 1.3)
			}
			t.row(phase+": "+w.String(), micros(l.P50), micros(d.P50), ratio(float64(l.P50), float64(d.P50)), p50,
				iops(l.IOPS), iops(d.IOPS), ratio(l.IOPS, d.IOPS),
				micros(l.CPU[0]), micros(l.CPU[1]), ratio(float64(l.CPU[0]), float64(l.CPU[1])), cpu)
		}
		return nil
	}
	shallow := []work{workloads[0], workloads[1], workloads[3], workloads[4]}
	if err := measure("ready", append(shallow, workloads[6], workloads[7]), a.old, a.pids[0]); err != nil {
		return err
	}
	if err := a.through.command("start", volumeName); err != nil {
		return err
	}
	if err := a.through.command("wait", volumeName, "--for", "synced", "--timeout", "5m"); err != nil {
		return err
	}
	// The first write to a block after start is answered once its flag is on stable
	// storage; later ones need none.
	if err := b.fill(a.beside, unitSize); err != nil {
		return err
	}
	if err := measure(first, shallow[2:], a.beside, a.pids[1]); err != nil {
		return err
	}
	if err := b.fill(a.through.unit, unitSize); err != nil {
		return err
	}
	return measure("synced, rewrites", shallow, a.beside, a.pids[1])
}

// slowArrays is the same with arrays of a disk's latency.
func (b *bench) slowArrays() error {
	from, to, err := b.blankPair(unitSize, 1)
	if err != nil {
		return err
	}
	const delay = time.Millisecond
	old, pid, err := b.slowArray(oldIQN, delay, from)
	if err != nil {
		return err
	}
	new, _, err := b.slowArray(newIQN, delay, to)
	if err != nil {
		return err
	}
	direct := peer.LUN{Portal: old, IQN: oldIQN, Number: 1}
	through, err := b.serve(direct.URL(), peer.LUN{Portal: new, IQN: newIQN, Number: 1}.URL())
	if err != nil {
		return err
	}
	t := b.newTable("A LUN on an array that takes 1 ms more for each I/O, through lunshift, against directly.\nAim: at least 0.95 × the direct IOPS.",
		"", "IOPS through", "direct", "×direct", "", "p50 µs through", "direct", "µs CPU/IO lunshift", "array")
	defer t.end()
	for _, w := range []work{
		{Bytes: 4096, Depth: 1}, {Bytes: 4096, Depth: 8}, {Bytes: 4096, Depth: 16},
		{Bytes: 4096, Depth: 1, Write: true}, {Bytes: 4096, Depth: 8, Write: true}, {Bytes: 4096, Depth: 16, Write: true},
	} {
		var with, without []outcome
		for range b.rounds {
			o, err := b.load(through.unit, w, through.pid, pid)
			if err != nil {
				return err
			}
			with = append(with, o)
			if o, err = b.load(direct, w); err != nil {
				return err
			}
			without = append(without, o)
		}
		l, d := medians(with), medians(without)
		t.row(w.String(), iops(l.IOPS), iops(d.IOPS), ratio(l.IOPS, d.IOPS), atLeast(l.IOPS, d.IOPS, 0.95),
			micros(l.P50), micros(d.P50), micros(l.CPU[0]), micros(l.CPU[1]))
	}
	return nil
}

// copies is the background copy against qemu-img.
func (b *bench) copies() error {
	size := uint64(1024 * mib)
	if b.rounds == 1 {
		size /= 2
	}
	t := b.newTable(fmt.Sprintf("A copy of %d MiB from one tgtd to another, against qemu-img convert -n -W -m 16.\nAim: at least qemu-img's rate.", size/mib),
		"allocated", "MiB/s lunshift", "qemu-img", "×qemu-img", "", "CPU s lunshift", "qemu-img")
	defer t.end()
	from, to, err := b.blankPair(size, 0)
	if err != nil {
		return err
	}
	for _, share := range []float64{1, 0.4} {
		_, err := peer.SparseFile(from, size, share, 1)
		if err != nil {
			return err
		}
		allocated, err := peer.Allocated(from)
		if err != nil {
			return err
		}
		var ours, theirs []float64
		var ourCPU, theirCPU []time.Duration
		for range b.rounds {
			span, cpu, err := b.copyOnce(from, to, size, (*bench).copyLunshift)
			if err != nil {
				return err
			}
			ours, ourCPU = append(ours, float64(allocated)/mib/span.Seconds()), append(ourCPU, cpu)
			if span, cpu, err = b.copyOnce(from, to, size, (*bench).copyQemu); err != nil {
				return err
			}
			theirs, theirCPU = append(theirs, float64(allocated)/mib/span.Seconds()), append(theirCPU, cpu)
		}
		t.row(fmt.Sprintf("%.0f %%", 100*float64(allocated)/float64(size)), iops(median(ours)), iops(median(theirs)),
			ratio(median(ours), median(theirs)), atLeast(median(ours), median(theirs), 1),
			fmt.Sprintf("%.2f", median(ourCPU).Seconds()), fmt.Sprintf("%.2f", median(theirCPU).Seconds()))
	}
	return nil
}

// copyOnce empties the destination, copies, and makes sure that the copy is right.
func (b *bench) copyOnce(from, to string, size uint64, copy func(*bench, string, string) (time.Duration, time.Duration, error)) (span, cpu time.Duration, err error) {
	if err := peer.EmptyFile(to, size); err != nil {
		return 0, 0, err
	}
	keep := b.ends
	b.ends = nil
	span, cpu, err = copy(b, from, to)
	err = errors.Join(err, b.endAll())
	b.ends = keep
	if err != nil {
		return 0, 0, err
	}
	if out, err := exec.CommandContext(b.ctx, "cmp", from, to).CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("the copy is wrong: %s", out)
	}
	return span, cpu, nil
}

// copyLunshift is timed from start to synced, as a script would.
func (b *bench) copyLunshift(from, to string) (span, cpu time.Duration, err error) {
	a, err := b.migration(from, to)
	if err != nil {
		return 0, 0, err
	}
	before, err := peer.CPUTime(a.through.pid)
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := a.through.command("start", volumeName); err != nil {
		return 0, 0, err
	}
	if err := a.through.command("wait", volumeName, "--for", "synced", "--timeout", "5m"); err != nil {
		return 0, 0, err
	}
	span = time.Since(began)
	after, err := peer.CPUTime(a.through.pid)
	return span, after - before, err
}

// copyQemu is timed from qemu-img's start to its end.
func (b *bench) copyQemu(from, to string) (span, cpu time.Duration, err error) {
	old, err := b.tgtd(oldIQN, true, from)
	if err != nil {
		return 0, 0, err
	}
	new, err := b.tgtd(newIQN, true, to)
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	cpu, err = old.LUN(oldIQN, 1).CopyTo(b.ctx, new.LUN(newIQN, 1), 16)
	return time.Since(began), cpu, err
}
