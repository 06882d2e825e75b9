//go:build !linux

// Bgpmesh needs Linux.
package main

import (
	"fmt"
	"os"
	"runtime"
)

func main() {
	fmt.Fprintf(os.Stderr, "bgpmesh: needs Linux for its network namespaces and TUN devices, this is %s\n", runtime.GOOS)
	os.Exit(1)
}
