package stage

import (
	"strings"
	"testing"
)

func TestWriteTable(t *testing.T) {
	var out strings.Builder
	WriteTable(&out, []Column{{Title: "NAME"}, {Title: "RTT", Right: true}, {Title: "LAST"}},
		[][]string{{"a", "7 µs", "x"}, {"longer", "12 µs", ""}})
	const want = "NAME      RTT  LAST\na        7 µs  x\nlonger  12 µs\n"
	if out.String() != want {
		t.Errorf("table:\n%s\nwant:\n%s", out.String(), want)
	}
}
