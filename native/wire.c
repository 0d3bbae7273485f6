/* Read a launch plan: every length is checked here, before the first operation runs. */
#include "wire.h"

#include <string.h>

/* The fields of each operation, as in plan/wire.py. */
static const char *const shapes[OP_COUNT] = {
	[OP_CGROUP_JOIN] = "S", [OP_UNSHARE] = "q", [OP_SETNS] = "iq", [OP_FORK] = "",
	[OP_SYNC] = "u", [OP_ID_MAP] = "MM", [OP_PROPAGATION] = "sq",
	[OP_OVERLAY] = "iSssSq", [OP_OPEN_TREE] = "isiuqiq", [OP_MOVE_MOUNT] = "iss",
	[OP_ROOT_DIR] = "su", [OP_MOUNT] = "sssSqu", [OP_REMOUNT] = "sqquq",
	[OP_MKDIR] = "suuu", [OP_MKNOD] = "suuuuus", [OP_SYMLINK] = "ss",
	[OP_WRITE_FILE] = "sbuu", [OP_MASK] = "S", [OP_READ_ONLY] = "S",
	[OP_PIVOT_ROOT] = "", [OP_HOSTNAME] = "ss", [OP_SYSCTL] = "ss", [OP_LINK_UP] = "s",
	[OP_NETLINK] = "BU", [OP_SETSID_TTY] = "uuuu", [OP_RLIMIT] = "uqqu",
	[OP_SCHEDULER] = "iu", [OP_CAPABILITIES] = "qqqqq", [OP_USER] = "uuUu",
	[OP_UMASK] = "u", [OP_NO_NEW_PRIVS] = "", [OP_SECCOMP] = "bu", [OP_CHDIR] = "suuu",
	[OP_CLOSE_RANGE] = "u", [OP_EXEC] = "SSus", [OP_INHERIT] = "U",
	[OP_REST] = "u", [OP_ATTACH] = "is", [OP_RESTORE] = "SSsbi",
};

static const uint8_t *take(struct reader *r, size_t n)
{
	const uint8_t *at = r->at;

	if (r->bad || (size_t)(r->end - r->at) < n) {
		r->bad = true;
		return NULL;
	}
	r->at += n;
	return at;
}

uint32_t read_u32(struct reader *r)
{
	uint32_t value = 0;
	const uint8_t *at = take(r, sizeof(value));

	if (at)
		memcpy(&value, at, sizeof(value));
	return value;
}

int32_t read_i32(struct reader *r)
{
	return (int32_t)read_u32(r);
}

uint64_t read_u64(struct reader *r)
{
	uint64_t value = 0;
	const uint8_t *at = take(r, sizeof(value));

	if (at)
		memcpy(&value, at, sizeof(value));
	return value;
}

const uint8_t *read_bytes(struct reader *r, uint32_t *len)
{
	const uint8_t *at;

	*len = read_u32(r);
	at = take(r, *len);
	if (!at)
		*len = 0;
	return at;
}

const char *read_str(struct reader *r)
{
	uint32_t len = read_u32(r);
	const uint8_t *at = len < MAX_PLAN ? take(r, (size_t)len + 1) : NULL;

	if (!at || at[len] != 0 || memchr(at, 0, len)) {
		r->bad = true;
		return "";
	}
	return (const char *)at;
}

uint32_t read_count(struct reader *r)
{
	uint32_t count = read_u32(r);

	if (count > MAX_LIST)
		r->bad = true;
	return r->bad ? 0 : count;
}

static void skip_field(struct reader *r, char kind)
{
	uint32_t ignored;

	switch (kind) {
	case 'u': case 'i': read_u32(r); break;
	case 'q': read_u64(r); break;
	case 's': read_str(r); break;
	case 'b': read_bytes(r, &ignored); break;
	default: r->bad = true;
	}
}

static void skip_list(struct reader *r, char kind)
{
	uint32_t ignored;

	for (uint32_t n = read_count(r); n && !r->bad; n--) {
		switch (kind) {
		case 'S': read_str(r); break;
		case 'B': read_bytes(r, &ignored); break;
		case 'U': read_u32(r); break;
		default: take(r, 12); break;
		}
	}
}

bool skip_fields(struct reader *r, const char *kinds)
{
	for (; *kinds; kinds++) {
		if (strchr("SBUM", *kinds))
			skip_list(r, *kinds);
		else
			skip_field(r, *kinds);
	}
	return !r->bad;
}

static bool op_fits(const struct op *op)
{
	struct reader r = op->body;

	return op->code > 0 && op->code < OP_COUNT && skip_fields(&r, shapes[op->code]) &&
	       r.at == r.end;
}

bool next_op(struct reader *section, struct op *out)
{
	uint32_t code = read_u32(section); /* u16 code, u16 zero */
	uint32_t len = read_u32(section);
	const uint8_t *at = take(section, len);

	if (!at)
		return false;
	out->code = code;
	out->body = (struct reader){ .at = at, .end = at + len, .bad = false };
	return true;
}

/* What the launch must know before it starts. */
static void survey(struct plan *p, uint32_t index, uint32_t code, bool *nnp, int32_t *seccomp)
{
	switch (code) {
	case OP_FORK: p->has_fork = true; break;
	case OP_NO_NEW_PRIVS: *nnp = true; break;
	case OP_SECCOMP: *seccomp = (int32_t)index; break;
	case OP_USER: p->user_last = (int32_t)index; break;
	case OP_CAPABILITIES: p->caps_at = (int32_t)index; break;
	default: break;
	}
}

static bool ends_section(uint32_t code)
{
	return code == OP_EXEC || code == OP_REST || code == OP_RESTORE;
}

static bool read_section(struct plan *p, struct reader *r, uint32_t count, bool child,
			 struct reader *out)
{
	struct op op = { 0 };
	bool nnp = false;
	int32_t seccomp = -1;

	out->at = r->at;
	for (uint32_t i = 0; i < count; i++) {
		if (!next_op(r, &op) || !op_fits(&op))
			return false;
		if (child)
			survey(p, i, op.code, &nnp, &seccomp);
		else if (op.code == OP_ID_MAP)
			p->has_id_map = true;
		if (child && ends_section(op.code) && i + 1 != count)
			return false;
		if (child && op.code == OP_ID_MAP)
			return false;
	}
	out->end = r->at;
	out->bad = false;
	if (p->caps_at >= 0 && p->user_last > p->caps_at)
		p->caps_at = p->user_last;
	/* Without no_new_privs a filter needs CAP_SYS_ADMIN: lower the sets after it. */
	if (p->caps_at >= 0 && !nnp && seccomp > p->caps_at)
		p->caps_at = seccomp;
	p->ends_in_exec = count && (op.code == OP_EXEC || op.code == OP_RESTORE);
	return !child || (count && ends_section(op.code));
}

static void read_health(struct health_plan *h, struct reader *r)
{
	h->set = true;
	h->interval_ns = read_u64(r);
	h->timeout_ns = read_u64(r);
	h->start_period_ns = read_u64(r);
	h->start_interval_ns = read_u64(r);
	h->retries = read_u32(r);
	h->plan = read_bytes(r, &h->plan_len);
}

static void read_supervision(struct plan *p, struct reader *r)
{
	p->flags = read_u32(r);
	p->oom_score_adj = read_i32(r);
	p->log_max_bytes = read_u64(r);
	p->log_max_files = read_u32(r);
	p->directory = read_str(r);
	p->log_path = read_str(r);
	p->name = read_str(r);
	p->exit_command = *r;
	skip_list(r, 'S');
	p->exit_command.end = r->at;
	if (p->flags & HOLD_HEALTH)
		read_health(&p->health, r);
}

bool plan_read(struct plan *p, const uint8_t *data, size_t len, const char **problem)
{
	struct reader r = { .at = data, .end = data + len, .bad = false };

	memset(p, 0, sizeof(*p));
	p->caps_at = p->user_last = -1;
	*problem = "the head";
	if (len < 32 || memcmp(data, "HPL1", 4) != 0)
		return false;
	read_u32(&r);
	if (read_u32(&r) != len)
		return false;
	p->clone_flags = read_u64(&r);
	p->cgroup_slot = read_i32(&r);
	p->slots = read_u32(&r);
	p->prepare_count = read_u32(&r);
	p->child_count = read_u32(&r);
	if (p->slots > MAX_SLOTS || p->cgroup_slot >= MAX_SLOTS)
		return false;
	*problem = "the supervision";
	read_supervision(p, &r);
	if (r.bad)
		return false;
	*problem = "the prepare section";
	if (!read_section(p, &r, p->prepare_count, false, &p->prepare))
		return false;
	*problem = "the child section";
	return read_section(p, &r, p->child_count, true, &p->child) && r.at == r.end;
}

bool plan_read_rest(struct plan *p, const uint8_t *data, size_t len)
{
	struct reader r = { .at = data, .end = data + len, .bad = false };
	bool has_fork = p->has_fork;

	p->caps_at = p->user_last = -1;
	p->child_count = read_u32(&r);
	/* The supervisor has been told whether there is a Fork, and that this is the last part. */
	return read_section(p, &r, p->child_count, true, &p->child) && r.at == r.end &&
	       p->has_fork == has_fork && p->ends_in_exec;
}
