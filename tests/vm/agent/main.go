// Command agent runs in the guest: each connection to port 5000 is one shell script, up to
// its end of file; it answers with what the script wrote and, on a last line, its status.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
)

func main() {
	l, err := net.Listen("tcp", ":5000")
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
	fmt.Println("agent: listening")
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
		go serve(c)
	}
}

func serve(c net.Conn) {
	defer c.Close()
	script, err := io.ReadAll(c)
	if err != nil {
		return
	}
	cmd := exec.Command("/bin/sh", "-c", string(script))
	// A file rather than the connection: what the script leaves behind in the background
	// holds nothing up.
	out, err := os.CreateTemp("", "out")
	if err != nil {
		fmt.Fprintf(c, "%v\nstatus 127\n", err)
		return
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	status := 0
	if err := cmd.Run(); err != nil {
		status = cmd.ProcessState.ExitCode()
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		fmt.Fprintf(c, "%v\nstatus 127\n", err)
		return
	}
	io.Copy(c, out)
	fmt.Fprintf(c, "\nstatus %d\n", status)
}
