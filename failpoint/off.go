//go:build !failpoint

package failpoint

// Here does nothing, and costs nothing: the compiler removes the call.
func Here(string) {}
