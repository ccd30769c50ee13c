package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"lunshift/control"
	"lunshift/proxy"
)

func (a *app) cutoverCommand() *cobra.Command {
	var wait, alone, dry bool
	var timeout time.Duration
	var o proxy.CutoverOptions
	check := func() error {
		switch {
		case timeout < 0:
			return control.Usagef("--timeout: %s is no time to wait", timeout)
		case timeout > 0 && !wait:
			return control.Usagef("--timeout goes with --wait, for it is how long to wait for phase %s", proxy.Synced)
		case dry && wait:
			return control.Usagef("--dry-run tells how things are now: leave out --wait")
		}
		return nil
	}
	command := a.both(a.step("cutover", "End the migration of a synced volume",
		`End the migration: a sample of source and destination is compared, initiators are asked to
log out, commands in flight end, and the destination is flushed. From then on it stands alone,
and logins are sent there (redirect = true) or refused. Where an initiator does not log out
within logout_timeout the cutover is undone: the volume stays synced and is served on, and the
error names the sessions. Done already, it changes nothing.

The volumes of a group are cut over at one instant, or none of them is.`,
		func(ctx context.Context, c *control.Client, volume string) (control.Status, error) {
			if c.Alone = alone; !wait {
				return c.Cutover(ctx, volume, o)
			}
			a.tellStuck(ctx, c, volume, proxy.Synced)
			return c.CutoverWhenSynced(ctx, volume, timeout, o)
		}), check, func(ctx context.Context, c *control.Client, group string) (control.GroupStatus, error) {
		if wait {
			a.tellStuckGroup(ctx, c, group, proxy.Synced)
			if status, err := c.WaitGroup(ctx, group, proxy.Synced, timeout, true); err != nil {
				return status, err
			}
		}
		return c.CutoverGroup(ctx, group, o)
	})
	do := command.RunE
	command.RunE = func(c *cobra.Command, args []string) error {
		if !dry {
			return do(c, args)
		}
		if err := check(); err != nil {
			return err
		}
		return a.cutoverDryRun(c.Context(), args[0], alone, o)
	}
	command.Flags().BoolVar(&dry, "dry-run", false, "do nothing; show what to look at before, and whether it would begin (exit code 3 if not)")
	command.Flags().BoolVar(&wait, "wait", false, "wait for phase synced first")
	command.Flags().DurationVar(&timeout, "timeout", 0, "with --wait, how long at most, such as 1h; 0 is without end")
	command.Flags().BoolVar(&alone, "alone", false, "cut over one volume of a group without the others")
	command.Flags().BoolVar(&o.NoVerify, "no-verify", false, "do not compare a sample first")
	command.Flags().BoolVar(&o.Force, "force", false, "drop sessions that do not log out within logout_timeout, and go on")
	command.Flags().BoolVar(&o.AcceptUnreadable, "accept-unreadable", false, "give up blocks that the source cannot read; they read as zeroes from then on")
	return command
}

func (a *app) cutoverDryRun(ctx context.Context, name string, alone bool, o proxy.CutoverOptions) error {
	client, err := a.client()
	if err != nil {
		return err
	}
	client.Alone = alone
	var r control.DryRun
	if _, err = client.Group(ctx, name); control.KindOf(err) == control.Unknown {
		r, err = client.CutoverDryRun(ctx, name, o)
	} else if err == nil {
		r, err = client.CutoverGroupDryRun(ctx, name, o)
	}
	if err != nil {
		return err
	}
	if a.json {
		err, a.reported = a.print(r), true
	} else {
		err = control.WriteDryRun(a.stdout, r, time.Now())
	}
	if err == nil {
		err = r.Err()
	}
	return err
}
