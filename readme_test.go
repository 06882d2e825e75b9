package overlay

import (
	"os"
	"strings"
	"testing"
)

// The program on the README's first screen is one that is built and vetted: that of examples/hello.
func TestReadmeProgram(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("examples/hello/main.go")
	if err != nil {
		t.Fatal(err)
	}
	_, shown, _ := strings.Cut(string(readme), "```go\n")
	shown, _, _ = strings.Cut(shown, "```")
	_, want, _ := strings.Cut(string(program), "\n") // without its doc comment
	if shown != want {
		t.Errorf("README.md shows\n%s\nexamples/hello is\n%s", shown, want)
	}
}
