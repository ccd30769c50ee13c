package conf

import "reflect"

// value is a setting by its key, in two configurations.
type value struct {
	key  string
	a, b any
}

func differing(values []value) []string {
	keys := []string{}
	for _, v := range values {
		if !reflect.DeepEqual(v.a, v.b) {
			keys = append(keys, v.key)
		}
	}
	return keys
}

// Changes are the keys of settings that differ, as the file has them below [service]. A
// secret counts where it was changed, not where it is kept.
func (s Service) Changes(to Service) []string {
	l, m := s.Limits, to.Limits
	return differing([]value{
		{"portals", s.Portals, to.Portals},
		{"control", s.Control, to.Control},
		{"http", s.HTTP, to.HTTP},
		{"state", s.State, to.State},
		{"log_level", s.LogLevel, to.LogLevel},
		{"log_format", s.LogFormat, to.LogFormat},
		{"initiator_name", s.InitiatorName, to.InitiatorName},
		{"login_timeout", s.LoginTimeout, to.LoginTimeout},
		{"io_timeout", s.IOTimeout, to.IOTimeout},
		{"shutdown_timeout", s.ShutdownTimeout, to.ShutdownTimeout},
		{"discovery", s.Discovery, to.Discovery},
		{"copy.parallel", s.Copy.Parallel, to.Copy.Parallel},
		{"copy.rate", s.Copy.Rate, to.Copy.Rate},
		{"limits.connections", l.Connections, m.Connections},
		{"limits.connections_per_address", l.ConnectionsPerAddress, m.ConnectionsPerAddress},
		{"limits.connections_logging_in", l.ConnectionsLoggingIn, m.ConnectionsLoggingIn},
		{"limits.sessions_per_volume", l.SessionsPerVolume, m.SessionsPerVolume},
		{"limits.commands_per_session", l.CommandsPerSession, m.CommandsPerSession},
		{"limits.bytes_in_flight", l.BytesInFlight, m.BytesInFlight},
		{"limits.initiator_login_timeout", l.InitiatorLoginTimeout, m.InitiatorLoginTimeout},
		{"limits.login_failures", l.LoginFailures, m.LoginFailures},
		{"limits.data_timeout", l.DataTimeout, m.DataTimeout},
		{"limits.nop_interval", l.NopInterval, m.NopInterval},
		{"limits.max_recv_data_segment_length", l.MaxRecvDataSegmentLength, m.MaxRecvDataSegmentLength},
		{"limits.max_burst_length", l.MaxBurstLength, m.MaxBurstLength},
		{"limits.first_burst_length", l.FirstBurstLength, m.FirstBurstLength},
		{"limits.max_outstanding_r2t", l.MaxOutstandingR2T, m.MaxOutstandingR2T},
		{"limits.text_length", l.TextLength, m.TextLength},
		{"limits.flag_memory", l.FlagMemory, m.FlagMemory},
	})
}

// Changes are the keys of settings that differ, as the file has them below [[volume]].
func (v Volume) Changes(to Volume) []string {
	return differing([]value{
		{"name", v.Name, to.Name},
		{"iqn", v.IQN, to.IQN},
		{"lun", v.LUN, to.LUN},
		{"source", v.Source.Address, to.Source.Address},
		{"source_secret_file", v.Source.Secret, to.Source.Secret},
		{"source_target_secret_file", v.Source.TargetSecret, to.Source.TargetSecret},
		{"destination", v.Destination.Address, to.Destination.Address},
		{"destination_secret_file", v.Destination.Secret, to.Destination.Secret},
		{"destination_target_secret_file", v.Destination.TargetSecret, to.Destination.TargetSecret},
		{"sessions", v.Sessions, to.Sessions},
		{"digests", v.Digests, to.Digests},
		{"autostart", v.Autostart, to.Autostart},
		{"verify", v.Verify, to.Verify},
		{"verify_sample", v.VerifySample, to.VerifySample},
		{"allocation", v.Allocation, to.Allocation},
		{"destination_cache", v.DestinationCache, to.DestinationCache},
		{"overwrite", v.Overwrite, to.Overwrite},
		{"seeded", v.Seeded, to.Seeded},
		{"mirror", v.Mirror, to.Mirror},
		{"region_size", v.RegionSize, to.RegionSize},
		{"file_block_size", v.FileBlockSize, to.FileBlockSize},
		{"copy.depth", v.Copy.Depth, to.Copy.Depth},
		{"copy.rate", v.Copy.Rate, to.Copy.Rate},
		{"copy.priority", v.Copy.Priority, to.Copy.Priority},
		{"initiator", v.Initiators, to.Initiators},
		{"portal_groups", v.PortalGroups, to.PortalGroups},
		{"reservation_by", v.ReservationBy, to.ReservationBy},
		{"identity", v.Identity, to.Identity},
		{"redirect", v.Redirect, to.Redirect},
		{"redirect_for", v.RedirectFor, to.RedirectFor},
		{"logout_timeout", v.LogoutTimeout, to.LogoutTimeout},
		{"hooks.before_start", v.Hooks.BeforeStart, to.Hooks.BeforeStart},
		{"hooks.after_synced", v.Hooks.AfterSynced, to.Hooks.AfterSynced},
		{"hooks.before_cutover", v.Hooks.BeforeCutover, to.Hooks.BeforeCutover},
		{"hooks.after_cutover", v.Hooks.AfterCutover, to.Hooks.AfterCutover},
		{"hooks.before_rollback", v.Hooks.BeforeRollback, to.Hooks.BeforeRollback},
		{"hooks.after_rollback", v.Hooks.AfterRollback, to.Hooks.AfterRollback},
		{"hooks.timeout", v.Hooks.Timeout, to.Hooks.Timeout},
	})
}
