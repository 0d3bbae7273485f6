/* The supervisor: what it holds for its one process, and the frames it speaks. */
#ifndef HUTCH_SUPERVISOR_H
#define HUTCH_SUPERVISOR_H

#include <sys/wait.h>

#include "buffer.h"
#include "frames.h"
#include "launch.h"
#include "log.h"

enum {
	MAX_CLIENTS = 64,
	CHUNK = 32 << 10,          /* one read from the container */
	QUEUE_LIMIT = 256 << 10,   /* output held for a client */
	QUEUE_FINAL = 6 << 20,     /* the same, for what is in the pipes at the exit */
};

struct client {
	int fd;          /* -1: gone, its last input is being delivered, or unused */
	bool used, starter, stdin_eof, ended;
	bool claims;     /* does itself what the exit command would do */
	bool corked;     /* nothing is sent before the process runs, or stops on the way */
	uint8_t attach;
	uint8_t head[FRAME_HEAD], head_len;
	uint8_t body[64];
	uint32_t body_len, left; /* of the frame being read */
	uint64_t gap;
	struct buffer queue, input;
};

enum state { LAUNCHING, RUNNING, DRAINING, DONE };

enum { HEALTH_KEPT = 5, HEALTH_OUTPUT = 4096 };

struct probe {
	uint64_t begun_ns, ended_ns;
	int32_t code; /* -1: it took too long */
	struct buffer output;
};

struct health {
	int fd;         /* connection to the running probe's supervisor, or -1 */
	pid_t launcher; /* to be reaped, or 0 */
	uint64_t started_ns, next_ns, deadline_ns;
	uint32_t failures, kept;
	uint8_t status;
	uint8_t head[FRAME_HEAD];
	uint32_t head_len, left, body_len;
	uint8_t body[8];
	struct probe probes[HEALTH_KEPT]; /* the oldest first */
	struct probe current;
};

struct supervisor {
	struct plan plan;
	struct launch launch;
	enum state state;
	int dir, listen;
	uint64_t accept_ns; /* no descriptor for another client: not before one leaves, or this */
	ino_t socket_inode; /* of our ctl.sock: another supervisor's is not ours to remove */
	int report;      /* our end of the child's reports */
	int pidfd, old_pidfd;
	pid_t pid;
	pid_t aide;      /* a helper of the launch that is to be reaped after it, or 0 */
	uint64_t stream_ids[3]; /* inodes of the pipes that the process got; 0: none */
	int streams[2];  /* read ends: stdout or the terminal, stderr */
	int terminal;    /* its other side, held open while the process runs */
	int input;       /* write end of stdin or the terminal; -1: closed */
	bool input_full, input_once_gone;
	bool exec_seen, forked, starter_gone;
	int32_t sync_held; /* a Sync that came before the process id was known, or -1 */
	int32_t sync_open; /* a Sync waiting for its GO, or -1 */
	struct buffer go; /* a GO of the starter that is not whole yet */
	struct client clients[MAX_CLIENTS];
	struct log log;
	struct health health;
	uint64_t started_ns, drain_until_ns, flush_until_ns, exit_ns;
	siginfo_t exit;
};

/* supervise.c */
_Noreturn void supervise(struct supervisor *s);
_Noreturn void launch_failed(struct supervisor *s, uint8_t section, uint32_t index, int error,
			     const char *detail);
int answer_go(struct supervisor *s, int32_t number, const uint8_t *rest, size_t n);
void starter_left(struct supervisor *s);
bool is_gone(const struct client *c);
void tell_pid(struct supervisor *s);

/* client.c */
void client_add(struct supervisor *s, int fd, bool starter);
void client_accept(struct supervisor *s);
void client_read(struct supervisor *s, struct client *c);
void client_flush(struct supervisor *s, struct client *c);
void client_attach(struct supervisor *s, struct client *c, uint8_t flags);
void client_drop(struct supervisor *s, struct client *c);
void client_send(struct supervisor *s, struct client *c, uint8_t type, uint8_t flag,
		 const void *data, size_t n);
void tell_starter(struct supervisor *s, uint8_t type, uint8_t flag, const void *data, size_t n);
void uncork(struct supervisor *s);
void tell_all(struct supervisor *s, uint8_t type, uint8_t flag, const void *data, size_t n);
void tell_output(struct supervisor *s, int stream, const char *data, size_t n);
bool clients_have_room(const struct supervisor *s, int stream);
struct client *starter_of(struct supervisor *s);

/* stdio.c */
int stdio_open(struct supervisor *s, int child[3]);
void stdio_started(int child[3]);
int stdio_take_terminal(struct supervisor *s, int master);
void stream_read(struct supervisor *s, int index);
void stream_drain(struct supervisor *s);
void terminal_release(struct supervisor *s);
bool streams_ended(const struct supervisor *s);
void input_pump(struct supervisor *s);
bool input_pending(const struct supervisor *s);
void input_check(struct supervisor *s);

/* record.c */
int record_open(struct supervisor *s);
void record_pid(struct supervisor *s);
void record_exit(struct supervisor *s);
void record_remove(struct supervisor *s);
int record_write(struct supervisor *s, const char *name, const char *data, size_t n);

/* health.c */
void health_start(struct supervisor *s);
void health_stop(struct supervisor *s);
void health_tick(struct supervisor *s, uint64_t now);
void health_read(struct supervisor *s);
uint64_t health_deadline(const struct supervisor *s); /* 0: none */

static inline int tell_child(const struct supervisor *s, char gate)
{
	return write(s->report, &gate, 1) == 1 ? 0 : -1;
}

#endif
