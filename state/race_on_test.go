//go:build race

package state

// raceEnabled says that the race detector slows the tests down.
const raceEnabled = true
