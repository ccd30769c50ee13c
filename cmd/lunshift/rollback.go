package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) rollbackCommand() *cobra.Command {
	var wait, alone bool
	var timeout time.Duration
	var o proxy.RollbackOptions
	check := func() error {
		switch {
		case timeout < 0:
			return control.Usagef("--timeout: %s is no time to wait", timeout)
		case timeout > 0 && !wait:
			return control.Usagef("--timeout goes with --wait, for it is how long to wait for phase %s", proxy.RolledBack)
		}
		return nil
	}
	command := a.both(a.step("rollback", "Go back to the source",
		`Go back to the source, from phase migrating or synced: from now on it takes all writes again,
and what initiators wrote since the start is copied back in the background, while it is
read from where it is. Initiators stay connected. In phase rolled-back everything is on the
source. With a mirror there is next to nothing to copy. Pause, resume and throttle work as on
the way there. Done already, it changes nothing.

The volumes of a group go back at one instant, or none of them does.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			if c.Alone = alone; !wait {
				return c.Rollback(ctx, volume, o)
			}
			a.tellStuck(ctx, c, volume, proxy.RolledBack)
			return c.RollbackAndWait(ctx, volume, timeout, o)
		}), check, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		status, err := c.RollbackGroup(ctx, group, o)
		if err != nil || !wait {
			return status, err
		}
		a.tellStuckGroup(ctx, c, group, proxy.RolledBack)
		return c.WaitGroup(ctx, group, proxy.RolledBack, timeout, false)
	})
	command.Flags().BoolVar(&wait, "wait", false, "wait for phase rolled-back")
	command.Flags().DurationVar(&timeout, "timeout", 0, "with --wait, how long at most, such as 1h; 0 is without end")
	command.Flags().BoolVar(&alone, "alone", false, "take one volume of a group back without the others")
	command.Flags().BoolVar(&o.AcceptUnreadable, "accept-unreadable", false, "give up blocks that the destination cannot read, once nothing else is left to copy back; they read as zeroes from then on")
	return command
}
