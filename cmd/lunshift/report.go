package main

import (
	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) reportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "report VOLUME",
		Short: "Write what a change ticket needs to know of a migration",
		Long: `Write a report of the migration of a volume as Markdown, with --json as JSON: both logical
units, times, sizes and rates, how long initiators were held, what could not be read, how the
comparisons ended, checksums of what a full verify compared, faults that are on, and who did
what. In any phase; of a volume that was removed it is how it ended.`,
		Args: oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			report, err := client.Report(c.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.print(report)
			}
			return control.WriteReport(a.stdout, report)
		},
	}
}
