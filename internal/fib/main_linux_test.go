package fib

import (
	"os"
	"testing"

	"example.com/overlay/internal/nstest"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
