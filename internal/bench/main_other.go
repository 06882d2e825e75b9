//go:build !linux

// Command bench measures the overlay library beside its peers, on Linux.
package main

import (
	"fmt"
	"os"
	"runtime"
)

func main() {
	fmt.Fprintf(os.Stderr, "bench: nothing to measure: the library's devices need Linux, this is %s\n", runtime.GOOS)
	os.Exit(2)
}
