package overlay

import (
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
)

// TestMain takes the tests to namespaces of their own. Helpers register themselves in init, next to the tests that use them.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
