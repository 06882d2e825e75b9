package stage

import (
	"fmt"
	"time"
)

// Patience is how long anything may take that normally takes no time.
const Patience = 5 * time.Second

// Await waits for something that the kernel, or another program, does in its own time.
func Await(what string, done func() (bool, error)) error {
	for deadline := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		switch ok, err := done(); {
		case err != nil:
			return fmt.Errorf("wait for %s: %w", what, err)
		case ok:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("waited %v for %s", Patience, what)
		}
	}
}
