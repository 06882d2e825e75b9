package main

import (
	"bytes"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

const (
	plotColumns = 3
	panelWidth  = 9 * vg.Centimeter
	barHeight   = 0.5 * vg.Centimeter
	panelFrame  = 2 * vg.Centimeter // title and axis
)

var (
	oursColor  = color.RGBA{R: 0x2a, G: 0x6f, B: 0xb0, A: 0xff}
	peersColor = color.RGBA{R: 0xc3, G: 0xcc, B: 0xd6, A: 0xff}
	inkColor   = color.RGBA{R: 0x44, G: 0x4b, B: 0x55, A: 0xff}
)

// drawSuites writes a chart of each suite to SUITE.svg: a panel for each case with the first of its metrics, each way's median as a
// bar and the middle half of its samples as an error bar.
func drawSuites(dir string, results []*result) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	for _, s := range suites {
		var panels []*plot.Plot
		bars := 0
		for _, r := range results {
			if r.suite != s.name {
				continue
			}
			p, n, err := panel(r)
			if err != nil {
				return err
			}
			if n > 0 {
				panels, bars = append(panels, p), max(bars, n)
			}
		}
		if len(panels) == 0 {
			continue
		}
		if err := drawPanels(filepath.Join(dir, s.name+".svg"), panels, bars); err != nil {
			return err
		}
	}
	return nil
}

func drawPanels(path string, panels []*plot.Plot, bars int) error {
	columns := min(plotColumns, len(panels))
	rows := (len(panels) + columns - 1) / columns
	canvas := vgsvg.New(panelWidth*vg.Length(columns), (barHeight*vg.Length(bars)+panelFrame)*vg.Length(rows))
	tiles := draw.Tiles{Rows: rows, Cols: columns, PadX: vg.Millimeter * 4, PadY: vg.Millimeter * 4, PadLeft: vg.Millimeter, PadTop: vg.Millimeter * 2, PadRight: vg.Millimeter * 3}
	whole := draw.New(canvas)
	whole.SetColor(color.White) // readable on dark pages too
	whole.Fill(whole.Rectangle.Path())
	grid := make([][]*plot.Plot, rows)
	for i := range grid {
		grid[i] = make([]*plot.Plot, columns)
		copy(grid[i], panels[i*columns:min((i+1)*columns, len(panels))])
	}
	for i, line := range plot.Align(grid, tiles, whole) {
		for j, tile := range line {
			if grid[i][j] != nil {
				grid[i][j].Draw(tile)
			}
		}
	}
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return err
	}
	// Where a viewer lacks the font, others of the same widths come first.
	named := bytes.ReplaceAll(svg.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	return os.WriteFile(path, named, 0o666)
}

// newPlot makes one of a font whose widths most viewers know, if by another name.
func newPlot() *plot.Plot {
	p := plot.New()
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label} {
		style.Font.Variant = "Sans"
		style.Font.Size = vg.Points(8)
	}
	p.Title.TextStyle.Font.Size = vg.Points(10)
	p.Title.Padding = vg.Points(6)
	return p
}

// panel draws a case: ours at the top. n is how many bars it has.
func panel(r *result) (p *plot.Plot, n int, err error) {
	var names []string
	var values, mine plotter.Values
	var points plotter.XYs
	var errs plotter.XErrors
	for way, name := range slices.Backward(r.ways) {
		s := summarize(r.samples[way][0])
		if s.N == 0 {
			continue
		}
		names = append(names, name)
		own := 0.0
		if name == ours {
			own = s.Median
		}
		values, mine = append(values, s.Median), append(mine, own)
		points = append(points, plotter.XY{X: s.Median, Y: float64(len(names) - 1)})
		errs = append(errs, struct{ Low, High float64 }{s.Low - s.Median, s.High - s.Median})
	}
	if len(names) == 0 {
		return nil, 0, nil
	}
	p = newPlot()
	p.Title.Text = r.name
	p.X.Label.Text = fmt.Sprintf("%s, %s", r.metrics[0].name, r.metrics[0].unit)
	p.X.Min = 0
	for _, series := range []struct {
		values plotter.Values
		color  color.Color
	}{{values, peersColor}, {mine, oursColor}} {
		chart, err := plotter.NewBarChart(series.values, barHeight*0.6)
		if err != nil {
			return nil, 0, err
		}
		chart.Horizontal, chart.Color, chart.LineStyle.Width = true, series.color, 0
		p.Add(chart)
	}
	whiskers, err := plotter.NewXErrorBars(struct {
		plotter.XYs
		plotter.XErrors
	}{points, errs})
	if err != nil {
		return nil, 0, err
	}
	whiskers.Color, whiskers.CapWidth = inkColor, vg.Points(3)
	p.Add(whiskers)
	p.NominalY(names...)
	p.Y.Padding = vg.Points(10) // where the viewer's letters are wider all the same
	p.X.Min, p.X.Max = 0, p.X.Max*1.03
	return p, len(names), nil
}
