package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) startCommand() *cobra.Command {
	var o proxy.StartOptions
	command := a.step("start", "Begin the migration of a volume",
		`Begin the migration of a volume: from now on writes go to the destination and the
background copy runs. It is refused while other initiators have reserved the source or the
destination, or are registered there: they could write behind the migration's back. Done
already, it changes nothing.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Start(ctx, volume, o)
		})
	command.Flags().BoolVar(&o.IgnoreRegistrations, "ignore-registrations", false, "start although others are registered, who can go on writing to the LUNs")
	return command
}
