package control

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

// noteWidth bounds the notes of the table, in characters; the detail has them whole.
const noteWidth = 60

// barWidth is the progress bar's, in characters.
const barWidth = 40

// WriteTable writes volumes as a table, a line each.
func WriteTable(w io.Writer, volumes []proxy.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VOLUME\tPHASE\tDONE\tREMAINING\tRATE\tTIME LEFT\tSESSIONS\tSIZE\tNOTE")
	for _, v := range volumes {
		done, remaining, rate := "-", "-", "-"
		if begun(v) && v.Size > 0 {
			done = fmt.Sprintf("%.1f%%", percent(v))
			remaining = humanize.IBytes(v.Remaining)
		}
		if copies(v.Phase) {
			rate = humanize.IBytes(v.Rate) + "/s"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", v.Name, phase(v), done, remaining, rate,
			timeLeft(v), len(v.Sessions), humanize.IBytes(v.Size), shorten(note(v), noteWidth))
	}
	if len(volumes) == 0 {
		fmt.Fprintln(t, "(none)")
	}
	return t.Flush()
}

// WriteDetail writes all there is to tell about one volume.
func WriteDetail(w io.Writer, v proxy.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+"\t"+format+"\n", args...) }
	row("volume", "%s", v.Name)
	row("target", "%s LUN %d", v.IQN, v.LUN)
	row("phase", "%s%s", phase(v), since(v))
	if v.Degraded {
		row("degraded", "%s", v.DegradedReason)
	}
	if v.Identity != "" && v.Identity != proxy.IdentityOwn && v.Phase != proxy.Cutover {
		row("identity", "that of the %s, %s", v.Identity, v.Access)
	}
	row("size", "%s, blocks of %d bytes", humanize.IBytes(v.Size), v.BlockSize)
	if begun(v) {
		row("progress", "%s", bar(v))
		seen := ""
		if !v.AllocatedKnown {
			seen = " seen so far"
		}
		row("allocated", "%s%s%s", humanize.IBytes(v.Allocated), seen, told(v.Allocation))
		for _, line := range v.AllocationFound {
			row("", "%s", line)
		}
		row("copied", "%s, skipped %s", humanize.IBytes(v.Copied), humanize.IBytes(v.Skipped))
		if v.Compare {
			row("compared", "%s, equal %s", humanize.IBytes(v.Compared), humanize.IBytes(v.Equal))
		}
		row("written", "%s by initiators since the start", humanize.IBytes(v.InitiatorWritten))
	}
	if v.Mirror != nil {
		row("mirror", "%s", mirror(v.Mirror))
	} else if v.Mirrored && !begun(v) {
		row("mirror", "on from the start on")
	}
	if v.CopiedBack > 0 || v.Phase == proxy.RollingBack {
		row("copied back", "%s", humanize.IBytes(v.CopiedBack))
	}
	if copies(v.Phase) {
		row("remaining", "%s at %s/s, time left %s", humanize.IBytes(v.Remaining), humanize.IBytes(v.Rate), timeLeft(v))
	}
	if v.ChecksumErrors+v.ReadbackErrors > 0 {
		row("checksums", "%d block(s) changed in memory, %d came back wrong from the destination; copied again", v.ChecksumErrors, v.ReadbackErrors)
	}
	for i, e := range v.UnreadableRuns {
		if i == 0 {
			row("unreadable", "%s on the %s", humanize.IBytes(v.Unreadable), from(v))
		}
		if i == 10 {
			row("", "and %d other places", len(v.UnreadableRuns)-i)
			break
		}
		row("", "LBA %d, %d blocks", e.LBA, e.Blocks)
	}
	if v.AcceptedUnreadable > 0 {
		row("given up", "%s that could not be read; they read as zeroes", humanize.IBytes(v.AcceptedUnreadable))
	}
	if v.Verify != nil {
		row("verify", "%s", verified(v.Verify))
	}
	if v.Phase != proxy.Cutover {
		limit := "none"
		if v.RateLimit > 0 {
			limit = humanize.IBytes(v.RateLimit) + "/s"
		}
		row("rate limit", "%s", limit)
	}
	if v.Hold != nil {
		row(held(v), "initiators were held for %.1f ms", *v.Hold)
	}
	for _, s := range v.Dropped {
		row("dropped", "%s from %s did not log out", s.Initiator, s.Address)
	}
	row("source", "%s", unitLine(v.Source))
	row("destination", "%s", unitLine(v.Destination))
	row("sessions", "%d", len(v.Sessions))
	for _, s := range v.Sessions {
		row("", "%s from %s since %s%s", s.Initiator, s.Address, s.Since.Local().Format(time.DateTime), sessionNote(s))
	}
	if text := v.Reservation.String(); text != "" {
		row("reservation", "%s", text)
	}
	return t.Flush()
}

// begun tells whether the migration was started, as far as anybody knows.
func begun(v proxy.Status) bool { return v.Phase != proxy.Ready && v.Phase != phaseUnknown }

// told adds what tells the allocation, where that is known.
func told(allocation string) string {
	if allocation == "" {
		return ""
	}
	return ", " + allocation
}

// verifyText says on one line how a comparison ended.
func verifyText(r proxy.VerifyReport) string {
	all := "everything"
	if r.Sample {
		all = "a sample"
	}
	result := "no difference"
	if r.Different > 0 {
		result = humanize.IBytes(r.Different) + " differ"
	}
	return fmt.Sprintf("%s compared in %s (%s read of each side; %s unallocated, %s left out as free in a file system, %s as written by initiators): %s",
		all, r.EndedAt.Sub(r.StartedAt).Round(time.Millisecond), humanize.IBytes(r.Compared), humanize.IBytes(r.Unallocated), humanize.IBytes(r.Unused), humanize.IBytes(r.Written), result)
}

// WriteVerify writes the outcome of a comparison.
func WriteVerify(w io.Writer, volume string, r proxy.VerifyReport) error {
	_, err := fmt.Fprintf(w, "%s: %s\n", volume, verifyText(r))
	for _, e := range r.Extents {
		fmt.Fprintf(w, "  LBA %d, %d blocks\n", e.LBA, e.Blocks)
	}
	if r.More {
		fmt.Fprintln(w, "  and others")
	}
	return err
}

// verified says how the comparison of source and destination stands.
func verified(v *proxy.VerifyStatus) string {
	switch {
	case v.Running && v.Total > 0:
		return fmt.Sprintf("under way, %.1f%%", 100*float64(v.Done)/float64(v.Total))
	case v.Running:
		return "under way"
	}
	return comparison(v.Last)
}

// comparison is how one ended.
func comparison(v *state.Verified) string {
	what := "everything"
	if v.Sample {
		what = "a sample"
	}
	result := "no difference"
	if v.DifferentBytes > 0 {
		result = humanize.IBytes(v.DifferentBytes) + " differ"
	}
	return fmt.Sprintf("%s compared %s (%s): %s", what, v.At.Local().Format(time.DateTime), humanize.IBytes(v.ComparedBytes), result)
}

// sessionNote tells how a session came in where that is not the plain way.
func sessionNote(s target.SessionInfo) string {
	text := ""
	if s.CHAPUser != "" {
		text += ", CHAP user " + s.CHAPUser
	}
	if s.PortalGroup > 1 {
		text += fmt.Sprintf(", portal group %d", s.PortalGroup)
	}
	return text
}

// WriteLine writes one volume as one short line.
func WriteLine(w io.Writer, v proxy.Status) error {
	line := fmt.Sprintf("%s: %s", v.Name, phase(v))
	if copies(v.Phase) {
		line += fmt.Sprintf(", %.1f%% done, %s left at %s/s, time left %s", percent(v), humanize.IBytes(v.Remaining), humanize.IBytes(v.Rate), timeLeft(v))
	}
	if (v.Phase == proxy.Cutover || v.Phase == proxy.RollingBack || v.Phase == proxy.RolledBack) && v.Hold != nil {
		line += fmt.Sprintf(", initiators were held for %.1f ms", *v.Hold)
	}
	if v.Mirror != nil {
		line += ", mirror " + v.Mirror.State
	} else if v.Mirrored && !begun(v) {
		line += ", mirror on from the start on"
	}
	if n := note(v); n != "" {
		line += " (" + n + ")"
	}
	for _, s := range v.Dropped {
		line += fmt.Sprintf("\n  dropped, as it did not log out: %s from %s", s.Initiator, s.Address)
	}
	_, err := fmt.Fprintln(w, line)
	return err
}

// WriteCheck writes what check found.
func WriteCheck(w io.Writer, r CheckReport) error {
	running := "no service is running"
	if r.Running {
		running = "the service is running"
	}
	fmt.Fprintf(w, "%s: %d volume(s), %s\n", r.Config, len(r.Volumes), running)
	for _, line := range r.Refusals {
		fmt.Fprintf(w, "refused  %s\n", line)
	}
	if r.Discovery != NoProof {
		fmt.Fprintf(w, "discovery needs %s\n", map[Proof]string{CHAP: "CHAP", MutualCHAP: "mutual CHAP"}[r.Discovery])
	}
	result := "nothing would be refused"
	if len(r.Refusals) > 0 {
		result = "nothing of this volume would be refused, but see the top"
	}
	for _, v := range r.Volumes {
		fmt.Fprintln(w)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		row := func(name string, cell func(UnitReport) string) {
			fmt.Fprintf(t, "%s\t%s\t%s\n", name, known(v.Source, cell), known(v.Destination, cell))
		}
		fmt.Fprintf(t, "%s\tSOURCE\tDESTINATION\n", v.Name)
		fmt.Fprintf(t, "address\t%s\t%s\n", v.Source.Address, v.Destination.Address)
		row("size", func(u UnitReport) string { return fmt.Sprintf("%s (%d bytes)", humanize.IBytes(u.Size), u.Size) })
		row("block size", func(u UnitReport) string { return fmt.Sprintf("%d bytes", u.BlockSize) })
		row("identity", func(u UnitReport) string { return u.ID })
		row("product", func(u UnitReport) string {
			return cmp.Or(strings.Join(strings.Fields(u.Vendor+" "+u.Product+" "+u.Serial), " "), "-")
		})
		row("thin", func(u UnitReport) string { return yesNo(u.Thin) })
		row("tells allocation", func(u UnitReport) string { return yesNo(u.ReportsAllocation) })
		row("volatile cache", func(u UnitReport) string { return yesNo(u.VolatileCache) })
		if err := t.Flush(); err != nil {
			return err
		}
		t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "target\t%s LUN %d\n", v.IQN, v.LUN)
		fmt.Fprintf(t, "phase\t%s\n", v.Phase)
		writeAccess(t, v)
		if r.Running && !v.Served {
			fmt.Fprintf(t, "served\tno, the running service does not have it: restart the service to serve it\n")
		}
		if v.Source.Open && v.Destination.Open {
			atLeast := ""
			if !v.AllocatedKnown {
				atLeast = "at least "
			}
			fmt.Fprintf(t, "allocated\t%s%s of %s%s\n", atLeast, humanize.IBytes(v.Allocated), humanize.IBytes(v.Source.Size), told(v.Allocation))
			for _, line := range v.AllocationFound {
				fmt.Fprintf(t, "\t%s\n", line)
			}
		}
		if v.Estimate != nil {
			fmt.Fprintf(t, "estimate\t%s\n", estimate(v))
		}
		for _, line := range v.Refusals {
			fmt.Fprintf(t, "refused\t%s\n", line)
		}
		if len(v.Refusals) == 0 {
			fmt.Fprintf(t, "result\t%s\n", result)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// writeAccess writes who may come in, a row each.
func writeAccess(w io.Writer, v VolumeReport) {
	title := "may come in"
	if v.LoopbackOnly {
		fmt.Fprintf(w, "%s\tloopback only: initiators on this host; add a [[volume.initiator]] with name and networks for others\n", title)
	}
	for _, i := range v.Initiators {
		fmt.Fprintf(w, "%s\t%s, %s\n", title, i.who(), map[Proof]string{NoProof: "without authentication", CHAP: "CHAP", MutualCHAP: "mutual CHAP"}[i.Proof])
		title = ""
	}
	if len(v.PortalGroups) > 0 {
		fmt.Fprintf(w, "portal groups\t%s\n", strings.Trim(fmt.Sprint(v.PortalGroups), "[]"))
	}
	if v.Identity != "" && v.Identity != string(proxy.IdentityOwn) {
		fmt.Fprintf(w, "identity\tthat of the %s\n", v.Identity)
	}
	if v.Redirect != "" {
		fmt.Fprintf(w, "after cutover\tlogins are sent to %s\n", v.Redirect)
	}
	for _, line := range v.Warnings {
		fmt.Fprintf(w, "warning\t%s\n", line)
	}
}

func known(u UnitReport, cell func(UnitReport) string) string {
	if !u.Open {
		return "?"
	}
	return cell(u)
}

func estimate(v VolumeReport) string {
	assumed := "the speed at which the source was just read; load and a slower destination make it longer"
	if v.RateLimited {
		assumed = "the limit in copy.rate or service.copy.rate, if no other volume is copied then"
	}
	return fmt.Sprintf("%s at %s/s, %s", duration(time.Duration(*v.Estimate)*time.Second), humanize.IBytes(v.Rate), assumed)
}

func phase(v proxy.Status) string {
	switch {
	case v.Paused && copies(v.Phase):
		return string(v.Phase) + ", paused"
	case v.Queued > 0:
		return fmt.Sprintf("%s, queued (%d)", v.Phase, v.Queued)
	}
	return string(v.Phase)
}

func since(v proxy.Status) string {
	at := v.StartedAt
	switch v.Phase {
	case proxy.Synced:
		at = v.SyncedAt
	case proxy.Cutover:
		at = v.CutoverAt
	case proxy.RollingBack:
		at = v.RollbackAt
	case proxy.RolledBack:
		at = v.RolledBackAt
	}
	if at == nil || v.Phase == proxy.Ready {
		return ""
	}
	return " since " + at.Local().Format(time.DateTime)
}

func note(v proxy.Status) string {
	if v.Degraded {
		return v.DegradedReason
	}
	return ""
}

// mirror says how far the source follows.
func mirror(m *proxy.MirrorStatus) string {
	text := m.State
	if m.Behind > 0 {
		text += ", the source is " + humanize.IBytes(m.Behind) + " behind"
	}
	if m.Reason != "" {
		text += ": " + m.Reason
	}
	return text
}

// from is the side that is copied from.
func from(v proxy.Status) string {
	if v.Phase == proxy.RollingBack {
		return "destination"
	}
	return "source"
}

// held names the step that initiators were held for.
func held(v proxy.Status) string {
	if v.RollbackAt != nil {
		return "rollback"
	}
	return "cutover"
}

func shorten(text string, width int) string {
	if runes := []rune(text); len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return text
}

// percent is how much of the volume is valid on the destination; after a rollback, on the source.
func percent(v proxy.Status) float64 {
	if v.Size == 0 {
		return 0
	}
	return 100 * float64(v.Size-min(v.Remaining, v.Size)) / float64(v.Size)
}

func bar(v proxy.Status) string {
	full := int(percent(v) * barWidth / 100)
	return fmt.Sprintf("[%s%s] %.1f%%", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), percent(v))
}

func timeLeft(v proxy.Status) string {
	if v.ETA == nil {
		return "-"
	}
	return duration(time.Duration(*v.ETA) * time.Second)
}

// duration is a time in its two largest units.
func duration(d time.Duration) string {
	switch {
	case d < time.Second:
		return "under 1s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm %02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh %02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd %02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

func unitLine(u proxy.UnitStatus) string {
	parts := []string{u.Address, u.State}
	if u.Reason != "" {
		parts[1] += " (" + u.Reason + ")"
	}
	if p := strings.Join(strings.Fields(u.Vendor+" "+u.Product+" "+u.Serial), " "); p != "" {
		parts = append(parts, p)
	}
	if u.ID != "" {
		parts = append(parts, u.ID)
	}
	if u.Size > 0 {
		parts = append(parts, humanize.IBytes(u.Size))
	}
	if u.Thin {
		parts = append(parts, "thin")
	}
	if u.Fence != "" {
		parts = append(parts, "fence "+u.Fence)
	}
	if u.Errors > 0 {
		parts = append(parts, fmt.Sprintf("%d errors", u.Errors))
	}
	return strings.Join(parts, ", ")
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
