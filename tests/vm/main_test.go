package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The files that the outer process made for the one inside the namespace.
var (
	lunshift string // the static binary
	image    Image
)

const inside = "LUNSHIFT_VM_INSIDE"

// app1 is the name of the guest's initiator.
const app1 = "iqn.1993-08.org.debian:01:app1"

// TestMain makes what the tests need, and runs them in namespaces of their own.
func TestMain(m *testing.M) {
	if prefix, ok := os.LookupEnv(onGuest); ok {
		os.Exit(runOnGuest(prefix, os.Args[len(os.Args)-1]))
	}
	if os.Getenv("LUNSHIFT_VM") == "" {
		fmt.Println("LUNSHIFT_VM is not set, so no virtual machine runs: make vm")
		os.Exit(0)
	}
	if dir := os.Getenv(inside); dir != "" {
		if err := network(); err != nil {
			fmt.Fprintln(os.Stderr, "vm:", err)
			os.Exit(1)
		}
		lunshift = filepath.Join(dir, "lunshift")
		image = Image{Kernel: os.Getenv(inside + "_KERNEL"), Disk: filepath.Join(dir, "initrd.gz")}
		os.Exit(m.Run())
	}
	code, err := outer()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		code = 1
	}
	os.Exit(code)
}

// outer builds everything, for which it needs the real network and users, and runs this
// program again inside.
func outer() (int, error) {
	dir, err := os.MkdirTemp("", "lunshift-vm")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	for name, pkg := range map[string]string{"lunshift": "lunshift/cmd/lunshift", "agent": "lunshift/tests/vm/agent"} {
		build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build of %s: %w: %s", pkg, err, out)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return 1, err
	}
	img, err := MakeImage(filepath.Join(cache, "lunshift-vm"), dir, filepath.Join(dir, "agent"), app1)
	if err != nil {
		return 1, err
	}
	self := exec.Command("/proc/self/exe", os.Args[1:]...)
	self.Env = append(os.Environ(), inside+"="+dir, inside+"_KERNEL="+img.Kernel)
	self.Stdout, self.Stderr = os.Stdout, os.Stderr
	self.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	err = self.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// tap is the interface between the guest and everything else.
const tap = "tap0"

func network() error {
	for _, args := range []string{
		"link set lo up",
		"tuntap add dev " + tap + " mode tap",
		"addr add 10.0.0.20/24 dev " + tap, // lunshift
		"addr add 10.0.0.21/24 dev " + tap, // lunshift, through the recorder
		"addr add 10.0.0.5/24 dev " + tap,  // the old array
		"addr add 10.0.0.9/24 dev " + tap,  // the new array
		"link set " + tap + " up",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
}
