package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) startCommand() *cobra.Command {
	return a.step("start", "Begin the migration of a volume",
		`Begin the migration of a volume: from now on writes go to the destination and the
background copy runs. Done already, it changes nothing.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Start(ctx, volume)
		})
}
