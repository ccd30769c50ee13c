package peer

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A test that ends by -timeout runs no cleanup.
func TestToolEndsWithTheTestThatRunsIt(t *testing.T) {
	const variable = "LUNSHIFT_TEST_PID_FILE"
	if file := os.Getenv(variable); file != "" {
		Run(t.Context(), "sh", "-c", `echo $$ >"$0.new" && mv "$0.new" "$0" && exec sleep 600`, file)
		return
	}
	file := filepath.Join(t.TempDir(), "pid")
	self := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	self.Env = append(os.Environ(), variable+"="+file)
	self.SysProcAttr = dieWithTest()
	if err := self.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { self.Process.Kill(); self.Wait() })
	until := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("waited in vain for %s", what)
			}
		}
	}
	var pid int
	until("the tool", func() bool {
		b, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		_, err = fmt.Sscan(string(b), &pid)
		return err == nil
	})
	self.Process.Kill()
	until("the end of the tool", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(b, []byte(") Z "))
	})
}
