package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) cutoverCommand() *cobra.Command {
	var wait bool
	command := a.step("cutover", "End the migration of a synced volume",
		`End the migration: commands in flight end, the destination is flushed, and initiators
are asked to log out. From then on the destination stands alone; point initiators
at the new array. Done already, it changes nothing.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			if wait {
				return c.CutoverWhenSynced(ctx, volume)
			}
			return c.Cutover(ctx, volume)
		})
	command.Flags().BoolVar(&wait, "wait", false, "wait for phase synced first")
	return command
}
