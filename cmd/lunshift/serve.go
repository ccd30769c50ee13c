package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"lunshift/control"
)

func (a *app) serveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the service: serve the volumes of the configuration to initiators",
		Long: `Run the service in the foreground until SIGTERM or SIGINT: it opens the logical units,
goes on with what was begun, and serves initiators. The first signal lets commands
in flight end, the second ends the process at once; neither loses an acknowledged
write. SIGHUP has it read its configuration again (see lunshift reload). The log goes to standard error. The exit code is 2 when the configuration
cannot be read or has faults, which no restart mends.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := a.load()
			if err != nil {
				return &control.Error{Kind: control.Configuration, Message: err.Error()}
			}
			log := control.NewLogger(cfg.Service, a.stderr)
			// From before the start on, as SIGHUP ends a process that does not ask for it.
			hangUp := make(chan os.Signal, 1)
			signal.Notify(hangUp, syscall.SIGHUP)
			defer signal.Stop(hangUp)
			service, err := control.New(c.Context(), cfg, control.Options{Version: buildVersion(), Log: log, Reload: hangUp})
			if err != nil {
				return err
			}
			return service.Run(c.Context())
		},
	}
}
