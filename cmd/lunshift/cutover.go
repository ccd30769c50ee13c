package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) cutoverCommand() *cobra.Command {
	var wait bool
	var timeout time.Duration
	var o proxy.CutoverOptions
	command := a.step("cutover", "End the migration of a synced volume",
		`End the migration: a sample of source and destination is compared, initiators are asked to
log out, commands in flight end, and the destination is flushed. From then on it stands alone,
and logins are sent there (redirect = true) or refused. Where an initiator does not log out
within logout_timeout the cutover is undone: the volume stays synced and is served on, and the
error names the sessions. Done already, it changes nothing.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			switch {
			case timeout < 0:
				return control.Status{}, control.Usagef("--timeout: %s is no time to wait", timeout)
			case timeout > 0 && !wait:
				return control.Status{}, control.Usagef("--timeout goes with --wait, for it is how long to wait for phase %s", proxy.Synced)
			case !wait:
				return c.Cutover(ctx, volume, o)
			}
			a.tellStuck(ctx, c, volume, proxy.Synced)
			return c.CutoverWhenSynced(ctx, volume, timeout, o)
		})
	command.Flags().BoolVar(&wait, "wait", false, "wait for phase synced first")
	command.Flags().DurationVar(&timeout, "timeout", 0, "with --wait, how long at most, such as 1h; 0 is without end")
	command.Flags().BoolVar(&o.NoVerify, "no-verify", false, "do not compare a sample first")
	command.Flags().BoolVar(&o.Force, "force", false, "drop sessions that do not log out within logout_timeout, and go on")
	command.Flags().BoolVar(&o.AcceptUnreadable, "accept-unreadable", false, "give up blocks that the source cannot read; they read as zeroes from then on")
	return command
}
