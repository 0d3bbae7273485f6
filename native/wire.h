/* The launch plan's bytes: see docs/reference/launch-plan.md and src/hutch/plan/wire.py. */
#ifndef HUTCH_WIRE_H
#define HUTCH_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A list is a program's arguments, of which execve(2) takes some 233,000 in 2 MiB, or less. */
enum { MAX_PLAN = 4 << 20, MAX_SLOTS = 64, MAX_LIST = 1 << 19 };

enum op_code {
	OP_CGROUP_JOIN = 1, OP_UNSHARE, OP_SETNS, OP_FORK, OP_SYNC, OP_ID_MAP, OP_PROPAGATION,
	OP_OVERLAY, OP_OPEN_TREE, OP_MOVE_MOUNT, OP_ROOT_DIR, OP_MOUNT, OP_REMOUNT, OP_MKDIR,
	OP_MKNOD, OP_SYMLINK, OP_WRITE_FILE, OP_MASK, OP_READ_ONLY, OP_PIVOT_ROOT, OP_HOSTNAME,
	OP_SYSCTL, OP_LINK_UP, OP_NETLINK, OP_SETSID_TTY, OP_RLIMIT, OP_SCHEDULER,
	OP_CAPABILITIES, OP_USER, OP_UMASK, OP_NO_NEW_PRIVS, OP_SECCOMP, OP_CHDIR,
	OP_CLOSE_RANGE, OP_EXEC, OP_INHERIT, OP_REST, OP_ATTACH, OP_RESTORE, OP_COUNT
};

/* Reads forward and never past `end`; after the first bad read everything reads as zero
 * and `bad` stays set. */
struct reader {
	const uint8_t *at, *end;
	bool bad;
};

uint32_t read_u32(struct reader *r);
int32_t read_i32(struct reader *r);
uint64_t read_u64(struct reader *r);
const char *read_str(struct reader *r);
const uint8_t *read_bytes(struct reader *r, uint32_t *len);
uint32_t read_count(struct reader *r);

/* Read over fields of these kinds; false when they are not there. */
bool skip_fields(struct reader *r, const char *kinds);

struct op {
	uint32_t code;
	struct reader body;
};

/* Take the next operation off a section. */
bool next_op(struct reader *section, struct op *out);

struct health_plan {
	bool set;
	uint64_t interval_ns, timeout_ns, start_period_ns, start_interval_ns;
	uint32_t retries;
	const uint8_t *plan;
	uint32_t plan_len;
};

enum { HOLD_STDIN = 1, HOLD_STDIN_ONCE = 2, HOLD_TTY = 4, HOLD_LINGER = 8,
       HOLD_EXIT_ALWAYS = 16, HOLD_HEALTH = 32, HOLD_OOM = 64 };

struct plan {
	uint64_t clone_flags;
	int32_t cgroup_slot;
	uint32_t slots, flags;
	int32_t oom_score_adj;
	uint64_t log_max_bytes;
	uint32_t log_max_files;
	const char *directory, *log_path, *name;
	struct reader exit_command; /* at the list's count */
	struct health_plan health;
	struct reader prepare, child;
	uint32_t prepare_count, child_count;
	bool has_fork, has_id_map;
	bool ends_in_exec; /* the child section; else the rest of it comes later */
	int32_t caps_at;  /* after which child operation the capability sets are raised, or -1 */
	int32_t user_last; /* index of the last User of the child section, or -1 */
};

/* Check the whole plan and find its parts; on false `*problem` says what is wrong. */
bool plan_read(struct plan *p, const uint8_t *data, size_t len, const char **problem);

/* Check operations that came later (u32 count, that many); they take the place of the child
 * section. */
bool plan_read_rest(struct plan *p, const uint8_t *data, size_t len);

static inline void put_u32(uint8_t *at, uint32_t value)
{
	memcpy(at, &value, sizeof(value));
}

static inline void put_u64(uint8_t *at, uint64_t value)
{
	memcpy(at, &value, sizeof(value));
}

static inline uint32_t get_u32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static inline uint64_t get_u64(const uint8_t *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

#endif
