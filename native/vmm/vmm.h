/* hutch-vmm: the host's monitor of one virtual machine. See docs/reference/vmm.md. */
#ifndef HUTCH_VMM_H
#define HUTCH_VMM_H

#include "../buffer.h"
#include "../frames.h"
#include "../mux.h"
#include "../sys.h"
#include "../wire.h"

/* What the starter hands over, by number. QEMU has its descriptors at the same numbers. */
enum { FD_CONFIG = 3, FD_AGENT, FD_LISTEN, FD_STATUS, FD_LOG, FD_CONSOLE_LOG, FD_CONSOLE_PIPE,
       FD_SHARES, FD_QEMU };

/* With CONFIG_CONSOLE FD_AGENT is the serial port and FD_LISTEN where clients of the screen
 * call. With it or CONFIG_CONTROL the first of QEMU's is our own connection to its monitor. */
enum { FD_CONTROL = FD_QEMU };

enum { CONFIG_VOLATILE = 1, CONFIG_TTY = 2, CONFIG_HOLD = 4, CONFIG_ADOPT = 8, CONFIG_CONSOLE = 16,
       CONFIG_CONTROL = 32, CONFIG_PARK = 64, CONFIG_ALL = 127 };

enum {
	MAX_CONFIG = 16 << 20,
	MAX_QEMU_FDS = 64,
	MAX_VMM_CLIENTS = 256,
	CLIENT_HEAD = 8,  /* HVA1, u8 kind, three zeros */
	MAX_TEXT = 512,   /* of a failure */
	EXIT_LOST = 255,  /* the machine ended before its process did */
	EXIT_SAVED = 254, /* its state was saved, and it was ended: it goes on elsewhere */
};

enum { GO_UNACKED = 4 }; /* the payload of a GO that has one */

struct config {
	uint8_t *memory;
	size_t size;
	uint32_t flags, fds, boot_ms, shutdown_ms;
	uint32_t unacked; /* with CONFIG_ADOPT: input that the process did not take yet */
	struct reader argv, env; /* at their counts */
	const uint8_t *setup, *plan;
	uint32_t setup_len, plan_len;
};

enum stage {
	ST_HELD,      /* waiting for the starter's GO */
	ST_AGENT,     /* HELLO is sent */
	ST_SETUP,
	ST_LAUNCH,
	ST_RUN,
	ST_SHUTDOWN,  /* the guest is asked to put its file systems away */
	ST_TERMINATE, /* QEMU got SIGTERM */
	ST_KILL,      /* QEMU got SIGKILL */
};

/* Who a channel belongs to; every owner begins with it. */
enum owner { OWNER_CLIENT, OWNER_PROCESS, OWNER_CALL };

/* The guest's main process, behind a supervisor in the guest. */
struct process {
	enum owner owner;
	struct mux_channel *ch;
	struct buffer rest;       /* what was not taken when the guest closed the channel */
	uint32_t plan_sent;
	bool attached, started, exited;
	bool adopted;             /* it was started, or its launch waits, under another monitor */
	bool stdin_open, stdin_ended; /* ended: STDIN_EOF is still to be sent */
	bool resized;             /* RESIZE is still to be sent */
	uint64_t signals;         /* still to be sent: bit n - 1 for signal n */
	uint32_t unacked;         /* input that the process did not take */
	bool blocked[2];          /* stdout, stderr take nothing now */
	bool broken[2];           /* nobody reads them: their bytes are dropped */
	uint8_t head[FRAME_HEAD], head_len;
	uint32_t left, body_len;  /* of the frame being read */
	uint8_t body[12 + MAX_TEXT];
};

struct vmm;
struct call;
typedef void call_done(struct vmm *v, const struct call *call, uint32_t error);

/* A call of our own. */
struct call {
	enum owner owner;
	call_done *done;
	struct mux_channel *ch;
	const uint8_t *request;
	size_t left, answer_len;
	uint8_t answer[12 + MAX_TEXT]; /* the rest is not needed */
};

/* Kinds of clients beside those of channels, which are the guest's. */
enum { CLIENT_QUIESCE = 128, CLIENT_END };

struct vmm_client {
	enum owner owner;
	int fd; /* valid while `used` */
	bool used, half_closed, blocked;
	bool answered;  /* something came from the guest */
	uint8_t head[CLIENT_HEAD], head_len;
	int passed;     /* a descriptor that came with the head; 0: none */
	struct mux_channel *ch;
	struct buffer rest; /* the guest has closed; this is still to be written */
};

struct pipe_buffer {
	size_t at, len;
	uint8_t bytes[4096];
};

/* The stdio of a machine without an agent. */
struct console {
	bool stdin_open;
	struct pipe_buffer input, output;
};

/* Our connection to QEMU's monitor; see control.c. */
struct control {
	bool open;
	bool quit;         /* QEMU was told to end by whoever saved the machine */
	uint64_t last_ns;  /* when there was no room; 0: never */
	uint64_t retry_ns; /* when the machine is to be told to go on; 0: it does */
	bool asked;        /* whether it still stands still for want of room */
	size_t len;
	char line[1024];   /* of an event: what matters is at its head */
};

/* What is said, on its way into a file of bounded size; see logs.c. */
struct vmm_log {
	int file, pipe;    /* pipe -1: nobody speaks any more */
	uint64_t size, left_out;
	uint64_t note; /* how long the words about it in the file are */
};

enum { LOG_QEMU, LOG_CONSOLE, LOGS };

/* The main link standing still; see quiet.c. */
struct quiet {
	struct vmm_client *client; /* NULL: nobody wants it */
	bool draining;
	int monitor;               /* the client's connection to QEMU, or -1 */
	struct call asking, resuming;
};

struct vmm {
	struct config config;
	enum stage stage;
	uint64_t deadline_ns; /* of the stage; 0: none */
	int signals;
	int status;           /* -1: the starter has left */
	uint8_t status_head[FRAME_HEAD + GO_UNACKED], status_len;
	bool agent_gone;
	pid_t qemu;           /* 0: none, or ended */
	int qemu_status;
	int code;             /* to exit with, from ST_SHUTDOWN on */
	uint32_t turn;
	uint64_t accept_ns;   /* no descriptor for another client: not before one leaves, or this */
	struct mux mux;
	struct process process;
	struct call call; /* SETUP, then SHUTDOWN */
	struct quiet quiet;
	bool shares_gone; /* nobody serves the shared directories */
	int rescue;       /* a connection to QEMU that is told to go on, or -1 */
	uint32_t rescue_seen;
	struct console console;
	struct control control;
	struct vmm_log logs[LOGS];
	struct vmm_client clients[MAX_VMM_CLIENTS];
};

/* Why a machine did not come to run its process; the flag of FAILED. */
enum part { PART_CONFIG, PART_QEMU, PART_AGENT, PART_SETUP, PART_LAUNCH };

enum status { STATUS_QEMU = 1, STATUS_AGENT, STATUS_READY, STATUS_STARTED, STATUS_FAILED,
	      STATUS_EXIT };
enum { STATUS_GO = 1 };

/* config.c */
bool config_load(struct config *c, const char **problem);
void config_free(struct config *c);
bool config_has_control(const struct config *c);
int config_first_fd(const struct config *c); /* that is QEMU's */

/* qemu.c */
void qemu_start(struct vmm *v);
void qemu_signal(struct vmm *v, int signum);
bool qemu_reap(struct vmm *v); /* true when it has just ended */
void qemu_kill(struct vmm *v); /* and wait for its end */

/* status.c */
void status_send(struct vmm *v, uint8_t type, uint8_t flag, const void *data, size_t n);
void status_read(struct vmm *v);

/* call.c */
void call_start(struct vmm *v, struct call *call, call_done *done, const uint8_t *request,
		size_t n);
void call_pump(struct vmm *v, struct call *call);
size_t call_data(struct call *call, const uint8_t *data, size_t n);
void call_over(struct vmm *v, struct call *call, uint32_t error);
void call_setup(struct vmm *v);

/* process.c */
void process_start(struct vmm *v);
void process_adopt(struct vmm *v);
void process_turn(struct vmm *v);      /* send what is due */
void process_pull(struct vmm *v);      /* there may be room for more output */
size_t process_data(struct vmm *v, const uint8_t *data, size_t n);
void process_closed(struct vmm *v, uint32_t error);
void process_read_stdin(struct vmm *v);
bool process_wants_stdin(const struct vmm *v);
void process_signal(struct vmm *v, int signum);
void terminal_raw(void);

/* clients.c */
bool clients_have_place(const struct vmm *v);
void clients_accept(struct vmm *v);
void accept_later(struct vmm *v); /* after accept(2) has failed */
short client_events(const struct vmm_client *c); /* -1: do not watch it */
void client_event(struct vmm *v, struct vmm_client *c, short events);
size_t client_data(struct vmm *v, struct vmm_client *c, const uint8_t *data, size_t n);
void client_eof(struct vmm_client *c);
void client_closed(struct vmm *v, struct vmm_client *c, uint32_t error);

/* logs.c */
void log_say(struct vmm_log *log, const char *words);
void log_open(struct vmm_log *log, int file, int pipe);
bool log_read(struct vmm_log *log); /* false: there is no more now */
void logs_read_rest(struct vmm *v); /* after QEMU's end */

/* console.c */
void console_begin(struct vmm *v);
void console_signal(int signum);
void console_accept(struct vmm *v);
void console_read_port(struct vmm *v);
void console_read_stdin(struct vmm *v);
void console_write(struct vmm *v);
void console_drain(struct vmm *v); /* after QEMU's end */

/* control.c */
void control_begin(struct vmm *v);
void control_tell(const char *text, size_t n, int fd); /* fd: goes along, or -1 */
void control_read(struct vmm *v);
void control_drain(struct vmm *v); /* after QEMU's end */
void control_turn(struct vmm *v);  /* what is due */

/* machine.c: the stages, one after the other, and the ends. */
void machine_begin(struct vmm *v);
void machine_greet(struct vmm *v);
void machine_set_up(struct vmm *v);
void machine_ready(struct vmm *v);
void machine_started(struct vmm *v);
void machine_end(struct vmm *v, int code);
void machine_put_away(struct vmm *v); /* SHUTDOWN is answered */
void machine_qemu_ended(struct vmm *v);
void machine_agent_gone(struct vmm *v);
void machine_shares_gone(struct vmm *v);
void machine_timeout(struct vmm *v);
void say(const char *text); /* on stderr, which is logged */
bool machine_is_up(const struct vmm *v); /* the starter may leave */
/* The machine cannot go on: kill QEMU, tell the starter or stderr, exit. */
_Noreturn void machine_lost(struct vmm *v, enum part part, int error, const char *text);
_Noreturn void machine_failed(struct vmm *v, enum part part, uint32_t section, uint32_t index,
			      int error, const char *text);

/* quiet.c */
bool is_quiet(const struct vmm *v);
bool quiet_begin(struct vmm *v, struct vmm_client *c);
void quiet_turn(struct vmm *v);
bool quiet_client(struct vmm *v, struct vmm_client *c); /* false: it has left */
void quiet_end(struct vmm *v, bool dismissed);
void rescue_read(struct vmm *v);

/* main.c */
extern const struct mux_handler vmm_handler;
void agent_read_rest(struct vmm *v);

#endif
