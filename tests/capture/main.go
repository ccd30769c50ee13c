// Command capture records what libiscsi's tools and qemu-img send to lunshift, and what tgtd
// answers to lunshift, as the seeds of the fuzz tests: target/testdata/captures and
// lun/testdata/captures. It is run from the top of the tree, after `make build`:
//
//	go run ./tests/capture
//
// What open-iscsi sends is recorded in the virtual machine of tests/vm:
//
//	LUNSHIFT_VM_CAPTURE=$PWD/target/testdata/captures make vm
//
// The secrets in the captures are the ones written here; they open nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"lunshift/tests/peer"
)

const (
	iqn    = "iqn.2026-11.net.example:db01"
	size   = 16 << 20
	user   = "app1"
	secret = "app1-opens-this-door"
	proof  = "gw-proves-who-it-is"
	// limit is how much of each direction of a connection is kept, in bytes.
	limit = 24 << 10
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "capture:", err)
		os.Exit(1)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "capture")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"source", "destination", "array"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return err
		}
	}
	for name, s := range map[string]string{"secret": secret, "proof": proof} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s+"\n"), 0o600); err != nil {
			return err
		}
	}
	return errors.Join(initiators(dir), array(dir))
}

// kept is what was kept, so that nothing is twice.
type kept map[string]bool

func (k kept) keep(dir, name string, b []byte) error {
	if len(b) == 0 || k[string(b)] {
		return nil
	}
	k[string(b)] = true
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), b, 0o644)
}

// initiators records what initiators send.
func initiators(dir string) error {
	kept := kept{}
	for _, c := range []struct {
		name, user, query string
		tools             [][]string // "PORTAL" and "URL" stand for the addresses
	}{
		{"libiscsi", "", "", [][]string{
			{"iscsi-ls", "-s", "iscsi://PORTAL"}, {"iscsi-inq", "URL"}, {"iscsi-inq", "-e", "1", "-c", "131", "URL"}, {"iscsi-readcapacity16", "URL"},
			{"qemu-img", "info", "URL"}, {"qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "discard 0 64k", "-c", "write -z 64k 64k", "-c", "read 0 4k", "-c", "flush", "URL"},
		}},
		{"libiscsi-test", "", "", suite()},
		{"libiscsi-chap", user + "%" + secret + "@", "?target_user=gw&target_password=" + proof, [][]string{{"iscsi-inq", "URL"}}},
		{"libiscsi-digest", "", "?header_digest=crc32c", [][]string{{"iscsi-inq", "URL"}, {"iscsi-readcapacity16", "URL"}}},
	} {
		err := func() error {
			more := "[[volume.initiator]]\nname = \"*\"\n"
			if c.user != "" {
				more += fmt.Sprintf("chap_user = %q\nchap_secret_file = %q\ntarget_user = \"gw\"\ntarget_secret_file = %q\n", user, filepath.Join(dir, "secret"), filepath.Join(dir, "proof"))
			}
			portal, stop, err := serve(dir, filepath.Join(dir, "source"), more)
			if err != nil {
				return err
			}
			defer stop()
			for i, tool := range c.tools {
				r, err := peer.NewRecorder("127.0.0.1:0", portal, limit)
				if err != nil {
					return err
				}
				args := append([]string{}, tool...)
				for i, a := range args {
					a = strings.ReplaceAll(a, "PORTAL", r.Portal())
					args[i] = strings.ReplaceAll(a, "URL", "iscsi://"+c.user+r.Portal()+"/"+iqn+"/0"+c.query)
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
				cancel()
				// A case of the suite may well fail; what it sent counts.
				fmt.Printf("%s: %v (%d bytes of output)\n", strings.Join(tool, " "), err, len(out))
				for k, e := range r.Finish() {
					if err := kept.keep("target/testdata/captures", fmt.Sprintf("%s-%d-%d", c.name, i+1, k+1), e.Sent); err != nil {
						return err
					}
				}
			}
			return nil
		}()
		if err != nil {
			return err
		}
	}
	return nil
}

// suite is cases of libiscsi's conformance suite, one run for each.
func suite() (tools [][]string) {
	for _, name := range []string{"CompareAndWrite.Simple", "Unmap.VPD", "PrinReadKeys.Simple", "ProutRegister.Simple", "ProutReserve.Simple",
		"ProutPreempt.RemoveRegistration", "Reserve6.Simple", "ReportSupportedOpcodes.Simple", "ExtendedCopy.Simple", "ReceiveCopyResults.CopyStatus",
		"iSCSITMF.AbortTaskSimpleAsync", "iSCSITMF.LUNResetSimpleAsync", "iSCSIcmdsn.iSCSICmdSnTooHigh", "iSCSIdatasn.iSCSIDataSnInvalid", "iSCSIResiduals.Write10Residuals",
		"WriteVerify16.Simple", "GetLBAStatus.Simple", "OrWrite.Simple"} {
		tools = append(tools, []string{"iscsi-test-cu", "-d", "-t", "ALL." + name, "URL"})
	}
	return tools
}

// array records what tgtd answers to lunshift's own initiator.
func array(dir string) error {
	d, err := peer.NewTgtd(context.Background(), dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.AddTarget(context.Background(), iqn, []peer.Unit{{Path: filepath.Join(dir, "array"), Thin: true}}); err != nil {
		return err
	}
	r, err := peer.NewRecorder("127.0.0.1:0", d.Portal(), limit)
	if err != nil {
		return err
	}
	portal, stop, err := serve(dir, "iscsi://"+r.Portal()+"/"+iqn+"/1", "[[volume.initiator]]\nname = \"*\"\n")
	if err != nil {
		return err
	}
	out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write -P 7 0 16k", "-c", "discard 0 16k", "-c", "read 0 4k", "-c", "flush",
		"iscsi://"+portal+"/"+iqn+"/0").CombinedOutput()
	stop()
	if err != nil {
		return fmt.Errorf("qemu-io: %w: %s", err, out)
	}
	kept := kept{}
	for i, e := range r.Finish() {
		if err := kept.keep("lun/testdata/captures", fmt.Sprintf("tgtd-%d", i+1), e.Answered); err != nil {
			return err
		}
	}
	return nil
}

// serve runs lunshift over source until stop is called.
func serve(dir, source, more string) (portal string, stop func(), err error) {
	state, err := os.MkdirTemp(dir, "state")
	if err != nil {
		return "", nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	portal = l.Addr().String()
	l.Close()
	file := filepath.Join(state, "lunshift.toml")
	err = os.WriteFile(file, fmt.Appendf(nil, "[service]\nportals = [%q]\ncontrol = %q\nhttp = \"\"\nstate = %q\n[[volume]]\nname = \"db01\"\niqn = %q\nsource = %q\ndestination = %q\n%s",
		portal, filepath.Join(state, "control"), filepath.Join(state, "flags"), iqn, source, filepath.Join(dir, "destination"), more), 0o600)
	if err != nil {
		return "", nil, err
	}
	cmd := exec.Command("bin/lunshift", "serve", "--config", file)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() { cmd.Process.Signal(os.Interrupt); cmd.Wait() }
	for range 100 {
		if c, err := net.Dial("tcp", portal); err == nil {
			c.Close()
			return portal, stop, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	stop()
	return "", nil, fmt.Errorf("nobody listens on %s", portal)
}
