package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"time"

	"lunshift/tests/peer"
)

// seededExtent is the length of a place at which the destination differs, in bytes.
const seededExtent = 4096

// seeded is a copy to a destination that holds all but 1 % of the data, against a full copy of
// the same.
func (b *bench) seeded() error {
	size := uint64(512 * mib)
	if b.rounds == 1 {
		size /= 2
	}
	t := b.newTable(fmt.Sprintf("A copy of %d MiB to a destination that differs in 1 %% (4 KiB at random places): compared (start --reuse) against in full.\n"+
		"Aim: a third of the time or less where writing is the bottleneck; none where the destination reads no faster than it writes.", size/mib),
		"destination", "s in full", "s compared", "×faster", "", "MiB written", "of", "CPU s in full", "compared")
	defer t.end()
	from, to, err := b.blankPair(size, 1)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name string
		rate uint64
		aim  float64
	}{
		{"writes 32 MiB/s, reads without limit", 32 * mib, 3},
		{"writes 64 MiB/s, reads without limit", 64 * mib, 3},
		{"the same array, without limits", 0, 0},
	} {
		spans, cpus := make([][]float64, 2), make([][]float64, 2)
		var written uint64
		for range b.rounds {
			for how, args := range [][]string{nil, {"--reuse"}} {
				o, err := b.seededOnce(from, to, size, c.rate, args)
				if err != nil {
					return err
				}
				spans[how], cpus[how] = append(spans[how], o.span.Seconds()), append(cpus[how], o.cpu.Seconds())
				if how == 1 {
					written = o.written
				}
			}
		}
		full, compared, result := median(spans[0]), median(spans[1]), ""
		if c.aim > 0 {
			result = atLeast(full, compared, c.aim)
		}
		t.row(c.name, fmt.Sprintf("%.2f", full), fmt.Sprintf("%.2f", compared), ratio(full, compared), result,
			fmt.Sprintf("%.1f", float64(written)/mib), fmt.Sprint(size/mib),
			fmt.Sprintf("%.2f", median(cpus[0])), fmt.Sprintf("%.2f", median(cpus[1])))
	}
	return nil
}

// seededCopy is one copy.
type seededCopy struct {
	span, cpu time.Duration
	written   uint64 // bytes
}

// seededOnce seeds the destination, copies to it, and makes sure that the copy is right.
func (b *bench) seededOnce(from, to string, size, rate uint64, start []string) (o seededCopy, err error) {
	if err := seedDestination(from, to, size); err != nil {
		return o, err
	}
	keep := b.ends
	b.ends = nil
	o, err = b.seededCopy(from, to, rate, start)
	err = errors.Join(err, b.endAll())
	b.ends = keep
	if err != nil {
		return o, err
	}
	if out, err := exec.CommandContext(b.ctx, "cmp", from, to).CombinedOutput(); err != nil {
		return o, fmt.Errorf("the copy is wrong: %s", out)
	}
	return o, nil
}

// seededCopy is timed from start to synced.
func (b *bench) seededCopy(from, to string, rate uint64, start []string) (o seededCopy, err error) {
	old, err := b.tgtd(oldIQN, true, from)
	if err != nil {
		return o, err
	}
	portal, _, err := b.array("-delay", "0s", "-write-rate", strconv.FormatUint(rate, 10), "-iqn", newIQN, to)
	if err != nil {
		return o, err
	}
	g, err := b.serve(old.LUN(oldIQN, 1).URL(), peer.LUN{Portal: portal, IQN: newIQN, Number: 1}.URL())
	if err != nil {
		return o, err
	}
	before, err := peer.CPUTime(g.pid)
	if err != nil {
		return o, err
	}
	began := time.Now()
	if err := g.command(append([]string{"start", volumeName}, start...)...); err != nil {
		return o, err
	}
	if err := g.command("wait", volumeName, "--for", "synced", "--timeout", "5m"); err != nil {
		return o, err
	}
	o.span = time.Since(began)
	after, err := peer.CPUTime(g.pid)
	if err != nil {
		return o, err
	}
	o.cpu = after - before
	out, err := exec.CommandContext(b.ctx, b.lunshift, "--config", g.config, "status", volumeName, "--json").Output()
	if err != nil {
		return o, fmt.Errorf("lunshift status: %w", err)
	}
	var status struct {
		Copied uint64 `json:"copied_bytes"`
	}
	err = json.Unmarshal(out, &status)
	o.written = status.Copied
	return o, err
}

// seedDestination makes the destination what the source is but for 1 %.
func seedDestination(from, to string, size uint64) (err error) {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := io.Copy(w, r); err != nil {
		return err
	}
	p := make([]byte, seededExtent)
	places := int(size / seededExtent)
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(places)[:places/100] {
		at := uint64(i) * seededExtent
		peer.Stamp(p, 512, at/512, 99, 1)
		if _, err := w.WriteAt(p, int64(at)); err != nil {
			return err
		}
	}
	return nil
}
