package fsmap

import (
	"errors"
	"strconv"
)

const (
	lvmDepth   = 8
	lvmEntries = 1 << 18
	lvmName    = 128 // bytes
)

// lvmNode is a section of LVM2's metadata text: name { name = value ... }.
type lvmNode struct{ entries []lvmEntry }

// lvmEntry is a section, or values: one, or a list.
type lvmEntry struct {
	name   string
	node   *lvmNode // nil where it has values
	values []lvmValue
}

type lvmValue struct {
	text   string
	number uint64
	isText bool
}

func (n *lvmNode) find(name string) *lvmEntry {
	for i := range n.entries {
		if n.entries[i].name == name {
			return &n.entries[i]
		}
	}
	return nil
}

func (n *lvmNode) node(name string) *lvmNode {
	if e := n.find(name); e != nil {
		return e.node
	}
	return nil
}

func (n *lvmNode) list(name string) []lvmValue {
	if e := n.find(name); e != nil {
		return e.values
	}
	return nil
}

func (n *lvmNode) number(name string) (uint64, bool) {
	v := n.list(name)
	if len(v) != 1 || v[0].isText {
		return 0, false
	}
	return v[0].number, true
}

func (n *lvmNode) text(name string) string {
	if v := n.list(name); len(v) == 1 && v[0].isText {
		return v[0].text
	}
	return ""
}

// strings adds every string below n to the set.
func (n *lvmNode) strings(to map[string]bool) {
	for _, e := range n.entries {
		for _, v := range e.values {
			if v.isText {
				to[v.text] = true
			}
		}
		if e.node != nil {
			e.node.strings(to)
		}
	}
}

// lvmParser reads the text; depth and entries are bounded.
type lvmParser struct {
	rest    []byte
	entries int
}

var errLVMText = errors.New("its text cannot be read")

func parseLVM(text []byte) (*lvmNode, error) {
	p := &lvmParser{rest: text}
	return p.section(0)
}

// section reads entries up to a closing brace, or the end of the text at depth 0.
func (p *lvmParser) section(depth int) (*lvmNode, error) {
	if depth > lvmDepth {
		return nil, errLVMText
	}
	n := &lvmNode{}
	seen := map[string]bool{}
	for {
		p.space()
		if len(p.rest) == 0 {
			if depth > 0 {
				return nil, errLVMText
			}
			return n, nil
		}
		if p.rest[0] == '}' {
			p.rest = p.rest[1:]
			if depth == 0 {
				return nil, errLVMText
			}
			return n, nil
		}
		e := lvmEntry{name: p.word()}
		if e.name == "" || len(e.name) > lvmName || seen[e.name] {
			return nil, errLVMText
		}
		seen[e.name] = true
		if p.entries++; p.entries > lvmEntries {
			return nil, errLVMText
		}
		var err error
		switch {
		case p.take('{'):
			e.node, err = p.section(depth + 1)
		case p.take('='):
			e.values, err = p.values()
		default:
			err = errLVMText
		}
		if err != nil {
			return nil, err
		}
		n.entries = append(n.entries, e)
	}
}

// values reads one value, or a list in brackets.
func (p *lvmParser) values() (list []lvmValue, err error) {
	if !p.take('[') {
		v, err := p.value()
		return []lvmValue{v}, err
	}
	for !p.take(']') {
		if len(list) > 0 && !p.take(',') {
			return nil, errLVMText
		}
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		if p.entries++; p.entries > lvmEntries {
			return nil, errLVMText
		}
		list = append(list, v)
	}
	return list, nil
}

func (p *lvmParser) value() (lvmValue, error) {
	if !p.take('"') {
		w := p.word()
		n, err := strconv.ParseUint(w, 10, 64)
		if err != nil {
			if _, err := strconv.ParseFloat(w, 64); err != nil {
				return lvmValue{}, errLVMText
			}
			return lvmValue{text: w, isText: true}, nil // a number that nothing here asks for
		}
		return lvmValue{number: n}, nil
	}
	var s []byte
	for i := 0; i < len(p.rest); i++ {
		switch c := p.rest[i]; {
		case c == '"':
			p.rest = p.rest[i+1:]
			return lvmValue{text: string(s), isText: true}, nil
		case c == '\\' && i+1 < len(p.rest):
			i++
			s = append(s, p.rest[i])
		default:
			s = append(s, c)
		}
	}
	return lvmValue{}, errLVMText
}

// word takes a name or a number.
func (p *lvmParser) word() string {
	p.space()
	i := 0
	for i < len(p.rest) {
		c := p.rest[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.' || c == '+' || c == '#' && i > 0 {
			i++
			continue
		}
		break
	}
	w := string(p.rest[:i])
	p.rest = p.rest[i:]
	return w
}

// take takes a character after white space, if it is the next.
func (p *lvmParser) take(c byte) bool {
	p.space()
	if len(p.rest) > 0 && p.rest[0] == c {
		p.rest = p.rest[1:]
		return true
	}
	return false
}

// space skips white space and comments.
func (p *lvmParser) space() {
	for len(p.rest) > 0 {
		switch p.rest[0] {
		case ' ', '\t', '\n', '\r':
			p.rest = p.rest[1:]
		case '#':
			for len(p.rest) > 0 && p.rest[0] != '\n' {
				p.rest = p.rest[1:]
			}
		default:
			return
		}
	}
}
