package main

// mutations are the rules that keep the datapath right, and what notices that
// one is missing.
var mutations = []mutation{
	{
		name: "bytes sent by TCP have arrived",
		file: "datapath.bpf.c",
		old:  "	if (tp->write_seq != tp->snd_una)\n		return MESSAGE_UNACKNOWLEDGED;\n",
		test: "^TestRandomWrites$/^plain_receive_queue$/^loss$",
	},
	{
		name: "bytes sent by TCP have arrived (funnel)",
		file: "datapath.bpf.c",
		old:  "	if (tp->write_seq != tp->snd_una)\n		return MESSAGE_UNACKNOWLEDGED;\n",
		test: "^TestRandomWrites$/^funnel$/^loss$",
	},
	{
		name: "bytes sent by TCP have arrived (one lost segment)",
		file: "datapath.bpf.c",
		old:  "	if (tp->write_seq != tp->snd_una)\n		return MESSAGE_UNACKNOWLEDGED;\n",
		test: "^TestLostSegmentIsNotOvertaken$",
	},
	{
		name: "bytes sent by TCP have been read",
		file: "datapath.bpf.c",
		old:  "	if (BPF_CORE_READ(peer, sk_receive_queue.qlen))\n		return MESSAGE_NOT_READ;\n",
		test: "^TestRandomWrites$/^plain_receive_queue$/^loss$",
	},
	{
		name: "bytes sent by TCP have been read (one unread segment)",
		file: "datapath.bpf.c",
		old:  "	if (BPF_CORE_READ(peer, sk_receive_queue.qlen))\n		return MESSAGE_NOT_READ;\n",
		test: "^TestUnreadSegmentIsNotOvertaken$/^plain_receive_queue$",
	},
	{
		name: "bytes sent by TCP have been read (funnel, before accept)",
		file: "datapath.bpf.c",
		old:  "	if (BPF_CORE_READ(peer, sk_receive_queue.qlen))\n		return MESSAGE_NOT_READ;\n",
		test: "^TestUnreadSegmentIsNotOvertaken$/^funnel$/^not_accepted$",
	},
}
