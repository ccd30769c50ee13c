package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

// mirrorSize is of the LUNs of the mirror's part, hotSize the part of them that is written
// again and again.
const (
	mirrorSize = 256 * mib
	hotSize    = 4 * mib
)

// mirror is what writes cost that go to both sides, against writes that go to the destination
// alone, in phase synced.
func (b *bench) mirror() error {
	t := b.newTable("Writes of 4 KiB, at random, in phase synced: with a mirror, which has them on both arrays before they are acknowledged, against without one. LUNs are in memory, the state on a disk.\n"+
		"A block that both sides hold alike is marked first, and unmarked about a second after its last write: all over the LUN nearly every write pays for that, in one place hardly any.",
		"where", "depth", "p50 µs without", "mirror", "×", "IOPS without", "mirror", "×", "µs CPU/IO without", "mirror", "×")
	defer t.end()
	from, to, err := b.blankPair(mirrorSize, 0)
	if err != nil {
		return err
	}
	old, err := b.tgtd(oldIQN, true, from)
	if err != nil {
		return err
	}
	fresh, err := b.tgtd(newIQN, true, to)
	if err != nil {
		return err
	}
	through, err := b.serve(old.LUN(oldIQN, 1).URL(), fresh.LUN(newIQN, 1).URL())
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"start", volumeName}, {"wait", volumeName, "--for", "synced", "--timeout", "60s"}} {
		if err := through.command(args...); err != nil {
			return err
		}
	}
	if err := b.fill(through.unit, mirrorSize); err != nil {
		return err
	}
	for _, w := range []struct {
		name   string
		within uint64
	}{{"all over the LUN", mirrorSize}, {fmt.Sprintf("in %d MiB", hotSize/mib), hotSize}} {
		for _, depth := range []int{1, 32} {
			var without, with []outcome
			for range b.rounds {
				for _, on := range []string{"off", "on"} {
					if err := through.mirror(on); err != nil {
						return err
					}
					o, err := b.load(through.unit, work{Bytes: 4096, Depth: depth, Write: true, Within: w.within}, through.pid)
					if err != nil {
						return err
					}
					if on == "on" {
						with = append(with, o)
					} else {
						without = append(without, o)
					}
				}
			}
			a, m := medians(without), medians(with)
			t.row(w.name, fmt.Sprint(depth), micros(a.P50), micros(m.P50), ratio(float64(m.P50), float64(a.P50)),
				iops(a.IOPS), iops(m.IOPS), ratio(m.IOPS, a.IOPS), micros(a.CPU[0]), micros(m.CPU[0]), ratio(float64(m.CPU[0]), float64(a.CPU[0])))
		}
	}
	return errors.Join(through.command("mirror", volumeName, "off"), b.endAll())
}

// mirror switches the mirror, and waits until the source is caught up.
func (g *gateway) mirror(on string) error {
	if err := g.command("mirror", volumeName, on); err != nil || on == "off" {
		return err
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		out, err := exec.CommandContext(g.b.ctx, g.b.lunshift, "--config", g.config, "status", volumeName, "--json").Output()
		if err != nil {
			return fmt.Errorf("lunshift status: %w", err)
		}
		var status struct {
			Mirror struct {
				State string `json:"state"`
			} `json:"mirror"`
		}
		if err := json.Unmarshal(out, &status); err != nil {
			return err
		}
		if status.Mirror.State == "whole" {
			return nil
		}
	}
	return errors.New("the mirror was not whole within a minute")
}
