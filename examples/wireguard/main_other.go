//go:build !linux

// Wireguard needs Linux.
package main

import (
	"fmt"
	"os"
	"runtime"
)

func main() {
	fmt.Fprintf(os.Stderr, "wireguard: needs Linux for its TUN device, this is %s\n", runtime.GOOS)
	os.Exit(1)
}
