/* Operations that give up privilege: user, capabilities, no_new_privs, seccomp. */
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "launch.h"

static int get_caps(struct __user_cap_data_struct data[2])
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };

	return (int)syscall(SYS_capget, &head, data);
}

static int set_caps(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];

	for (int i = 0; i < 2; i++) {
		data[i].effective = (uint32_t)(effective >> (32 * i));
		data[i].permitted = (uint32_t)(permitted >> (32 * i));
		data[i].inheritable = (uint32_t)(inheritable >> (32 * i));
	}
	return (int)syscall(SYS_capset, &head, data);
}

static int held_caps(uint64_t *permitted)
{
	struct __user_cap_data_struct data[2];

	if (get_caps(data) < 0)
		return -1;
	*permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
	return 0;
}

int op_capabilities(struct launch *l, struct reader *r)
{
	struct capability_sets *c = &l->caps;

	c->bounding = read_u64(r);
	c->permitted = read_u64(r);
	c->effective = read_u64(r);
	c->inheritable = read_u64(r);
	c->ambient = read_u64(r);
	for (int cap = 0; cap < 64; cap++) {
		int held = c->bounding >> cap & 1 ? 0 : prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
		if (held < 0)
			break; /* past the last one this kernel knows */
		if (held && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			return -1;
	}
	return 0;
}

/* Raise the sets that the plan asks for, as far as they are held. */
int finish_capabilities(struct launch *l)
{
	struct capability_sets c = l->caps;
	uint64_t held;

	l->what = "capabilities";
	if (held_caps(&held) < 0)
		return -1;
	c.permitted &= held;
	c.effective &= c.permitted;
	c.inheritable &= held;
	c.ambient &= c.permitted & c.inheritable;
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 && errno != EINVAL)
		return -1;
	if (set_caps(c.effective, c.permitted, c.inheritable) < 0)
		return -1;
	for (int cap = 0; cap < 64; cap++)
		if (c.ambient >> cap & 1 &&
		    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
			return -1;
	prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0);
	die_with_parent(l); /* a change of credentials clears the death signal */
	return 0;
}

/* The terminal belongs to its user, as after a login. */
static void own_terminal(uid_t uid)
{
	struct stat st;

	for (int fd = 0; fd < 3; fd++)
		if (isatty(fd) && fstat(fd, &st) == 0 && st.st_uid != uid)
			(void)!fchown(fd, uid, (gid_t)-1);
}

int op_user(struct launch *l, struct reader *r)
{
	gid_t groups[1024];
	uint32_t uid = read_u32(r), gid = read_u32(r), count = read_count(r), skip;
	uint64_t held;

	l->what = "user";
	if (count > sizeof(groups) / sizeof(groups[0]))
		return fail(E2BIG);
	for (uint32_t i = 0; i < count; i++)
		groups[i] = read_u32(r);
	skip = read_u32(r);
	own_terminal(uid);
	if (l->plan->caps_at >= 0 && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		return -1;
	if (!skip && syscall(SYS_setgroups, (size_t)count, groups) < 0)
		return -1;
	if (syscall(SYS_setresgid, gid, gid, gid) < 0 || syscall(SYS_setresuid, uid, uid, uid) < 0)
		return -1;
	die_with_parent(l);
	if (l->plan->caps_at < 0)
		return 0;
	/* Operations up to the end of the credentials' change still need their rights. */
	return held_caps(&held) < 0 ? -1 : set_caps(held, held, 0);
}

int op_no_new_privs(struct launch *l, struct reader *r)
{
	(void)l;
	(void)r;
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

int op_seccomp(struct launch *l, struct reader *r)
{
	uint32_t len;
	union { const uint8_t *from; struct sock_filter *to; } program;
	struct sock_fprog filter;

	l->what = "seccomp";
	program.from = read_bytes(r, &len);
	if (!len || len % sizeof(struct sock_filter) || len / sizeof(struct sock_filter) > 0xffff)
		return fail(EINVAL);
	filter.filter = program.to;
	filter.len = (unsigned short)(len / sizeof(struct sock_filter));
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, read_u32(r), &filter);
}
