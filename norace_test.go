//go:build !race

package overlay

// raceEnabled says whether the race detector slows the tests down.
const raceEnabled = false
