package bpf

import "crypto/sha256"

// Build identifies the embedded object files: programs with the same build are
// the same programs.
func Build() [16]byte {
	h := sha256.New()
	h.Write(_DatapathBytes)
	h.Write(_GuardBytes)
	return [16]byte(h.Sum(nil))
}

// MessageLabels names each enum message_outcome for people, JSON and metrics.
var MessageLabels = [...]string{
	DatapathMessageOutcomeMESSAGE_REDIRECTED:     "redirected",
	DatapathMessageOutcomeMESSAGE_NOT_ENROLLED:   "not_enrolled",
	DatapathMessageOutcomeMESSAGE_PLAIN:          "plain",
	DatapathMessageOutcomeMESSAGE_LOST_RACE:      "lost_race",
	DatapathMessageOutcomeMESSAGE_RECORD_MISSING: "record_missing",
	DatapathMessageOutcomeMESSAGE_UNACKNOWLEDGED: "unacknowledged",
	DatapathMessageOutcomeMESSAGE_NOT_READ:       "not_read",
	DatapathMessageOutcomeMESSAGE_RECEIVER_FULL:  "receiver_full",
	DatapathMessageOutcomeMESSAGE_MEMORY:         "memory",
	DatapathMessageOutcomeMESSAGE_CLOSING:        "closing",
	DatapathMessageOutcomeMESSAGE_ULP:            "ulp",
	DatapathMessageOutcomeMESSAGE_SWITCHED_OFF:   "switched_off",
	DatapathMessageOutcomeMESSAGE_PEER_GONE:      "peer_gone",
}

// ConnectionLabels names each enum connection_outcome.
var ConnectionLabels = [...]string{
	DatapathConnectionOutcomeCONNECTION_ENROLLED:      "enrolled",
	DatapathConnectionOutcomeCONNECTION_REMOTE_SERVER: "remote_server",
	DatapathConnectionOutcomeCONNECTION_REMOTE_CLIENT: "remote_client",
	DatapathConnectionOutcomeCONNECTION_BLOCKING:      "blocking",
	DatapathConnectionOutcomeCONNECTION_EXCLUDED_PORT: "excluded_port",
	DatapathConnectionOutcomeCONNECTION_MPTCP:         "mptcp",
	DatapathConnectionOutcomeCONNECTION_RCVLOWAT:      "rcvlowat",
	DatapathConnectionOutcomeCONNECTION_EARLY_DATA:    "early_data",
	DatapathConnectionOutcomeCONNECTION_REPAIRED:      "repaired",
	DatapathConnectionOutcomeCONNECTION_UNPROVEN:      "unproven",
	DatapathConnectionOutcomeCONNECTION_SELF:          "self",
	DatapathConnectionOutcomeCONNECTION_GATE_CLOSED:   "gate_closed",
	DatapathConnectionOutcomeCONNECTION_LATE_CLAIM:    "late_claim",
	DatapathConnectionOutcomeCONNECTION_CONTESTED:     "contested",
	DatapathConnectionOutcomeCONNECTION_LOST_RACE:     "lost_race",
	DatapathConnectionOutcomeCONNECTION_MAP_FULL:      "map_full",
	DatapathConnectionOutcomeCONNECTION_OTHER_OWNER:   "other_owner",
	DatapathConnectionOutcomeCONNECTION_FAILED:        "failed",
}

// EventLabels names each enum event.
var EventLabels = [...]string{
	DatapathEventEVENT_SYN_RECORDED:      "syn_recorded",
	DatapathEventEVENT_PEER_GONE_TIMEOUT: "peer_gone_timeout",
	DatapathEventEVENT_FUNNELED:          "funneled",
	DatapathEventEVENT_TRIMMED_BYTES:     "trimmed_bytes",
}
