/* The state of one launch, shared by the operations, and the reports of the child. */
#ifndef HUTCH_LAUNCH_H
#define HUTCH_LAUNCH_H

#include "sys.h"
#include "wire.h"

enum section { SECTION_PLAN, SECTION_PREPARE, SECTION_CLONE, SECTION_CHILD, SECTION_EXEC,
	       SECTION_SUPERVISE };

enum { DETAIL = 240 };

/* Child to supervisor, on a seqpacket socket. The end of file after REPORT_EXEC says that
 * the program runs. The supervisor answers with bytes, which the child waits for. */
enum report_kind { REPORT_FAIL = 1, REPORT_SYNC, REPORT_FORKED, REPORT_TTY, REPORT_EXEC,
		   REPORT_AIDE };

struct report {
	uint8_t kind, section;
	uint16_t zero;
	int32_t error;
	uint32_t index;
	int32_t number;
	char detail[DETAIL];
};

enum { GATE_MAPS = 'm', GATE_GO = 'g', GATE_EXEC = 'x' };

struct capability_sets {
	uint64_t bounding, permitted, effective, inheritable, ambient;
};

struct launch {
	const struct plan *plan;
	int slots[MAX_SLOTS];
	bool overlay[MAX_SLOTS]; /* the slot holds an overlay made by the supervisor */
	int root;   /* O_PATH descriptor of the new root, -1 until there is one */
	int report; /* the child's end, -1 in the supervisor */
	int mask_dir; /* an empty read-only tmpfs already attached somewhere, or -1 */
	bool outside; /* the id maps are written, but this process is not yet their root */
	bool umask_set, no_close;
	int inherit[MAX_SLOTS]; /* what becomes descriptors 3, 4, ... of the program */
	uint32_t inherited;
	uint32_t absent; /* of the directories in PATH: the first ones without the program */
	bool absent_known;
	bool joined; /* made in its cgroup: the first operation need not join it */
	bool exec_open; /* the supervisor is ready for the program to run */
	struct capability_sets caps;
	uint32_t index;
	uint32_t base; /* the number of the first operation of the section at hand */
	uint8_t section;
	const char *what; /* the path or name at hand, for the report */
	char extra[DETAIL / 2]; /* what the kernel said beside errno */
};

/* Operations return 0, or -1 with errno. */
int run_op(struct launch *l, uint32_t code, struct reader *r);
int fail(int error); /* set errno, return -1 */
int slot_get(struct launch *l, int32_t slot);
int slot_put(struct launch *l, int32_t slot, int fd);

/* op_root.c: paths in the root. `want` is 0, 'd' or 'f': what to make when missing. */
int root_open(struct launch *l, const char *path, uint64_t flags, uint64_t mode);
int root_target(struct launch *l, const char *path, char want);
int root_dir(struct launch *l, const char *path, uint32_t mode, uint32_t uid, uint32_t gid);
int root_parent(struct launch *l, const char *path, char *buffer, const char **leaf);
int become_root(struct launch *l, int mount);
int write_file(struct launch *l, int fd, const void *data, size_t len);

int op_mkdir(struct launch *l, struct reader *r);
int op_mknod(struct launch *l, struct reader *r);
int op_symlink(struct launch *l, struct reader *r);
int op_write_file(struct launch *l, struct reader *r);
int op_chdir(struct launch *l, struct reader *r);
int op_pivot_root(struct launch *l, struct reader *r);
int op_sysctl(struct launch *l, struct reader *r);

/* op_mount.c: a file system being configured; `fs_failed` keeps what it said beside errno. */
int fs_failed(struct launch *l, int fs);
int fs_options(struct launch *l, int fs, struct reader *r);
int fs_mount(struct launch *l, int fs, uint64_t attr);

int op_propagation(struct launch *l, struct reader *r);
int op_overlay(struct launch *l, struct reader *r);
int op_open_tree(struct launch *l, struct reader *r);
int op_move_mount(struct launch *l, struct reader *r);
int op_root_dir(struct launch *l, struct reader *r);
int op_mount(struct launch *l, struct reader *r);
int op_remount(struct launch *l, struct reader *r);
int op_mask(struct launch *l, struct reader *r);
int op_read_only(struct launch *l, struct reader *r);

/* op_process.c: look for the program before a seccomp filter may forbid to. */
void look_along_path(struct launch *l, struct reader rest);

int op_cgroup_join(struct launch *l, struct reader *r);
int op_unshare(struct launch *l, struct reader *r);
int op_setns(struct launch *l, struct reader *r);
int op_fork(struct launch *l, struct reader *r);
int op_sync(struct launch *l, struct reader *r);
int op_hostname(struct launch *l, struct reader *r);
int op_setsid_tty(struct launch *l, struct reader *r);
int op_rlimit(struct launch *l, struct reader *r);
int op_scheduler(struct launch *l, struct reader *r);
int op_umask(struct launch *l, struct reader *r);
int op_close_range(struct launch *l, struct reader *r);
int op_exec(struct launch *l, struct reader *r);
int op_inherit(struct launch *l, struct reader *r);
int op_rest(struct launch *l, struct reader *r); /* launch.c */
int pass_master(struct launch *l, int master);
char **string_list(struct reader *r);

int op_attach(struct launch *l, struct reader *r);
int op_restore(struct launch *l, struct reader *r);

int op_capabilities(struct launch *l, struct reader *r);
int op_user(struct launch *l, struct reader *r);
int op_no_new_privs(struct launch *l, struct reader *r);
int op_seccomp(struct launch *l, struct reader *r);
int finish_capabilities(struct launch *l);

int op_link_up(struct launch *l, struct reader *r);
int op_netlink(struct launch *l, struct reader *r);

/* launch.c */
int run_prepare(struct launch *l);
void signals_of_supervisor(void); /* none blocked, a few ignored; before anything is launched */
/* Clone the child; in it this never returns. `ends` are the supervisor's and its own. */
pid_t clone_child(struct launch *l, const int stdio[3], const int ends[2], int *pidfd);
int write_id_maps(struct launch *l, pid_t pid);
bool send_report(struct launch *l, uint8_t kind, int error, int32_t number);
void die_with_parent(struct launch *l);
void wait_gate(struct launch *l, char gate);
_Noreturn void child_failed(struct launch *l, int error);

/* init.c: be the reaping init of `pid`. */
_Noreturn void run_init(pid_t pid);

#endif
