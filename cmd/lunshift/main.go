// Command lunshift moves iSCSI logical units to another array while initiators
// keep reading and writing. Each command has a file of its own; what they do is in
// package control.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"lunshift/conf"
	"lunshift/control"
)

// version is set by the build.
var version = "unknown"

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(control.ExitInterrupted)
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// app is what the commands share.
type app struct {
	stdout, stderr io.Writer

	config, control string
	json            bool
	// understood is set once the command line is: errors before are the caller's.
	understood bool
	// reported is set once standard output has the JSON that says what failed.
	reported bool
}

// run does one command line and gives the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr, json: wantsJSON(args)}
	root := a.root()
	root.SetArgs(args)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return control.ExitDone
	}
	if !a.understood {
		text := strings.Join(strings.Fields(err.Error()), " ")
		err = control.Usagef("%s (see %s --help)", text, command.CommandPath())
	}
	interrupted := errors.Is(err, context.Canceled) && ctx.Err() != nil
	if interrupted {
		err = &control.Error{Kind: control.Interrupted, Message: "interrupted by a signal"}
	}
	if a.json && !a.reported {
		a.print(map[string]control.Error{"error": {Kind: control.KindOf(err), Message: err.Error()}})
	}
	if interrupted {
		return control.ExitCode(err)
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(stderr, "lunshift: %s\n", strings.TrimSuffix(line, "\n"))
	}
	return control.ExitCode(err)
}

// wantsJSON tells whether --json is among the arguments, whatever else is wrong with
// them.
func wantsJSON(args []string) bool {
	wants := false
	for _, arg := range args {
		if arg == "--" {
			break
		}
		if arg == "--json" {
			wants = true
		} else if value, ok := strings.CutPrefix(arg, "--json="); ok {
			on, err := strconv.ParseBool(value)
			wants = on || err != nil
		}
	}
	return wants
}

func (a *app) root() *cobra.Command {
	var showVersion bool
	root := &cobra.Command{
		Use:   "lunshift",
		Short: "Move iSCSI logical units to another array while they are in use",
		Long: `lunshift is an iSCSI target that stands in front of two logical units, the source
and the destination, and moves the first onto the second while initiators keep
reading and writing.

Exit codes: 0 done, 1 failed, 2 wrong usage (of serve also: a faulty configuration),
3 not allowed in this phase, 4 done but for what needs a restart, 5 source and
destination differ, 130 interrupted.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		RunE: func(c *cobra.Command, _ []string) error {
			if showVersion {
				return a.showVersion()
			}
			return c.Help()
		},
	}
	root.Flags().BoolVar(&showVersion, "version", false, "show the version")
	root.SetHelpCommand(helpCommand())
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	flags := root.PersistentFlags()
	flags.StringVar(&a.config, "config", "", "configuration `FILE` (default "+conf.DefaultPath+")")
	flags.StringVar(&a.control, "control", "", "control `SOCKET` of the service (default: the one in the configuration)")
	flags.BoolVar(&a.json, "json", a.json, "write JSON to standard output")
	root.MarkFlagsMutuallyExclusive("config", "control")
	root.AddCommand(
		a.serveCommand(), a.reloadCommand(), a.checkCommand(), a.startCommand(), a.statusCommand(),
		a.pauseCommand(), a.resumeCommand(), a.throttleCommand(), a.waitCommand(),
		a.verifyCommand(), a.mirrorCommand(), a.cutoverCommand(), a.rollbackCommand(), a.removeCommand(), a.historyCommand(), a.reportCommand(), a.breakFenceCommand(), a.adoptCommand(), a.demoCommand(), a.versionCommand(),
	)
	for _, command := range append([]*cobra.Command{root}, root.Commands()...) {
		do := command.RunE
		command.RunE = func(c *cobra.Command, args []string) error {
			a.understood = true
			return do(c, args)
		}
	}
	return root
}

// helpCommand shows the help of a command, and refuses a name that is none.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show the help of a command",
		RunE: func(c *cobra.Command, args []string) error {
			command, rest, err := c.Root().Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return fmt.Errorf("%q is no command of %s", rest[0], command.CommandPath())
			}
			return command.Help()
		},
	}
}

// load reads the configuration that --config names.
func (a *app) load() (*conf.Config, error) {
	path := a.config
	if path == "" {
		path = conf.DefaultPath
	}
	return control.LoadConfig(path)
}

// client is a client of the service that --config or --control names.
func (a *app) client() (*control.Client, error) {
	switch {
	case a.control != "":
		return control.NewClient(a.control), nil
	case a.config != "":
		socket, err := conf.Control(a.config)
		return control.NewClient(socket), err
	}
	if _, err := os.Stat(conf.DefaultPath); errors.Is(err, fs.ErrNotExist) {
		return control.NewClient(conf.DefaultControl), nil
	}
	socket, err := conf.Control(conf.DefaultPath)
	return control.NewClient(socket), err
}

// step is a command that does something with one volume and shows how it then is.
func (a *app) step(name, short, long string, do func(context.Context, *control.Client, string) (control.Status, error)) *cobra.Command {
	return &cobra.Command{
		Use:   name + " VOLUME",
		Short: short,
		Long:  long,
		Args:  oneVolume,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			status, err := do(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.print(status)
			}
			return control.WriteLine(a.stdout, status)
		},
	}
}

// both makes a step take a group as well; check, unless nil, is for what was asked of either.
func (a *app) both(command *cobra.Command, check func() error, do func(context.Context, *control.Client, string) (control.GroupStatus, error)) *cobra.Command {
	one := command.RunE
	command.Use = strings.Replace(command.Use, "VOLUME", "VOLUME|GROUP", 1)
	command.RunE = func(c *cobra.Command, args []string) error {
		if check != nil {
			if err := check(); err != nil {
				return err
			}
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		if _, err := client.Group(c.Context(), args[0]); control.KindOf(err) == control.Unknown {
			return one(c, args)
		} else if err != nil {
			return err
		}
		status, err := do(c.Context(), client, args[0])
		if err != nil {
			return err
		}
		if a.json {
			return a.print(status)
		}
		return control.WriteGroupLines(a.stdout, status)
	}
	return command
}

// oneVolume are the arguments of a command that is about one volume.
func oneVolume(_ *cobra.Command, args []string) error {
	switch len(args) {
	case 0:
		return errors.New("the name of a volume is missing")
	case 1:
		return nil
	}
	return fmt.Errorf("one volume at a time, not %s", strings.Join(args, " and "))
}

// print writes v to standard output as one line of JSON.
func (a *app) print(v any) error { return json.NewEncoder(a.stdout).Encode(v) }
