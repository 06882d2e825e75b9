package overlay

import (
	"flag"
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
)

var (
	long = flag.Duration("long", 0, "how long the kernel oracle runs and checked traffic goes; 0: some seconds, as befits a change")
	seed = flag.Uint64("seed", 0, "seed of the kernel oracle; 0: one of the clock")
)

// TestMain takes the tests to namespaces of their own. Helpers register themselves in init, next to the tests that use them.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
