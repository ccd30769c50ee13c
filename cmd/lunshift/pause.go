package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.both(a.step("pause", "Stop the background copy of a volume, not its initiators",
		`Stop the background copy. Initiators go on, and what they write goes where
it went. A pause outlives a restart of the service.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Pause(ctx, volume)
		}), nil, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		return c.PauseGroup(ctx, group)
	})
}
