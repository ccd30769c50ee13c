package peer

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
)

// FreePort is a loopback address that nobody listens on, its port below those that the
// kernel gives to outgoing connections: it stays free while a service is restarted.
func FreePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		address := fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000))
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address
		}
	}
	t.Fatal("no free port")
	return ""
}
