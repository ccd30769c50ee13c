package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binary is the lunshift that all tests run.
var binary string

// TestMain builds lunshift as it ships: one static binary. LUNSHIFT_E2E_RACE=1
// builds it with the race detector instead, which needs a C compiler.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "lunshift-e2e")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "lunshift")
		args, cgo := []string{"build", "-trimpath", "-o", binary}, "CGO_ENABLED=0"
		if os.Getenv("LUNSHIFT_E2E_RACE") != "" {
			args, cgo = append(args, "-race"), "CGO_ENABLED=1"
		}
		build := exec.Command("go", append(args, "lunshift/cmd/lunshift")...)
		build.Env = append(os.Environ(), cgo)
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build of cmd/lunshift:", err)
			return 1
		}
		return m.Run()
	}())
}
