package main

import (
	"errors"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Validate the configuration and say what would be refused",
		Long: `Read the configuration, open both logical units of every volume, and show sizes, block
sizes, identity, allocation, an estimate of the time and what would be refused.
Nothing is written to a logical unit. The exit code is 1 when anything would be
refused. Where the service runs, it is asked about its volumes.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := a.load()
			if err != nil {
				return err
			}
			report, err := control.Check(c.Context(), cfg, control.QuietLogger(a.stderr))
			if err != nil {
				return err
			}
			show := func() error { return control.WriteCheck(a.stdout, report) }
			if a.json {
				show = func() error { return a.print(report) }
			}
			a.reported = true // the report has the refusals
			return errors.Join(show(), report.Refused())
		},
	}
}
