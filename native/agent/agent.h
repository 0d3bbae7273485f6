/* hutch-agent: process 1 of a guest. See docs/reference/guest-protocol.md.
 *
 * One loop, one process: channels are relayed, calls are answered in it. Only what may take
 * long on files (a role of this binary) runs beside it. */
#ifndef HUTCH_AGENT_H
#define HUTCH_AGENT_H

#include "../mux.h"
#include "../sys.h"

enum { MAX_REQUEST = 4 << 20, MAX_ANSWER = 8 << 20, MAX_PENDING = 32 << 20 };

/* Agent-wide state. */
struct agent {
	struct mux mux;
	bool init;              /* process 1 of a guest; false: driven by a test */
	int epoll, uevents;
	const char *launcher, *root, *upper;
	char *const *env;       /* of launchers */
	size_t pending;         /* bytes of plans and requests that are not whole yet */
	uint32_t spawns, main_spawn; /* how many; which one `main_pid` is of */
	pid_t main_pid;
	int main_fd;            /* its pidfd, or -1 */
	struct relay *main;     /* the main link: to its supervisor, or NULL */
	struct relay *dead;     /* to be freed at the end of the turn */
	struct call *waiting;   /* calls that wait for a device */
	struct call *quiescing; /* the one that waits for the main link to be quiet */
};

extern struct agent the;

/* Anything that can be watched: the loop calls `ready` with epoll's bits. */
struct watch {
	void (*ready)(struct watch *w, uint32_t events);
	int fd;
	uint32_t events;
};

int watch_set(struct watch *w, uint32_t events); /* 0 events: forget it */

/* serve.c */
void serve(int fd);

/* relay.c: SPAWN, EXEC, FILES */
int relay_open(struct mux_channel *ch);
size_t relay_data(struct mux_channel *ch, const uint8_t *data, size_t n);
void relay_eof(struct mux_channel *ch);
void relay_closed(struct mux_channel *ch, bool reset);
void relay_ready(struct mux_channel *ch);
void relay_free_dead(void);
void relay_greeted(void);
bool main_is_alive(void);

/* launchers.c: have a plan carried out (slot -1: none). What has come behind it, `*sent` bytes of
 * which are passed on, is with the launcher before the process can write. Returns the socket, or
 * -1 and errno. */
int launcher_run(int plan, int slot, const uint8_t *data, size_t n, size_t *sent);
void spare_wanted(uint32_t after_ms); /* a launcher that waits for a plan */
int spare_timeout_ms(void);           /* until it is to be started; -1: not at all */
void spare_start(void);               /* if it is time */

/* The main link stands still, or outlives its channel. */
int main_quiesce(void); /* 0, ESRCH, or EINPROGRESS: call_quiet follows */
void main_resume(void);

/* call.c */
int call_open(struct mux_channel *ch);
size_t call_data(struct mux_channel *ch, const uint8_t *data, size_t n);
void call_eof(struct mux_channel *ch);
void call_closed(struct mux_channel *ch);
void call_ready(struct mux_channel *ch);
void call_device_came(void);      /* try again what waits for a device */
int call_timeout_ms(void);        /* until the first of them gives up; -1: none */
void call_quiet(int error);       /* the main link is quiet, or has ended */

/* answer.c: append to an answer; what does not fit or finds no memory is left out, and the
 * channel is closed with ENOMEM. */
struct answer {
	struct buffer bytes;
	bool failed;
};

void answer_u32(struct answer *a, uint32_t value);
void answer_u64(struct answer *a, uint64_t value);
void answer_str(struct answer *a, const char *s);
void answer_bytes(struct answer *a, const void *data, size_t n);

/* setup.c */
enum setup_code {
	SETUP_ENTROPY = 1, SETUP_CLOCK, SETUP_HOSTNAME, SETUP_INSMOD, SETUP_DISK, SETUP_MOUNT,
	SETUP_MKDIR, SETUP_WRITE_FILE, SETUP_INTERFACE, SETUP_ADDRESS, SETUP_LINK_UP,
	SETUP_ROUTE, SETUP_SYSCTL, SETUP_SYMLINK, SETUP_CGROUP, SETUP_RESIZE, SETUP_ONLINE,
	SETUP_REWRITE, SETUP_FLUSH, SETUP_RETIRE, SETUP_WARM,
	SETUP_COUNT
};

/* An operation returns 0, an errno, or SETUP_WAIT for a device that is not there yet.
 * `*what` is the path or name at hand. */
enum { SETUP_WAIT = -1 };
bool setup_fits(struct reader operations, uint32_t count, uint32_t *bad);
int setup_run(const struct op *op, const char **what);
int insmod(const char *path, const char *params); /* errno or 0 */

/* setup_net.c */
int setup_interface(struct reader *r, const char **what);
int setup_address(struct reader *r, const char **what);
int setup_link_up(struct reader *r, const char **what);
int setup_retire(struct reader *r, const char **what);
int setup_route(struct reader *r, const char **what);
int setup_flush(struct reader *r, const char **what);
void links_changed(void); /* devices have come or gone */

/* paths.c */
int make_dirs(const char *path, uint32_t mode, bool last); /* errno or 0; `last`: itself too */
int make_symlink(const char *target, const char *path);
int put_file(const char *path, uint32_t mode, const void *data, size_t n);
int rewrite_file(const char *path, const void *data, size_t n); /* the same inode */
int put_value(const char *path, const char *value); /* into a file of the kernel's */
bool climbs(const char *path); /* has `..` in it */
ssize_t get_file(const char *path, char *buffer, size_t cap); /* with a NUL; -1 and errno */

/* cgroup.c */
int cgroup_create(const char *path, const char *lines, const char **what);
bool cgroup_path(char *buffer, size_t cap, const char *group); /* empty: the main process's */

/* stats.c, power.c */
int stats(struct answer *a, const char *group);
int processes(struct answer *a, const char *group);
int shut_down(uint32_t flags, const char **what);

/* boot.c */
int boot(void); /* the agent's port, ready to serve */
int open_uevents(void);
_Noreturn void give_up(const char *what);

/* files.c: the files helper; descriptors 0, 1: the stream, 3: the root. */
_Noreturn void files_main(const char *upper);

#endif
