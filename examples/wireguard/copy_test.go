package main

import (
	imports "go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// What is copied elsewhere can use no internal package.
func TestImportsArePublic(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := imports.ParseFile(token.NewFileSet(), name, nil, imports.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			if strings.Contains(i.Path.Value, "/internal/") {
				t.Errorf("%s imports %s", name, i.Path.Value)
			}
		}
	}
}
