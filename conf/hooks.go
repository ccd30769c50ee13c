package conf

import (
	"fmt"
	"strings"
	"time"
)

// Hooks are commands that run beside the steps of a volume: the path of a program and its
// arguments, without a shell. One that is empty does not run.
type Hooks struct {
	BeforeStart, AfterSynced      []string
	BeforeCutover, AfterCutover   []string
	BeforeRollback, AfterRollback []string
	// Timeout is how long one may take, 1 s to 1 h.
	Timeout time.Duration
}

func defaultHooks() Hooks { return Hooks{Timeout: time.Minute} }

// settings are the keys of a [hooks] table. What it does not name stays.
func (h *Hooks) settings() []setting {
	return []setting{
		{"before_start", command(&h.BeforeStart)},
		{"after_synced", command(&h.AfterSynced)},
		{"before_cutover", command(&h.BeforeCutover)},
		{"after_cutover", command(&h.AfterCutover)},
		{"before_rollback", command(&h.BeforeRollback)},
		{"after_rollback", command(&h.AfterRollback)},
		{"timeout", duration(&h.Timeout, time.Second, time.Hour)},
	}
}

// command takes a program and its arguments; an empty list is none.
func command(to *[]string) func(any) error {
	return func(v any) error {
		if _, ok := v.([]any); !ok {
			return fmt.Errorf("is %s; it is a list of the path of a program and its arguments, such as [\"/etc/lunshift/hook\", \"db\"]", kindOf(v))
		}
		var list []string
		if err := texts(&list)(v); err != nil {
			return err
		}
		for i, s := range list {
			if strings.ContainsRune(s, 0) {
				return elementFaults{{i, "has a NUL in it"}}
			}
		}
		if len(list) > 0 && !strings.HasPrefix(list[0], "/") {
			return elementFaults{{0, fmt.Sprintf("%q is no absolute path; begin it with /: there is no shell that would look for it", list[0])}}
		}
		*to = list
		return nil
	}
}
