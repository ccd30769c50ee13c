package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) mirrorCommand() *cobra.Command {
	var on bool
	command := a.step("mirror", "Have writes go to both sides, or to the destination alone",
		`Have each write go to both sides, so that going back costs nothing, or to the destination
alone. A write is then acknowledged once both have it. What the source missed before is brought to
it in the background; lunshift status shows "whole" when both sides are the same. A source
that fails does not fail writes: the mirror is broken then, and catches up once the source is
back. It is kept over restarts, and wins over mirror in the configuration. In phase ready it
counts from the start on.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Mirror(ctx, volume, on)
		})
	command.Use = "mirror VOLUME on|off"
	command.Args = func(_ *cobra.Command, args []string) error {
		if len(args) != 2 {
			return errors.New("it takes the name of a volume, and on or off")
		}
		if on = args[1] == "on"; !on && args[1] != "off" {
			return fmt.Errorf("a mirror is on or off, not %q", args[1])
		}
		return nil
	}
	return command
}
