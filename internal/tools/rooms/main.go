// Command rooms holds the architecture: which file may import what, and how long a function and a file may be.
// It reads every Go file below the directory it is started in, whatever its build constraints, and exits 1 if one breaks a rule.
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	broken, err := run(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "rooms:", err)
		os.Exit(2)
	}
	for _, line := range broken {
		fmt.Println(line)
	}
	if len(broken) > 0 {
		os.Exit(1)
	}
}

// run checks the tree below root and returns a line for each rule broken.
func run(root string) ([]string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	std, err := standardLibrary()
	if err != nil {
		return nil, err
	}
	files, err := sources(root)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no Go file below %s", root)
	}
	checkImports, err := importRules(root, std)
	if err != nil {
		return nil, err
	}
	var broken []string
	for _, s := range files {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, s.path, nil, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			return nil, err
		}
		report := func(pos token.Pos, message string) {
			p := fset.Position(pos)
			name, err := filepath.Rel(root, p.Filename)
			if err != nil {
				name = p.Filename
			}
			broken = append(broken, fmt.Sprintf("%s:%d: %s", name, p.Line, message))
		}
		if !ast.IsGenerated(f) {
			checkLengths(root, fset, f, report)
		}
		if s.nested {
			continue
		}
		if err := checkImports(fset, f, report); err != nil {
			return nil, err
		}
	}
	return broken, nil
}

type source struct {
	path   string
	nested bool // in a module of its own: its imports are its own affair
}

// sources lists the Go files that the go command would look at, those of nested modules too.
func sources(root string) ([]source, error) {
	var files []source
	nested := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if !d.IsDir() {
			if strings.HasSuffix(name, ".go") {
				files = append(files, source{path, nested[filepath.Dir(path)]})
			}
			return nil
		}
		if path == root {
			return nil
		}
		if name == "testdata" || name == "vendor" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
			return filepath.SkipDir
		}
		_, err = os.Stat(filepath.Join(path, "go.mod"))
		nested[path] = err == nil || nested[filepath.Dir(path)]
		return nil
	})
	return files, err
}
