package conf

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// keyLines tells on which line each key of a TOML document stands. Tables are
// keys too; elements of an array of tables are "volume[0]", "volume[1]" and so on.
// The text is a document that has been decoded without an error.
func keyLines(text []byte) map[string]int {
	l := &lineReader{lines: make(map[string]int), elements: make(map[string]int)}
	for at, b := range text {
		if b == '\n' {
			l.ends = append(l.ends, at)
		}
	}
	l.parser.Reset(text)
	prefix := ""
	for l.parser.NextExpression() {
		node := l.parser.Expression()
		switch node.Kind {
		case unstable.Table:
			prefix = l.walk("", node.Key(), false)
		case unstable.ArrayTable:
			prefix = l.walk("", node.Key(), true)
		case unstable.KeyValue:
			l.keyValue(prefix, node)
		}
	}
	return l.lines
}

// tableAt is the table that the key on a line belongs to, as far as the text before
// can be understood; empty for none.
func tableAt(text []byte, line int) string {
	var p unstable.Parser
	p.Reset(bytes.Clone(text))
	table := ""
	for p.NextExpression() {
		node := p.Expression()
		if node.Kind != unstable.Table && node.Kind != unstable.ArrayTable {
			continue
		}
		var parts []string
		at := 0
		for it := node.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
			at = p.Shape(it.Node().Raw).Start.Line
		}
		if at > line {
			break
		}
		table = strings.Join(parts, ".")
	}
	return table
}

type lineReader struct {
	parser unstable.Parser
	lines  map[string]int
	// ends are where the lines end: the parser would count them anew for each key.
	ends []int
	// elements counts the elements of each array of tables so far.
	elements map[string]int
}

// line is the one that a part of the text begins on.
func (l *lineReader) line(part unstable.Range) int {
	before, _ := slices.BinarySearch(l.ends, int(part.Offset))
	return before + 1
}

// walk follows a dotted key below prefix, notes its lines, and gives its path. In
// an array of tables a key means the array's last element, or with newElement the one
// that begins here.
func (l *lineReader) walk(prefix string, key unstable.Iterator, newElement bool) string {
	path := prefix
	for key.Next() {
		path = join(path, string(key.Node().Data))
		line := l.line(key.Node().Raw)
		if _, seen := l.lines[path]; !seen {
			l.lines[path] = line
		}
		if newElement && key.IsLast() {
			l.elements[path]++
		}
		if n := l.elements[path]; n > 0 {
			path = fmt.Sprintf("%s[%d]", path, n-1)
			if _, seen := l.lines[path]; !seen {
				l.lines[path] = line
			}
		}
	}
	return path
}

func (l *lineReader) keyValue(prefix string, node *unstable.Node) {
	path := l.walk(prefix, node.Key(), false)
	l.value(path, l.lines[path], node.Value())
}

// value notes the keys inside inline tables; line is where the value's key stands.
func (l *lineReader) value(path string, line int, node *unstable.Node) {
	switch node.Kind {
	case unstable.InlineTable:
		for it := node.Children(); it.Next(); {
			l.keyValue(path, it.Node())
		}
	case unstable.Array:
		i := 0
		for it := node.Children(); it.Next(); {
			if it.Node().Kind == unstable.Comment {
				continue
			}
			element := fmt.Sprintf("%s[%d]", path, i)
			at := line
			if raw := it.Node().Raw; raw.Length > 0 {
				at = l.line(raw)
			}
			l.lines[element] = at
			l.value(element, at, it.Node())
			i++
		}
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}
