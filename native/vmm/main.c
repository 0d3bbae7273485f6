/* The loop: signals, QEMU, the agent's channel, the starter, stdio and the clients. */
#include <limits.h>
#include <poll.h>
#include <sys/signalfd.h>

#include "../text.h"
#include "hold.h"
#include "vmm.h"

static struct vmm the;

enum watched { W_SIGNALS, W_AGENT, W_STATUS, W_LISTEN, W_STDIN, W_STDOUT, W_STDERR, W_RESCUE,
	       W_PORT, W_SCREEN, W_CONTROL, W_TYPED, W_WAITING, W_SHARES, W_LOGS, W_CLIENT = W_LOGS + LOGS };

struct watch {
	struct pollfd fds[W_CLIENT + MAX_VMM_CLIENTS];
	uint16_t who[W_CLIENT + MAX_VMM_CLIENTS];
	nfds_t count;
};

/* What the mux hears. */

static enum owner owner_of(const struct mux_channel *ch)
{
	enum owner owner;

	memcpy(&owner, ch->owner, sizeof(owner));
	return owner;
}

static int on_opened(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	(void)ch;
	return ENOSYS; /* never: the host opens */
}

static size_t on_data(struct mux *m, struct mux_channel *ch, const uint8_t *data, size_t n)
{
	(void)m;
	switch (owner_of(ch)) {
	case OWNER_PROCESS: return process_data(&the, data, n);
	case OWNER_CALL: return call_data(ch->owner, data, n);
	default: return client_data(&the, ch->owner, data, n);
	}
}

static void on_eof(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	if (owner_of(ch) == OWNER_CLIENT)
		client_eof(ch->owner);
}

static void on_closed(struct mux *m, struct mux_channel *ch, uint32_t error)
{
	(void)m;
	switch (owner_of(ch)) {
	case OWNER_PROCESS: process_closed(&the, error); break;
	case OWNER_CALL: call_over(&the, ch->owner, error); break;
	default: client_closed(&the, ch->owner, error);
	}
}

/* Whoever could not send is polled for again: that is enough. */
static void on_ready(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	if (owner_of(ch) == OWNER_CALL)
		call_pump(&the, ch->owner);
}

static void on_greeted(struct mux *m)
{
	(void)m;
	machine_set_up(&the);
}

const struct mux_handler vmm_handler = {
	.opened = on_opened, .data = on_data, .eof = on_eof, .closed = on_closed,
	.ready = on_ready, .greeted = on_greeted,
};

static void agent_result(struct vmm *v, enum mux_result result)
{
	if (result == MUX_GONE)
		machine_agent_gone(v);
	else if (result == MUX_BROKEN)
		machine_lost(v, PART_AGENT, EPROTO, v->mux.problem);
}

void agent_read_rest(struct vmm *v)
{
	struct pollfd p = { .fd = FD_AGENT, .events = POLLIN };

	/* Somebody else may hold the other end open: then there is an end without an end of file. */
	while (!v->agent_gone && v->stage < ST_SHUTDOWN && poll(&p, 1, 0) > 0)
		agent_result(v, mux_read(&v->mux));
}

/* Signals. */

static const uint64_t all_signals = ~0ull; /* C libraries keep some to themselves: by system call */

static void block_signals(void)
{
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all_signals, NULL, sizeof(all_signals));
}

static int open_signals(void)
{
	return (int)syscall(SYS_signalfd4, -1, &all_signals, sizeof(all_signals),
			    SFD_CLOEXEC | SFD_NONBLOCK);
}

static void on_signal(struct vmm *v, const struct signalfd_siginfo *info)
{
	int signum = (int)info->ssi_signo;

	if (signum == SIGCHLD && info->ssi_code > 0)
		return; /* of a child: whatever came, children are looked for */
	if (info->ssi_code <= 0 && info->ssi_pid == (uint32_t)getpid())
		return; /* SIGPIPE of our own writing */
	if (v->stage >= ST_SHUTDOWN)
		return;
	if (v->config.flags & CONFIG_CONSOLE) {
		console_signal(signum);
		return;
	}
	if (v->stage == ST_RUN && !v->process.started) {
		if (signum == SIGTERM || signum == SIGINT || signum == SIGHUP || signum == SIGQUIT)
			machine_end(v, 0);
		return;
	}
	process_signal(v, signum);
}

static void on_signals(struct vmm *v)
{
	struct signalfd_siginfo info;

	while (read(v->signals, &info, sizeof(info)) == sizeof(info))
		on_signal(v, &info);
	if (qemu_reap(v))
		machine_qemu_ended(v);
}

/* The loop. */

static void watch(struct watch *w, int fd, short events, int who)
{
	w->fds[w->count] = (struct pollfd){ .fd = fd, .events = events };
	w->who[w->count++] = (uint16_t)who;
}

static void watch_clients(struct vmm *v, struct watch *w)
{
	/* Another one is first in each turn: nobody's bytes always come before the others'. */
	uint32_t first = v->turn++ % MAX_VMM_CLIENTS;

	for (uint32_t i = 0; i < MAX_VMM_CLIENTS; i++) {
		uint32_t at = (first + i) % MAX_VMM_CLIENTS;
		short events = v->clients[at].used ? client_events(&v->clients[at]) : -1;
		if (events >= 0)
			watch(w, v->clients[at].fd, events, W_CLIENT + (int)at);
	}
}

static void watch_console(struct vmm *v, struct watch *w)
{
	const struct console *c = &v->console;

	if (v->stage != ST_RUN)
		return;
	if (!v->accept_ns)
		watch(w, FD_LISTEN, POLLIN, W_SCREEN);
	if (!v->agent_gone && !c->output.len)
		watch(w, FD_AGENT, POLLIN, W_PORT);
	if (c->stdin_open && !c->input.len)
		watch(w, 0, POLLIN, W_TYPED);
	if (c->output.len)
		watch(w, 1, POLLOUT, W_WAITING);
	if (!v->agent_gone && c->input.len)
		watch(w, FD_AGENT, POLLOUT, W_WAITING);
}

static void watch_agent(struct vmm *v, struct watch *w)
{
	short agent = 0;

	if (mux_may_read(&v->mux) && v->stage > ST_HELD)
		agent |= POLLIN;
	if (mux_pending(&v->mux))
		agent |= POLLOUT;
	if (!v->agent_gone && agent)
		watch(w, FD_AGENT, agent, W_AGENT);
	if (v->stage == ST_RUN && !v->agent_gone && !v->accept_ns && clients_have_place(v))
		watch(w, FD_LISTEN, POLLIN, W_LISTEN);
	if (process_wants_stdin(v))
		watch(w, 0, POLLIN, W_STDIN);
	for (int i = 0; i < 2; i++)
		if (v->process.blocked[i])
			watch(w, i + 1, POLLOUT, W_STDOUT + i);
	if (v->rescue >= 0)
		watch(w, v->rescue, POLLIN, W_RESCUE);
	watch_clients(v, w);
}

static void watch_all(struct vmm *v, struct watch *w)
{
	w->count = 0;
	watch(w, v->signals, POLLIN, W_SIGNALS);
	if (v->status >= 0)
		watch(w, v->status, POLLIN, W_STATUS);
	if (v->control.open)
		watch(w, FD_CONTROL, POLLIN, W_CONTROL);
	if (!v->shares_gone)
		watch(w, FD_SHARES, 0, W_SHARES); /* its end is told without being asked for */
	for (int i = 0; i < LOGS; i++)
		if (v->logs[i].pipe >= 0)
			watch(w, v->logs[i].pipe, POLLIN, W_LOGS + i);
	if (v->config.flags & CONFIG_CONSOLE)
		watch_console(v, w);
	else
		watch_agent(v, w);
}

static void on_agent(struct vmm *v, short events)
{
	if (!v->agent_gone && (events & (POLLIN | POLLHUP | POLLERR)))
		agent_result(v, mux_read(&v->mux));
}

static void dispatch(struct vmm *v, int who, short events)
{
	struct vmm_client *c;

	switch (who) {
	case W_SIGNALS: on_signals(v); break;
	case W_AGENT: on_agent(v, events); break;
	case W_STATUS:
		if (v->status >= 0)
			status_read(v);
		break;
	case W_LISTEN: clients_accept(v); break;
	case W_STDIN: process_read_stdin(v); break;
	case W_STDOUT:
	case W_STDERR: process_pull(v); break;
	case W_RESCUE: rescue_read(v); break;
	case W_PORT: console_read_port(v); break;
	case W_SCREEN: console_accept(v); break;
	case W_CONTROL: control_read(v); break;
	case W_TYPED: console_read_stdin(v); break;
	case W_WAITING: console_write(v); break;
	case W_SHARES: machine_shares_gone(v); break;
	case W_LOGS + LOG_QEMU:
	case W_LOGS + LOG_CONSOLE: log_read(&v->logs[who - W_LOGS]); break;
	default:
		c = &v->clients[who - W_CLIENT];
		if (c->used)
			client_event(v, c, events);
	}
}

static int timeout_ms(const struct vmm *v)
{
	uint64_t now = mono_ns(), due = v->deadline_ns, retry = v->control.retry_ns;

	if (retry && (!due || retry < due))
		due = retry;
	if (v->accept_ns && (!due || v->accept_ns < due))
		due = v->accept_ns;
	if (!due)
		return -1;
	if (due <= now)
		return 0;
	if (due - now > INT_MAX * 1000000ull)
		return INT_MAX;
	return (int)((due - now) / 1000000 + 1);
}

static _Noreturn void run(struct vmm *v)
{
	static struct watch w;

	for (;;) {
		process_turn(v);
		quiet_turn(v);
		control_turn(v);
		if (!v->agent_gone)
			agent_result(v, mux_flush(&v->mux));
		if (v->accept_ns && mono_ns() >= v->accept_ns)
			v->accept_ns = 0;
		watch_all(v, &w);
		if (poll(w.fds, w.count, timeout_ms(v)) < 0 && errno != EINTR)
			machine_lost(v, PART_QEMU, errno, "poll");
		for (nfds_t i = 0; i < w.count; i++)
			if (w.fds[i].revents)
				dispatch(v, w.who[i], w.fds[i].revents);
		if (v->deadline_ns && mono_ns() >= v->deadline_ns)
			machine_timeout(v);
	}
}

static const char *check_descriptors(const struct config *c)
{
	for (int fd = FD_AGENT; fd < FD_QEMU + (int)c->fds; fd++)
		if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
			return "a descriptor is missing";
	sys_close_range((unsigned)FD_QEMU + c->fds, ~0U, 0);
	for (int fd = 0; fd <= FD_LISTEN; fd++)
		if (fd != FD_CONFIG && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0)
			return "a descriptor does not do without waiting";
	return NULL;
}

int main(int argc, char **argv)
{
	struct vmm *v = &the;
	const char *problem;

	if (argc == 3 && !strcmp(argv[1], "hold"))
		return hold_memory(argv[2]);
	if (argc == 4 && !strcmp(argv[1], "exec"))
		return probe_guest(argv[2], argv[3]);
	block_signals();
	v->status = FD_STATUS;
	v->rescue = v->quiet.monitor = -1;
	v->logs[LOG_QEMU].pipe = v->logs[LOG_CONSOLE].pipe = -1;
	v->process.owner = OWNER_PROCESS;
	if (!config_load(&v->config, &problem))
		machine_failed(v, PART_CONFIG, 0, 0, EPROTO, problem);
	problem = check_descriptors(&v->config);
	if (problem)
		machine_failed(v, PART_CONFIG, 0, 0, errno, problem);
	v->signals = open_signals();
	if (v->signals < 0)
		machine_failed(v, PART_CONFIG, 0, 0, errno, "signalfd");
	if (v->config.flags & CONFIG_TTY)
		terminal_raw();
	mux_init(&v->mux, FD_AGENT, true, &vmm_handler);
	machine_begin(v);
	run(v);
}
