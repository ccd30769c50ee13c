package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) startCommand() *cobra.Command {
	var o proxy.StartOptions
	command := a.both(a.step("start", "Begin the migration of a volume",
		`Begin the migration of a volume: from now on writes go to the destination and the
background copy runs. It is refused while other initiators have reserved the source or the
destination, or are registered there: they could write behind the migration's back. Done
already, it changes nothing.

A destination that is not blank is refused, unless the volume has overwrite = true or
seeded = true. --reuse takes it as well, for a destination that has most of the data: after
a rollback, or on the way back to the old array after a cutover. Both LUNs are then read and
compared, and only what differs is written; initiators go on meanwhile. On the destination
everything becomes what it is on the source.

The volumes of a group are started one after another.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Start(ctx, volume, o)
		}), nil, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		return c.StartGroup(ctx, group, o)
	})
	command.Flags().BoolVar(&o.Reuse, "reuse", false, "the destination holds most of the data: compare both LUNs and write only what differs")
	command.Flags().BoolVar(&o.IgnoreRegistrations, "ignore-registrations", false, "start although others are registered, who can go on writing to the LUNs")
	return command
}
