/* The loop of the supervisor: from the clone to the report of the exit. */
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "supervisor.h"
#include "text.h"

enum {
	DRAIN_NS = 250 * 1000 * 1000,  /* for pipes that somebody else keeps open */
	DRAIN_LIMIT_NS = 10LL * 1000 * 1000 * 1000,
	FLUSH_NS = 5LL * 1000 * 1000 * 1000, /* for clients that may lose output anyway */
};

enum watched { W_REPORT, W_PROCESS, W_OLD, W_LISTEN, W_STDOUT, W_STDERR, W_STDIN, W_HEALTH,
	       W_CLIENT };

struct watch {
	struct pollfd fds[W_CLIENT + MAX_CLIENTS];
	uint8_t who[W_CLIENT + MAX_CLIENTS];
	nfds_t count;
};

static void reap_target(struct supervisor *s)
{
	if (s->pidfd < 0)
		return;
	sys_pidfd_send_signal(s->pidfd, SIGKILL);
	while (waitid(P_PIDFD, (id_t)s->pidfd, &s->exit, WEXITED) < 0 && errno == EINTR)
		;
}

/* Only an overlay made here is held on to: unmounting it syncs, so it comes last. */
static void close_slots(struct supervisor *s, bool overlays)
{
	for (int i = 0; i < MAX_SLOTS; i++) {
		if (s->launch.slots[i] < 0 || (!overlays && s->launch.overlay[i]))
			continue;
		close(s->launch.slots[i]);
		s->launch.slots[i] = -1;
	}
}

/* A tree that was half brought back hangs on to us, and waits for a helper that is gone. */
static void kill_children(void)
{
	char path[64], text[4096];
	struct text t = text_in(path, sizeof(path));
	ssize_t n;
	int fd, pid = 0;

	text_add(&t, "/proc/self/task/");
	text_add_num(&t, getpid());
	text_add(&t, "/children");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, text, sizeof(text));
	for (ssize_t i = 0; i < n; i++) {
		if (text[i] >= '0' && text[i] <= '9') {
			pid = pid * 10 + text[i] - '0';
			continue;
		}
		if (pid > 0)
			kill(pid, SIGKILL);
		pid = 0;
	}
	if (fd >= 0)
		close(fd);
}

static void end_aide(struct supervisor *s)
{
	if (!s->aide)
		return;
	kill(s->aide, SIGKILL);
	waitpid(s->aide, NULL, 0);
	kill_children();
}

_Noreturn void launch_failed(struct supervisor *s, uint8_t section, uint32_t index, int error,
			     const char *detail)
{
	uint8_t body[8 + DETAIL];
	struct client *c = starter_of(s);
	size_t len = strnlen(detail, DETAIL);

	put_u32(body, index);
	put_u32(body + 4, (uint32_t)error);
	memcpy(body + 8, detail, len);
	/* Undo first: when the starter is told, nothing is left. */
	if (s->report >= 0)
		close(s->report); /* a process between Fork and its report ends on this */
	reap_target(s);
	end_aide(s);
	while (waitpid(-1, NULL, 0) > 0)
		;
	record_remove(s);
	if (s->dir >= 0)
		unlinkat(s->dir, "pid", 0);
	close_slots(s, true);
	if (c) {
		fcntl(c->fd, F_SETFL, O_RDWR); /* block: this is the last frame */
		client_send(s, c, FR_FAILED, section, body, 8 + len);
		client_flush(s, c);
	}
	_exit(1);
}

static void on_report(struct supervisor *s);

/* The launch is undone, unless the program may have begun already: then it goes on. What the
 * child has not told us by now it cannot tell any more, and without that it does not exec. */
static void launch_left(struct supervisor *s)
{
	if (!(s->plan.flags & HOLD_LINGER))
		launch_failed(s, SECTION_SUPERVISE, 0, ECANCELED, "the starter left");
	shutdown(s->report, SHUT_RD);
	while (s->state == LAUNCHING)
		on_report(s);
}

void starter_left(struct supervisor *s)
{
	s->starter_gone = true;
	if (s->state == LAUNCHING)
		launch_left(s);
	if (s->state == RUNNING && !(s->plan.flags & HOLD_LINGER))
		sys_pidfd_send_signal(s->pidfd, SIGKILL);
}

/* In one message with its word, the child gets the rest of its plan. */
int answer_go(struct supervisor *s, int32_t number, const uint8_t *rest, size_t n)
{
	char gate = GATE_GO;
	union { const uint8_t *from; void *to; } r = { .from = rest };
	struct iovec iov[2] = { { &gate, 1 }, { r.to, n } };

	if (s->sync_open < 0 || s->sync_open != number)
		return fail(EINVAL);
	s->sync_open = -1;
	return writev(s->report, iov, 2) == (ssize_t)(1 + n) ? 0 : -1;
}

void tell_pid(struct supervisor *s)
{
	uint8_t body[8];

	put_u32(body, (uint32_t)s->pid);
	put_u32(body + 4, (uint32_t)getpid());
	tell_starter(s, FR_PID, 0, body, sizeof(body));
}

static void tell_sync(struct supervisor *s, int32_t number)
{
	uint8_t body[4];

	s->sync_open = number;
	put_u32(body, (uint32_t)number);
	tell_starter(s, FR_SYNC, 0, body, sizeof(body));
	uncork(s);
}

/* The process went on as a new one (Fork): follow that. */
static void follow(struct supervisor *s, pid_t pid)
{
	s->old_pidfd = s->pidfd;
	s->pidfd = sys_pidfd_open(pid);
	s->pid = pid;
	s->forked = true;
	if (s->pidfd < 0)
		launch_failed(s, SECTION_CHILD, 0, errno, "pidfd_open");
	tell_pid(s);
	record_pid(s);
	if (s->sync_held >= 0)
		tell_sync(s, s->sync_held);
	s->sync_held = -1;
}

/* Give back the plan but for its first part, which the supervisor goes on using. */
static void started(struct supervisor *s)
{
	uint8_t body[8];

	close(s->report);
	s->report = -1;
	s->state = RUNNING;
	close_slots(s, false);
	s->started_ns = now_ns();
	put_u64(body, s->started_ns);
	tell_starter(s, FR_STARTED, 0, body, sizeof(body));
	uncork(s);
	input_pump(s);
	health_start(s);
}

static void report_ended(struct supervisor *s)
{
	if (s->exec_seen && (s->forked || !s->plan.has_fork)) {
		started(s);
		return;
	}
	launch_failed(s, SECTION_CHILD, 0, ECHILD, "the process ended before exec");
}

static int passed_fd(struct msghdr *msg)
{
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg);
	int fd;

	if (!cmsg || cmsg->cmsg_type != SCM_RIGHTS)
		return -1;
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
	return fd;
}

static void on_report(struct supervisor *s)
{
	struct report report;
	struct iovec iov = { .iov_base = &report, .iov_len = sizeof(report) };
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	ssize_t n = recvmsg(s->report, &msg, MSG_CMSG_CLOEXEC);

	/* A child that ended without reading our word resets the connection once; what it had
	 * sent is still there. */
	if (n < 0 && (errno == EINTR || errno == ECONNRESET))
		return;
	if (n != sizeof(report)) {
		report_ended(s);
		return;
	}
	switch (report.kind) {
	case REPORT_FAIL:
		report.detail[DETAIL - 1] = 0;
		launch_failed(s, report.section, report.index, report.error, report.detail);
	case REPORT_EXEC: s->exec_seen = true; break;
	case REPORT_FORKED: follow(s, report.number); break;
	case REPORT_AIDE: s->aide = report.number; break;
	case REPORT_TTY:
		if (stdio_take_terminal(s, passed_fd(&msg)) < 0)
			launch_failed(s, SECTION_CHILD, report.index, errno, "terminal");
		break;
	case REPORT_SYNC:
		if (s->plan.has_fork && !s->forked)
			s->sync_held = report.number;
		else
			tell_sync(s, report.number);
		break;
	default: launch_failed(s, SECTION_CHILD, report.index, EPROTO, "report");
	}
}

/* The loop may see the end of the process before it sees that a client has died. */
bool is_gone(const struct client *c)
{
	struct pollfd peer = { .fd = c->fd };

	return c->fd < 0 || c->ended ||
	       (poll(&peer, 1, 0) > 0 && (peer.revents & (POLLHUP | POLLERR)));
}

/* Whether somebody who knows of the exit sees to what follows from it. */
static bool is_seen_to(struct supervisor *s)
{
	const struct client *starter = starter_of(s);

	if (!(s->plan.flags & HOLD_EXIT_ALWAYS) && !s->starter_gone && starter && !is_gone(starter))
		return true;
	for (int i = 0; i < MAX_CLIENTS; i++)
		if (s->clients[i].used && s->clients[i].claims && !is_gone(&s->clients[i]))
			return true;
	return false;
}

static void spawn_exit_command(struct supervisor *s)
{
	extern char **environ;
	struct reader r = s->plan.exit_command;
	uint32_t count = read_count(&r);
	char *argv[65];
	pid_t pid;

	if (!count || count > 64)
		return;
	for (uint32_t i = 0; i < count; i++) {
		union { const char *from; char *to; } word = { .from = read_str(&r) };
		argv[i] = word.to;
	}
	argv[count] = NULL;
	pid = fork();
	if (pid == 0) {
		if (fork() != 0)
			_exit(0);
		setsid();
		for (int signum = 1; signum < NSIG; signum++)
			signal(signum, SIG_DFL);
		sys_close_range(3, ~0U, 0);
		execve(argv[0], argv, environ);
		_exit(127);
	}
	if (pid > 0)
		waitpid(pid, NULL, 0);
}

static void finish(struct supervisor *s)
{
	uint8_t body[24];
	bool signaled = s->exit.si_code != CLD_EXITED, is_seen;

	stream_drain(s);
	for (int i = 0; i < 2; i++) {
		if (s->streams[i] >= 0)
			close(s->streams[i]);
		s->streams[i] = -1;
	}
	health_stop(s);
	record_exit(s);
	put_u32(body, (uint32_t)(signaled ? 128 + s->exit.si_status : s->exit.si_status));
	put_u32(body + 4, (uint32_t)(signaled ? s->exit.si_status : 0));
	put_u64(body + 8, s->exit_ns);
	put_u64(body + 16, s->started_ns);
	/* Whoever learns of the exit may start the next supervisor in this directory. */
	record_remove(s);
	/* Asked before it is told: who hears of the exit sees to the rest, and may leave at once. */
	is_seen = is_seen_to(s);
	tell_all(s, FR_EXIT, s->exit.si_code == CLD_DUMPED, body, sizeof(body));
	if (!is_seen)
		spawn_exit_command(s);
	s->state = DONE;
	s->flush_until_ns = mono_ns() + FLUSH_NS;
}

static void on_old(struct supervisor *s)
{
	waitid(P_PIDFD, (id_t)s->old_pidfd, &(siginfo_t){ 0 }, WEXITED);
	close(s->old_pidfd);
	s->old_pidfd = -1;
	if (s->aide)
		waitpid(s->aide, NULL, 0); /* it ended before the old process could tell of the new one */
	s->aide = 0;
}

static void on_process(struct supervisor *s)
{
	/* What the process said before it ended comes first. */
	while (s->state == LAUNCHING) {
		struct pollfd said = { .fd = s->report, .events = POLLIN };
		int before = s->pidfd;
		if (poll(&said, 1, 0) > 0)
			on_report(s);
		else if (s->old_pidfd >= 0)
			on_old(s); /* it is about to end, and its end of the socket with it */
		else /* killed between Fork and telling of it */
			report_ended(s);
		if (s->pidfd != before)
			return; /* it was the old one, of Fork */
	}
	if (waitid(P_PIDFD, (id_t)s->pidfd, &s->exit, WEXITED) < 0)
		return;
	s->exit_ns = now_ns();
	s->state = DRAINING;
	close(s->pidfd);
	s->pidfd = -1;
	terminal_release(s);
	stream_drain(s);
	s->drain_until_ns = mono_ns() + DRAIN_NS;
	if (streams_ended(s))
		finish(s);
}

static void watch(struct watch *w, int fd, short events, int who)
{
	if (fd < 0)
		return;
	w->fds[w->count] = (struct pollfd){ .fd = fd, .events = events };
	w->who[w->count++] = (uint8_t)who;
}

static short client_events(const struct client *c)
{
	/* A queue goes out before more requests come in: a client that does not read its
	 * answers cannot make us hold more of them. */
	if (c->queue.len > QUEUE_LIMIT)
		return POLLOUT;
	return (short)(POLLIN | (!c->corked && (c->queue.len || c->gap) ? POLLOUT : 0));
}

static void watch_all(const struct supervisor *s, struct watch *w)
{
	w->count = 0;
	watch(w, s->report, POLLIN, W_REPORT);
	watch(w, s->pidfd, POLLIN, W_PROCESS);
	watch(w, s->old_pidfd, POLLIN, W_OLD);
	if (!s->accept_ns)
		watch(w, s->listen, POLLIN, W_LISTEN);
	for (int i = 0; i < 2; i++)
		if (s->state != LAUNCHING && clients_have_room(s, i + 1))
			watch(w, s->streams[i], POLLIN, W_STDOUT + i);
	if (s->state == RUNNING && (input_pending(s) || !(s->plan.flags & HOLD_TTY)))
		watch(w, s->input, input_pending(s) ? POLLOUT : 0, W_STDIN);
	watch(w, s->health.fd, POLLIN, W_HEALTH);
	for (int i = 0; i < MAX_CLIENTS; i++)
		if (s->clients[i].used)
			watch(w, s->clients[i].fd, client_events(&s->clients[i]), W_CLIENT + i);
}

static void on_client(struct supervisor *s, struct client *c, short events)
{
	if (!c->used || c->fd < 0)
		return;
	if (c->ended) {
		client_drop(s, c);
		return;
	}
	if (events & POLLOUT)
		client_flush(s, c);
	if (events & (POLLIN | POLLHUP | POLLERR))
		client_read(s, c);
}

static void dispatch(struct supervisor *s, int who, int fd, short events)
{
	switch (who) {
	case W_REPORT:
		if (s->report >= 0)
			on_report(s);
		break;
	case W_PROCESS:
		if (s->pidfd == fd) /* a report just before may have named another process */
			on_process(s);
		break;
	case W_OLD:
		if (s->old_pidfd == fd)
			on_old(s);
		break;
	case W_LISTEN: client_accept(s); break;
	case W_STDOUT:
	case W_STDERR:
		stream_read(s, who - W_STDOUT);
		break;
	case W_STDIN:
		if (events & (POLLERR | POLLHUP))
			input_check(s);
		else
			input_pump(s);
		break;
	case W_HEALTH: health_read(s); break;
	default: on_client(s, &s->clients[who - W_CLIENT], events);
	}
}

static void sooner(uint64_t *deadline, uint64_t other)
{
	if (other && (!*deadline || other < *deadline))
		*deadline = other;
}

static int timeout_ms(const struct supervisor *s)
{
	uint64_t deadline = 0, now = mono_ns();

	if (s->state == DRAINING) {
		sooner(&deadline, s->drain_until_ns + DRAIN_LIMIT_NS);
		if (now < s->drain_until_ns)
			sooner(&deadline, s->drain_until_ns);
	}
	if (s->state == DONE)
		sooner(&deadline, s->flush_until_ns);
	sooner(&deadline, health_deadline(s));
	sooner(&deadline, s->accept_ns);
	if (!deadline)
		return -1;
	return deadline <= now ? 0 : (int)((deadline - now) / 1000000 + 1);
}

/* After the exit was told: is somebody still reading what we hold for them? */
static bool is_flushed(struct supervisor *s)
{
	bool in_time = mono_ns() < s->flush_until_ns, waiting = false;

	for (int i = 0; i < MAX_CLIENTS; i++) {
		struct client *c = &s->clients[i];
		if (!c->used || c->fd < 0)
			continue;
		if (!c->queue.len || c->ended)
			shutdown(c->fd, SHUT_WR);
		else if (in_time || (c->attach & ATTACH_LOSSLESS))
			waiting = true;
	}
	return !waiting;
}

/* After the process: what else holds its streams open may finish its sentence, and a
 * lossless client may make room for that. */
static bool is_drained(const struct supervisor *s)
{
	uint64_t now = mono_ns();

	if (streams_ended(s) || now >= s->drain_until_ns + DRAIN_LIMIT_NS)
		return true;
	return now >= s->drain_until_ns && clients_have_room(s, 1) && clients_have_room(s, 2);
}

_Noreturn void supervise(struct supervisor *s)
{
	struct watch w;

	for (;;) {
		if (s->state == DRAINING && is_drained(s))
			finish(s);
		if (s->state == DONE && is_flushed(s))
			break;
		if (s->accept_ns && mono_ns() >= s->accept_ns)
			s->accept_ns = 0;
		watch_all(s, &w);
		if (poll(w.fds, w.count, timeout_ms(s)) < 0 && errno != EINTR)
			_exit(1);
		for (nfds_t i = 0; i < w.count; i++)
			if (w.fds[i].revents)
				dispatch(s, w.who[i], w.fds[i].fd, w.fds[i].revents);
		health_tick(s, mono_ns());
	}
	for (int i = 0; i < MAX_CLIENTS; i++)
		if (s->clients[i].used && s->clients[i].fd >= 0)
			close(s->clients[i].fd);
	_exit(0);
}
