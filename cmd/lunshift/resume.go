package main

import (
	"context"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) resumeCommand() *cobra.Command {
	return a.both(a.step("resume", "Go on with the background copy of a volume",
		`Go on with the background copy after a pause.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			return c.Resume(ctx, volume)
		}), nil, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		return c.ResumeGroup(ctx, group)
	})
}
