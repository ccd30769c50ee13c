package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) removeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove VOLUME",
		Short: "Forget the state of a volume that is cut over",
		Long: `Forget the state of a volume that is cut over. Delete its [[volume]] from the
configuration as well, with redirect once no host comes here any more, as that ends with it; until
then the volume is not served again, because its source is stale. Done already, it changes nothing.`,
		Args: oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			report, err := client.Remove(c.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.print(report)
			}
			text := "%s: removed; delete its [[volume]] from the configuration\n"
			if report.Redirect != "" {
				text = "%s: removed; logins are sent to " + report.Redirect
				if report.RedirectUntil != nil {
					text += " until " + report.RedirectUntil.Local().Format(time.DateTime)
				}
				text += ": delete its [[volume]] from the configuration after that, or once every host has moved\n"
			}
			switch {
			case !report.Known:
				text = "there is no volume %s any more, nothing to remove\n"
			case !report.Removed:
				text = "%s: nothing to remove\n"
			}
			_, err = fmt.Fprintf(a.stdout, text, report.Name)
			return err
		},
	}
}
