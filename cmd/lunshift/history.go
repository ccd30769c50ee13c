package main

import (
	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) historyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "history [VOLUME|GROUP]",
		Short: "Show who did what with a volume, when, and what came of it",
		Long: `Show the audit trail of a volume, of those of a group, or of all: every step that was taken up,
by whom (the user of the process, and who logged in where the kernel knows), with its
options, how it ended and how long it took; the hooks that ran; and what happened by itself.
It stays when the volume is removed. The oldest comes first.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				if name = args[0]; name == "" {
					return control.Usagef("%q is no volume name", name)
				}
			}
			events, err := client.History(c.Context(), name)
			if err != nil {
				return err
			}
			if a.json {
				return a.print(events)
			}
			return control.WriteHistory(a.stdout, events)
		},
	}
}
