/* The table of operations and what they share. */
#include "launch.h"

typedef int (*op_fn)(struct launch *, struct reader *);

static const op_fn table[OP_COUNT] = {
	[OP_CGROUP_JOIN] = op_cgroup_join, [OP_UNSHARE] = op_unshare, [OP_SETNS] = op_setns,
	[OP_FORK] = op_fork, [OP_SYNC] = op_sync, [OP_PROPAGATION] = op_propagation,
	[OP_OVERLAY] = op_overlay, [OP_OPEN_TREE] = op_open_tree,
	[OP_MOVE_MOUNT] = op_move_mount, [OP_ROOT_DIR] = op_root_dir, [OP_MOUNT] = op_mount,
	[OP_REMOUNT] = op_remount, [OP_MKDIR] = op_mkdir, [OP_MKNOD] = op_mknod,
	[OP_SYMLINK] = op_symlink, [OP_WRITE_FILE] = op_write_file, [OP_MASK] = op_mask,
	[OP_READ_ONLY] = op_read_only, [OP_PIVOT_ROOT] = op_pivot_root,
	[OP_HOSTNAME] = op_hostname, [OP_SYSCTL] = op_sysctl, [OP_LINK_UP] = op_link_up,
	[OP_NETLINK] = op_netlink, [OP_SETSID_TTY] = op_setsid_tty, [OP_RLIMIT] = op_rlimit,
	[OP_SCHEDULER] = op_scheduler, [OP_CAPABILITIES] = op_capabilities,
	[OP_USER] = op_user, [OP_UMASK] = op_umask, [OP_NO_NEW_PRIVS] = op_no_new_privs,
	[OP_SECCOMP] = op_seccomp, [OP_CHDIR] = op_chdir, [OP_CLOSE_RANGE] = op_close_range,
	[OP_EXEC] = op_exec, [OP_INHERIT] = op_inherit, [OP_REST] = op_rest,
	[OP_ATTACH] = op_attach, [OP_RESTORE] = op_restore,
};

int fail(int error)
{
	errno = error;
	return -1;
}

int slot_get(struct launch *l, int32_t slot)
{
	if (slot < 0 || slot >= MAX_SLOTS || l->slots[slot] < 0)
		return fail(EBADF);
	return l->slots[slot];
}

int slot_put(struct launch *l, int32_t slot, int fd)
{
	if (fd < 0)
		return -1;
	if (slot < 0 || slot >= MAX_SLOTS) {
		close(fd);
		return fail(EBADF);
	}
	if (l->slots[slot] >= 0)
		close(l->slots[slot]);
	l->slots[slot] = fd;
	return 0;
}

/* Operations that only make sense in the new process. */
static bool is_child_only(uint32_t code)
{
	return code == OP_FORK || code == OP_SYNC || code == OP_EXEC || code == OP_SETSID_TTY ||
	       code == OP_INHERIT || code == OP_REST || code == OP_RESTORE;
}

int run_op(struct launch *l, uint32_t code, struct reader *r)
{
	if (code >= OP_COUNT || !table[code] || (l->report < 0 && is_child_only(code)))
		return fail(EINVAL);
	l->what = "";
	l->extra[0] = 0;
	if (table[code](l, r) < 0)
		return -1;
	return r->bad ? fail(EPROTO) : 0;
}
