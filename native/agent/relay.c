/* Channels that are a stream to a process: SPAWN and EXEC to a launcher, FILES to the helper.
 * Bytes go between the channel and a socket unchanged; only the process id is read in passing.
 *
 * The main link, to the supervisor of the main process, may outlive its channel: a machine that
 * goes on somewhere else (a twin, one that was suspended or has migrated) has another monitor,
 * which adopts it. Quiet, it stands between two frames and is not read. */
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "../frames.h"
#include "../text.h"
#include "agent.h"

enum { FD_ROOT = 3, TURNS = 4 };

struct relay {
	struct watch watch; /* of our end of the socket; fd -1: the plan is not here yet */
	struct mux_channel *ch; /* NULL: over, or the main link without a channel */
	struct relay *next;
	int plan;
	uint32_t plan_len, plan_left;
	uint8_t length_len, length[4];
	uint32_t spawn;     /* the number of a SPAWN, 0 otherwise */
	uint32_t left;      /* of the supervisor's frame under way */
	uint8_t head_len, head[FRAME_HEAD + 4];
	bool reading;
	bool quiet;         /* the main link: stop at the end of a frame */
	struct buffer rest; /* of a channel that it lost: still to be sent to the process */
};

/* The main process. */

bool main_is_alive(void)
{
	struct pollfd p = { .fd = the.main_fd, .events = POLLIN };

	return the.main_fd >= 0 && poll(&p, 1, 0) == 0;
}

static void note_main(struct relay *r, pid_t pid)
{
	int fd;

	if (r->spawn < the.main_spawn || pid <= 0)
		return;
	fd = sys_pidfd_open(pid); /* -1 for one that has ended already */
	if (the.main_fd >= 0)
		close(the.main_fd);
	the.main_fd = fd;
	the.main_pid = pid;
	the.main_spawn = r->spawn;
	the.main = r;
}

/* Follow the supervisor's frames as far as is needed to see a PID among them. */
static void look_for_pid(struct relay *r, const uint8_t *at, size_t n)
{
	while (n) {
		size_t head = FRAME_HEAD;
		if (r->head_len >= FRAME_HEAD && r->head[0] == FR_PID && r->left >= 4)
			head = FRAME_HEAD + 4;
		if (r->head_len < head) {
			r->head[r->head_len++] = *at++;
			n--;
			if (r->head_len == FRAME_HEAD)
				r->left = get_u32(r->head + 4);
			if (r->head_len == FRAME_HEAD + 4) {
				r->left -= 4;
				note_main(r, (pid_t)get_u32(r->head + FRAME_HEAD));
				r->head[0] = 0;
			}
		} else {
			size_t part = n < r->left ? n : r->left;
			at += part;
			n -= part;
			r->left -= (uint32_t)part;
		}
		if (r->head_len >= FRAME_HEAD && !r->left)
			r->head_len = 0;
	}
}

/* The life of a relay. */

static void forget_plan(struct relay *r)
{
	if (r->plan >= 0)
		close(r->plan);
	r->plan = -1;
	the.pending -= r->plan_len;
	r->plan_len = 0;
}

static void end(struct relay *r)
{
	if (r->watch.fd >= 0) {
		watch_set(&r->watch, 0);
		close(r->watch.fd);
	}
	forget_plan(r);
	buffer_free(&r->rest);
	r->watch.fd = -1;
	if (r->ch)
		r->ch->owner = NULL;
	r->ch = NULL;
	r->next = the.dead;
	the.dead = r;
	if (r == the.main) {
		the.main = NULL;
		call_quiet(ESRCH);
	}
	spare_wanted(0);
}

static void end_with(struct relay *r, int error)
{
	struct mux_channel *ch = r->ch;

	end(r);
	mux_close(&the.mux, ch, (uint32_t)error);
}

void relay_free_dead(void)
{
	while (the.dead) {
		struct relay *r = the.dead;
		the.dead = r->next;
		free(r);
	}
}

/* Without room to read it is not watched at all: an end of file would be told for ever. */
static void watch_again(struct relay *r)
{
	bool writing = r->rest.len || (r->ch && r->ch->in.len);

	watch_set(&r->watch, (r->reading ? EPOLLIN : 0) | (writing ? EPOLLOUT : 0));
}

static bool between_frames(const struct relay *r)
{
	return !r->head_len;
}

/* How much may be read before the end of the frame under way. */
static size_t left_of_frame(const struct relay *r)
{
	return r->head_len < FRAME_HEAD ? (size_t)(FRAME_HEAD - r->head_len) : r->left;
}

/* Send what is left of a channel of before; true when nothing is. */
static bool flush_rest(struct relay *r)
{
	while (r->rest.len) {
		ssize_t sent = send(r->watch.fd, r->rest.data + r->rest.off, r->rest.len,
				    MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && (errno == EAGAIN || errno == EINTR))
			return false;
		buffer_drop(&r->rest, sent < 0 ? r->rest.len : (size_t)sent);
	}
	return true;
}

/* A quiet link is read to the end of the frame that was under way. */
static bool has_settled(struct relay *r)
{
	if (!r->quiet || !between_frames(r))
		return false;
	r->reading = false;
	call_quiet(0);
	return true;
}

/* From the process to the host. */
static void pump(struct relay *r)
{
	for (int i = 0; i < TURNS; i++) {
		size_t room;
		uint8_t *at;
		ssize_t n;
		if (has_settled(r))
			return;
		at = mux_space(&the.mux, r->ch, &room);
		r->reading = at != NULL;
		if (!at)
			return;
		if (r->quiet && room > left_of_frame(r))
			room = left_of_frame(r);
		n = recv(r->watch.fd, at, room, MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0) { /* it is over; what it had to say is on its way */
			end_with(r, 0);
			return;
		}
		if (r->spawn)
			look_for_pid(r, at, (size_t)n);
		mux_commit(&the.mux, r->ch, (size_t)n);
		if ((size_t)n < room && !r->quiet)
			return;
	}
	has_settled(r);
}

static void socket_ready(struct watch *w, uint32_t events)
{
	struct relay *r = (struct relay *)w; /* its first member */

	if ((events & EPOLLOUT) && flush_rest(r) && r->ch)
		mux_pull(&the.mux, r->ch);
	if (r->ch && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
		pump(r);
	if (r->watch.fd >= 0)
		watch_again(r);
}

void relay_ready(struct mux_channel *ch)
{
	struct relay *r = ch->owner;

	r->reading = true;
	watch_again(r);
}

/* The main link, standing still or without a channel. */

int main_quiesce(void)
{
	struct relay *r = the.main;

	if (!r || !r->ch)
		return ESRCH;
	r->quiet = true;
	if (!between_frames(r))
		return EINPROGRESS;
	r->reading = false;
	watch_again(r);
	return 0;
}

void main_resume(void)
{
	struct relay *r = the.main;

	if (!r || !r->quiet)
		return;
	r->quiet = false;
	r->reading = r->ch != NULL;
	watch_again(r);
}

static bool lose_channel(struct relay *r)
{
	if (r != the.main || r->watch.fd < 0)
		return false;
	if (!r->rest.len) {
		r->rest = r->ch->in;
		r->ch->in = (struct buffer){ 0 };
	} else if (r->ch->in.len && !buffer_put(&r->rest, r->ch->in.data + r->ch->in.off,
						r->ch->in.len, 2 * MUX_WINDOW)) {
		return false;
	}
	r->ch->owner = NULL;
	r->ch = NULL;
	r->reading = r->quiet = false;
	watch_again(r);
	return true;
}

/* A HELLO has come. One that does not ask to keep the main link ends it with all others. */
void relay_greeted(void)
{
	if (the.main && !the.main->ch && !the.mux.keep)
		end(the.main);
}

static int adopt(struct mux_channel *ch)
{
	if (!the.main || the.main->ch)
		return ESRCH;
	ch->owner = the.main;
	the.main->ch = ch;
	the.main->reading = true;
	watch_again(the.main);
	return 0;
}

/* Starting the process. */

static void attend(struct relay *r, int fd)
{
	r->watch = (struct watch){ .ready = socket_ready, .fd = fd };
	r->reading = true;
	watch_again(r);
}

/* The plan is whole; returns how much of what came behind it has been passed on. */
static size_t launch(struct relay *r, const uint8_t *data, size_t n, int *error)
{
	const int slot = r->ch->kind == MUX_EXEC ? the.main_fd : -1;
	size_t sent = 0;
	int fd;

	*error = r->ch->kind == MUX_EXEC && !main_is_alive() ? ESRCH : 0;
	if (*error)
		return 0;
	fd = launcher_run(r->plan, slot, data, n, &sent);
	if (fd < 0)
		*error = errno;
	else
		attend(r, fd);
	forget_plan(r);
	return sent;
}

static _Noreturn void run_files(int stream, int root)
{
	sigset_t none;

	dup2(stream, 0);
	dup2(stream, 1);
	dup2(root, FD_ROOT);
	sys_close_range(FD_ROOT + 1, ~0U, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	prctl(PR_SET_NAME, "hutch-files", 0, 0, 0);
	files_main(the.upper);
}

/* The root of the main process, or what it would have had. */
static int open_root(void)
{
	char path[64];
	struct text t = text_in(path, sizeof(path));

	if (main_is_alive()) {
		int fd;
		text_add(&t, "/proc/");
		text_add_num(&t, the.main_pid);
		text_add(&t, "/root");
		fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (fd >= 0)
			return fd;
	}
	return open(the.root, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static int start_files(struct relay *r)
{
	int ends[2], error = 0, root = open_root();
	pid_t pid;

	if (root < 0)
		return errno;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
		error = errno;
	} else {
		attend(r, ends[0]);
		pid = fork(); /* small as the agent is, this costs less than another exec */
		if (pid == 0)
			run_files(ends[1], root);
		error = pid < 0 ? errno : 0;
		close(ends[1]);
	}
	close(root);
	return error;
}

int relay_open(struct mux_channel *ch)
{
	struct relay *r;
	int error = 0;

	if (ch->kind == MUX_ADOPT)
		return adopt(ch);
	if (ch->kind < MUX_SPAWN || ch->kind > MUX_FILES)
		return EPROTONOSUPPORT;
	if (ch->kind == MUX_EXEC && !main_is_alive())
		return ESRCH;
	r = calloc(1, sizeof(*r));
	if (!r)
		return ENOMEM;
	r->watch.fd = r->plan = -1;
	r->ch = ch;
	ch->owner = r;
	if (ch->kind == MUX_SPAWN)
		r->spawn = ++the.spawns;
	if (ch->kind == MUX_FILES)
		error = start_files(r);
	if (error)
		end(r);
	return error;
}

/* The plan's length and the plan, into a memfd. */

static int plan_begins(struct relay *r)
{
	uint32_t len = get_u32(r->length);

	if (!len || len > MAX_PLAN)
		return EMSGSIZE;
	if (the.pending + len > MAX_PENDING)
		return ENOBUFS;
	r->plan = sys_memfd_create("hutch-plan", 1 /* MFD_CLOEXEC */);
	if (r->plan < 0)
		return errno;
	r->plan_len = r->plan_left = len;
	the.pending += len;
	return 0;
}

/* Take what belongs to the plan; returns how much, and errno when it cannot go on. */
static size_t take_plan(struct relay *r, const uint8_t *data, size_t n, int *error)
{
	size_t done = 0, part;

	*error = 0;
	while (done < n && r->length_len < sizeof(r->length)) {
		r->length[r->length_len++] = data[done++];
		if (r->length_len == sizeof(r->length))
			*error = plan_begins(r);
	}
	part = n - done < r->plan_left ? n - done : r->plan_left;
	if (*error || !part)
		return done;
	if (write_all(r->plan, data + done, part) < 0) {
		*error = errno;
		return done;
	}
	r->plan_left -= (uint32_t)part;
	done += part;
	if (!r->plan_left)
		done += launch(r, data + done, n - done, error);
	return done;
}

size_t relay_data(struct mux_channel *ch, const uint8_t *data, size_t n)
{
	struct relay *r = ch->owner;
	size_t done = 0;
	ssize_t sent;
	int error;

	if (r->watch.fd < 0) {
		done = take_plan(r, data, n, &error);
		if (error) {
			end_with(r, error);
			return n;
		}
		if (done == n || r->watch.fd < 0)
			return done;
	}
	if (!flush_rest(r))
		return done;
	sent = send(r->watch.fd, data + done, n - done, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent < 0 && errno != EAGAIN && errno != EINTR)
		return n; /* it listens no more: its own end tells the host */
	done += sent > 0 ? (size_t)sent : 0;
	if (done < n)
		watch_set(&r->watch, r->watch.events | EPOLLOUT);
	return done;
}

void relay_eof(struct mux_channel *ch)
{
	struct relay *r = ch->owner;

	if (r->watch.fd < 0)
		end_with(r, EPROTO); /* in the middle of a plan */
	else
		shutdown(r->watch.fd, SHUT_WR);
}

void relay_closed(struct mux_channel *ch, bool reset)
{
	if (!reset || !lose_channel(ch->owner))
		end(ch->owner);
}
