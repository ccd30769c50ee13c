package control

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"lunshift/proxy"
	"lunshift/state"
)

// WriteReport writes a report as Markdown.
func WriteReport(w io.Writer, r Report) error {
	b := &markdown{}
	b.line("# Migration of volume %s", b.text(r.Name))
	b.line("")
	b.line("%s", reportSummary(b, r))
	b.reportVolume(r)
	b.reportUnits(r)
	b.reportTimes(r)
	b.reportData(r)
	b.reportVerified(r)
	b.reportChecksums(r)
	b.reportSessions(r)
	b.heading("Faults that are on")
	for _, fault := range r.Faults {
		b.line("- %s", b.text(fault))
	}
	if len(r.Faults) == 0 {
		b.line("None.")
	}
	b.reportHistory(r)
	_, err := w.Write(b.Bytes())
	return err
}

// markdown is a text in Markdown. What comes from outside passes text.
type markdown struct{ bytes.Buffer }

func (b *markdown) line(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }

func (b *markdown) heading(format string, args ...any) { b.line("\n## "+format+"\n", args...) }

// table writes a table; its cells are Markdown already.
func (b *markdown) table(head []string, rows [][]string) {
	b.line("| %s |", strings.Join(head, " | "))
	b.line("|%s", strings.Repeat("---|", len(head)))
	for _, row := range rows {
		b.line("| %s |", strings.Join(row, " | "))
	}
}

// text is a text from outside on one line, so that none of it is taken for Markdown or HTML.
func (*markdown) text(s string) string {
	s = strings.Join(strings.Fields(printable(s)), " ")
	return strings.NewReplacer(`\`, `\\`, "|", `\|`, "`", "\\`", "*", `\*`, "_", `\_`, "[", `\[`, "]", `\]`, "#", `\#`, "~", `\~`, "<", "&lt;", ">", "&gt;", "&", "&amp;").Replace(s)
}

// reportTime is a time for a ticket, with its zone.
func reportTime(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 -07:00") }

// exact is a size for people, and in bytes.
func exact(n uint64) string { return fmt.Sprintf("%s (%d bytes)", humanize.IBytes(n), n) }

func reportSummary(b *markdown, r Report) string {
	ended := map[proxy.Phase]string{
		proxy.Ready:       "Not started.",
		proxy.Migrating:   "Under way: blocks are being copied, and both logical units are in use.",
		proxy.Synced:      "Everything is on the destination; going back is possible until the cutover.",
		proxy.Cutover:     "Done: the destination stands alone.",
		proxy.RollingBack: "Being undone: blocks are being copied back, and both logical units are in use.",
		proxy.RolledBack:  "Undone: the source has everything.",
	}[r.Phase]
	if ended == "" {
		ended = "Phase " + b.text(string(r.Phase)) + "."
	}
	if r.Paused {
		ended += " The copy is paused."
	}
	if r.Removed {
		ended += " The volume is removed; this is how it ended."
	}
	return fmt.Sprintf("%s As of %s.", ended, reportTime(r.WrittenAt))
}

func (b *markdown) reportVolume(r Report) {
	rows := [][]string{
		{"phase", string(r.Phase)},
		{"target", fmt.Sprintf("%s LUN %d", b.text(r.IQN), r.LUN)},
		{"size", fmt.Sprintf("%s, logical blocks of %d bytes", exact(r.Size), r.BlockSize)},
	}
	if r.Identity != "" {
		rows = append(rows, []string{"identity shown to initiators", string(r.Identity)})
	}
	rows = append(rows, []string{"lunshift", b.text(strings.Join(r.Versions, ", then "))})
	for _, e := range r.Asked {
		rows = append(rows, []string{steps[e.What] + " asked for by", fmt.Sprintf("%s at %s", b.text(who(e.Who)), reportTime(e.At))})
	}
	b.heading("Volume")
	b.table([]string{"", ""}, rows)
}

func (b *markdown) reportUnits(r Report) {
	row := func(name string, cell func(ReportUnit) string) []string {
		cells := []string{name}
		for _, u := range []ReportUnit{r.Source, r.Destination} {
			text := cell(u)
			if text == "" {
				text = "-"
			}
			cells = append(cells, text)
		}
		return cells
	}
	b.heading("Logical units")
	b.table([]string{"", "source", "destination"}, [][]string{
		row("address", func(u ReportUnit) string { return b.text(u.Address) }),
		row("vendor", func(u ReportUnit) string { return b.text(u.Vendor) }),
		row("product", func(u ReportUnit) string { return b.text(u.Product) }),
		row("serial number", func(u ReportUnit) string { return b.text(u.Serial) }),
		row("identity", func(u ReportUnit) string { return b.text(u.ID) }),
		row("size", func(u ReportUnit) string {
			if u.Size == 0 {
				return ""
			}
			return exact(u.Size)
		}),
		row("logical block", func(u ReportUnit) string { return fmt.Sprintf("%d bytes", r.BlockSize) }),
		row("thin", func(u ReportUnit) string { return yesNo(u.Thin) }),
	})
}

func (b *markdown) reportTimes(r Report) {
	b.heading("Times")
	if len(r.Phases) == 0 {
		b.line("It was not started.")
		return
	}
	var rows [][]string
	for _, p := range r.Phases {
		until, took := "-", "-"
		if p.Until != nil {
			until = reportTime(*p.Until)
		}
		if p.Phase.Moving() {
			took = reportDuration(p.Seconds)
			if p.Until == nil {
				took += " so far"
			}
		}
		rows = append(rows, []string{string(p.Phase), reportTime(p.Since), until, took})
	}
	b.table([]string{"phase", "since", "until", "duration"}, rows)
	if r.Hold != nil {
		step := "cutover"
		if last := r.Phases[len(r.Phases)-1].Phase; last == proxy.RollingBack || last == proxy.RolledBack {
			step = "rollback"
		}
		b.line("\nCommands of initiators were held for %.1f ms at the %s.", *r.Hold, step)
	}
}

func reportDuration(seconds float64) string {
	if d := time.Duration(seconds * float64(time.Second)); d >= time.Minute {
		return duration(d)
	}
	return fmt.Sprintf("%.1fs", seconds)
}

func (b *markdown) reportData(r Report) {
	rows := [][]string{}
	row := func(name string, n uint64) { rows = append(rows, []string{name, exact(n)}) }
	row("allocated on the source", r.Bytes.Allocated)
	if r.Bytes.CompareCopy {
		row("compared", r.Bytes.Compared)
		row("equal", r.Bytes.Equal)
		row("written to the destination, as it differed", r.Bytes.Copied)
	} else {
		row("copied", r.Bytes.Copied)
	}
	row("skipped as unallocated or zero", r.Bytes.Skipped)
	row("left out as free in a file system", r.Bytes.Unused)
	row("blocks that initiators wrote", r.Bytes.InitiatorWritten)
	row("copied back to the source", r.Bytes.CopiedBack)
	row("remaining", r.Bytes.Remaining)
	row("unreadable", r.Bytes.Unreadable)
	row("given up as unreadable", r.Bytes.Accepted)
	if r.Rate != nil {
		rows = append(rows, []string{"average rate, with pauses", humanize.IBytes(*r.Rate) + "/s"})
	}
	text := "not used"
	if r.MirrorUsed {
		text = "used"
	}
	if r.Mirror != nil {
		text += ", now " + mirror(r.Mirror)
	}
	rows = append(rows, []string{"mirror", b.text(text)})
	b.heading("Data")
	b.table([]string{"", ""}, rows)
	for _, list := range []struct {
		what string
		runs []proxy.BlockRun
	}{{"Unreadable", r.Unreadable}, {"Given up as unreadable; reads as zeroes", r.AcceptedUnreadable}} {
		if len(list.runs) == 0 {
			continue
		}
		b.line("\n%s:\n", list.what)
		for _, e := range list.runs {
			b.line("- LBA %d, %d blocks", e.LBA, e.Blocks)
		}
	}
	if r.UnreadableLeftOut > 0 {
		b.line("\nAnd %d other places.", r.UnreadableLeftOut)
	}
}

func (b *markdown) reportVerified(r Report) {
	b.heading("Comparison of source and destination")
	var rows [][]string
	for _, x := range []struct {
		what string
		v    *state.Verified
	}{{"everything", r.Verified.All}, {"a sample", r.Verified.Sample}} {
		if x.v == nil {
			rows = append(rows, []string{x.what, "never", "-", "-", "-", "-", "-"})
			continue
		}
		result := "no difference"
		if x.v.DifferentBytes > 0 {
			result = "**" + exact(x.v.DifferentBytes) + " differ**"
		}
		rows = append(rows, []string{x.what, reportTime(x.v.At), result, exact(x.v.ComparedBytes), exact(x.v.UnallocatedBytes), exact(x.v.UnusedBytes), exact(x.v.WrittenBytes)})
	}
	b.table([]string{"last of", "ended", "result", "read of each side", "unallocated on both", "left out as free", "not compared: written by initiators, or given up"}, rows)
}

func (b *markdown) reportChecksums(r Report) {
	b.heading("Checksums")
	c := r.Checksums
	switch {
	case c == nil:
		b.line("None: everything was never compared (`lunshift verify`).")
		return
	case c.Withheld != "":
		b.line("None: %s.", b.text(c.Withheld))
		return
	}
	b.line("As of %s: %s", reportTime(c.At), b.text(r.ChecksumsCover))
	b.line("\nTo make one again from the destination, as long as nobody writes to it:\n")
	b.line("```sh\ndd if=DISK bs=1M iflag=skip_bytes,count_bytes,fullblock skip=FROM count=LENGTH status=none | sha256sum\n```\n")
	var rows [][]string
	bs := uint64(r.BlockSize)
	for i := 0; i < len(c.Extents); i++ {
		x := c.Extents[i]
		// What has none for one reason is one row.
		for x.SHA256 == "" && i+1 < len(c.Extents) && c.Extents[i+1].Uncovered == x.Uncovered {
			i++
			x.Blocks += c.Extents[i].Blocks
		}
		sum := "`" + x.SHA256 + "`"
		if x.SHA256 == "" {
			sum = "not covered: " + b.text(x.Uncovered)
		}
		rows = append(rows, []string{fmt.Sprint(x.LBA), fmt.Sprint(x.Blocks), fmt.Sprint(x.LBA * bs), fmt.Sprint(x.Blocks * bs), sum})
	}
	b.table([]string{"LBA", "blocks", "FROM (bytes)", "LENGTH (bytes)", "SHA-256"}, rows)
}

func (b *markdown) reportSessions(r Report) {
	if len(r.Sessions)+len(r.Dropped) == 0 {
		return
	}
	b.heading("Sessions of initiators")
	for _, x := range r.Sessions {
		b.line("- %s", b.text(fmt.Sprintf("%s from %s since %s%s", x.Initiator, x.Address, reportTime(x.Since), sessionNote(x))))
	}
	for _, x := range r.Dropped {
		b.line("- %s", b.text(fmt.Sprintf("%s from %s was dropped by the cutover, as it did not log out", x.Initiator, x.Address)))
	}
}

func (b *markdown) reportHistory(r Report) {
	b.heading("History")
	if r.HistoryLeftOut > 0 {
		b.line("The newest %d events; `lunshift history` has %d older ones.\n", len(r.History), r.HistoryLeftOut)
	}
	var rows [][]string
	for _, e := range r.History {
		rows = append(rows, []string{reportTime(e.At), b.text(who(e.Who)), b.text(what(e)), b.text(result(e))})
	}
	b.table([]string{"time", "who", "what", "result"}, rows)
}
