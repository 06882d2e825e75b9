package overlay

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	fenced   = regexp.MustCompile("(?s)```.*?```")
	codeSpan = regexp.MustCompile("`([^`]*)`")
	pathLike = regexp.MustCompile(`/|\.(go|txt)$`)
)

// Every path that ARCHITECTURE.md names exists, and every other name is declared in the file, or under the directory, named last.
func TestArchitectureNames(t *testing.T) {
	page, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	names, where := 0, ""
	for _, span := range codeSpan.FindAllStringSubmatch(fenced.ReplaceAllString(string(page), ""), -1) {
		name := span[1]
		if pathLike.MatchString(name) {
			if _, err := os.Stat(name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			where = name
			continue
		}
		names++
		if declared, err := declares(where, name); err != nil || !declared {
			t.Errorf("%s is not declared in %q (%v)", name, where, err)
		}
	}
	if names < 40 {
		t.Errorf("only %d names found", names)
	}
}

// declares says whether a Go file, or one below a directory, declares a function or a type, "Type.Method" a method.
func declares(where, name string) (found bool, err error) {
	err = filepath.WalkDir(where, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range file.Decls {
			found = found || declaresName(d, name)
		}
		return nil
	})
	return found, err
}

func declaresName(d ast.Decl, name string) bool {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil {
			return d.Name.Name == name
		}
		receiver := d.Recv.List[0].Type
		if star, ok := receiver.(*ast.StarExpr); ok {
			receiver = star.X
		}
		return fmt.Sprintf("%v.%s", receiver, d.Name.Name) == name
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			if s, ok := spec.(*ast.TypeSpec); ok && s.Name.Name == name {
				return true
			}
		}
	}
	return false
}

// What the README and ARCHITECTURE.md link to in the tree is there.
func TestLinksOfPages(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)]+)\)`)
	for _, page := range []string{"README.md", "ARCHITECTURE.md", "CHANGELOG.md"} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(m[1]); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
	}
}
