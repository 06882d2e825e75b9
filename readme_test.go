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

// Each row of the table beside others says for each of the five where to look; what it says of us is in the tree.
func TestReadmeTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "\n|---|---|---|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(table, "\n")
	if len(rows) < 10 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, row := range rows {
		cells := strings.Split(strings.Trim(row, "|"), "|")
		places := strings.Split(cells[len(cells)-1], ";")
		if len(cells) != 7 || len(places) != 5 {
			t.Errorf("%d cells, %d places: %s", len(cells), len(places), row)
		}
		for place := range strings.SplitSeq(places[0], ",") {
			if file := strings.TrimSpace(place); file != "–" {
				if _, err := os.Stat(file); err != nil {
					t.Errorf("%v: %s", err, row)
				}
			}
		}
	}
}
