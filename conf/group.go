package conf

import (
	"fmt"
	"slices"
	"time"
)

// Group is one [[group]] table: volumes that are cut over and rolled back at one instant.
type Group struct {
	// Name is as a volume's; no volume has it.
	Name string
	// Volumes are the names of its volumes, at least one, each of one group only.
	Volumes []string
	// HoldLimit is how long commands of initiators may be held at a step, 100 ms to 1 min;
	// past it the step is undone.
	HoldLimit time.Duration
}

// Group is the group of that name; nil where there is none.
func (c *Config) Group(name string) *Group {
	i := slices.IndexFunc(c.Groups, func(g Group) bool { return g.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Groups[i]
}

// GroupOf is the group that a volume is in; nil where it is in none.
func (c *Config) GroupOf(volume string) *Group {
	i := slices.IndexFunc(c.Groups, func(g Group) bool { return slices.Contains(g.Volumes, volume) })
	if i < 0 {
		return nil
	}
	return &c.Groups[i]
}

// GroupChanges are the groups that differ, as group[name].key, or group[name] where it came
// or went.
func (c *Config) GroupChanges(to *Config) []string {
	keys := []string{}
	for _, g := range c.Groups {
		other := to.Group(g.Name)
		if other == nil {
			keys = append(keys, fmt.Sprintf("group[%s]", g.Name))
			continue
		}
		for _, key := range differing([]value{{"volumes", g.Volumes, other.Volumes}, {"hold_limit", g.HoldLimit, other.HoldLimit}}) {
			keys = append(keys, fmt.Sprintf("group[%s].%s", g.Name, key))
		}
	}
	for _, g := range to.Groups {
		if c.Group(g.Name) == nil {
			keys = append(keys, fmt.Sprintf("group[%s]", g.Name))
		}
	}
	return keys
}

func groupSettings(g *Group) []setting {
	return []setting{
		{"name", all(text(&g.Name), func() error { return checkName(g.Name) })},
		{"volumes", texts(&g.Volumes)},
		{"hold_limit", duration(&g.HoldLimit, 100*time.Millisecond, time.Minute)},
	}
}

// groups reads the [[group]] tables once the volumes are known; all of them are where
// whole is true.
func (d *decoder) groups(list []any, volumes []Volume, whole bool) []Group {
	var groups []Group
	in := map[string]string{} // the group of each volume
	for i, v := range list {
		path := fmt.Sprintf("group[%d]", i)
		m, ok := v.(map[string]any)
		if !ok {
			d.fault(path, path, fmt.Sprintf("is %s; each group opens with a line [[group]]", kindOf(v)))
			continue
		}
		g := Group{HoldLimit: 5 * time.Second}
		label := path
		if name, ok := m["name"].(string); ok && checkName(name) == nil {
			label = "group[" + name + "]"
		}
		faulty := d.table(m, path, label, groupSettings(&g))
		for _, key := range []string{"name", "volumes"} {
			if _, given := m[key]; !given {
				faulty[key] = true
				d.fault(path, label+"."+key, "is missing; every group has name and volumes")
			}
		}
		if !faulty["name"] {
			switch {
			case slices.ContainsFunc(volumes, func(v Volume) bool { return v.Name == g.Name }):
				d.fault(path+".name", label+".name", fmt.Sprintf("a volume is called %q; commands take both, so give the group another name", g.Name))
			case slices.ContainsFunc(groups, func(other Group) bool { return other.Name == g.Name }):
				d.fault(path+".name", label+".name", fmt.Sprintf("another group is called %q; give each its own name", g.Name))
			}
		}
		if !faulty["volumes"] && len(g.Volumes) == 0 {
			d.fault(path+".volumes", label+".volumes", "is empty; name the volumes that are moved together")
		}
		for _, name := range g.Volumes {
			known := slices.ContainsFunc(volumes, func(v Volume) bool { return v.Name == name })
			other, taken := in[name]
			switch {
			case !known && whole:
				d.fault(path+".volumes", label+".volumes", fmt.Sprintf("there is no volume %q", name))
			case taken && other == label:
				d.fault(path+".volumes", label+".volumes", fmt.Sprintf("names volume %s twice", name))
			case taken:
				d.fault(path+".volumes", label+".volumes", fmt.Sprintf("volume %s is in %s already; a volume is in one group at most", name, other))
			}
			in[name] = label
		}
		groups = append(groups, g)
	}
	return groups
}

// texts takes a list of texts.
func texts(to *[]string) func(any) error {
	return func(v any) error {
		list, ok := v.([]any)
		if !ok {
			return fmt.Errorf("is %s; it is a list of texts such as [\"db01\", \"db02\"]", kindOf(v))
		}
		var faults elementFaults
		for i, e := range list {
			s, ok := e.(string)
			if !ok {
				faults = append(faults, elementFault{i, fmt.Sprintf("holds %s; it is a list of texts such as [\"db01\", \"db02\"]", kindOf(e))})
				continue
			}
			*to = append(*to, s)
		}
		if len(faults) > 0 {
			return faults
		}
		return nil
	}
}
