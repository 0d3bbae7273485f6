/* Connections: frames in and out, each client's bounded queue. */
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "supervisor.h"
#include "text.h"

struct client *starter_of(struct supervisor *s)
{
	for (int i = 0; i < MAX_CLIENTS; i++)
		if (s->clients[i].used && s->clients[i].starter && s->clients[i].fd >= 0)
			return &s->clients[i];
	return NULL;
}

void client_add(struct supervisor *s, int fd, bool starter)
{
	for (int i = 0; i < MAX_CLIENTS; i++) {
		struct client *c = &s->clients[i];
		if (c->used)
			continue;
		memset(c, 0, sizeof(*c));
		c->fd = fd;
		c->used = true;
		c->starter = starter;
		return;
	}
	close(fd);
}

void client_accept(struct supervisor *s)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);
	int fd = accept4(s->listen, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0) {
		if (is_exhausted(errno))
			s->accept_ns = mono_ns() + ACCEPT_PAUSE_MS * 1000000ull;
		return;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0 ||
	    (peer.uid != 0 && peer.uid != geteuid())) {
		close(fd);
		return;
	}
	client_add(s, fd, false);
}

static void client_free(struct client *c)
{
	buffer_free(&c->input);
	buffer_free(&c->queue);
	memset(c, 0, sizeof(*c));
	c->fd = -1;
}

void client_drop(struct supervisor *s, struct client *c)
{
	bool starter = c->starter;

	if (c->fd < 0)
		return;
	close(c->fd);
	c->fd = -1;
	s->accept_ns = 0;
	buffer_free(&c->queue);
	if ((c->attach & ATTACH_STDIN) && (s->plan.flags & HOLD_STDIN_ONCE))
		c->stdin_eof = true;
	if (!c->input.len && !c->stdin_eof)
		client_free(c);
	else
		input_pump(s);
	if (starter)
		starter_left(s);
}

static size_t try_send(struct client *c, const uint8_t *head, const void *data, size_t n)
{
	union { const void *from; void *to; } h = { .from = head }, d = { .from = data };
	struct iovec iov[2] = { { h.to, FRAME_HEAD }, { d.to, n } };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n ? 2 : 1 };
	ssize_t done = sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (done < 0 && errno != EAGAIN && errno != EINTR)
		c->ended = true; /* found by the next poll; the reader decides */
	return done > 0 ? (size_t)done : 0;
}

static void frame_send(struct client *c, uint8_t type, uint8_t flag, const void *data, size_t n,
		       size_t limit)
{
	uint8_t head[FRAME_HEAD] = { type, flag };
	size_t done;

	if (c->fd < 0 || c->ended)
		return;
	put_u32(head + 4, (uint32_t)n);
	done = c->queue.len || c->corked ? 0 : try_send(c, head, data, n);
	if (done < FRAME_HEAD &&
	    !buffer_put(&c->queue, head + done, FRAME_HEAD - done, limit + FRAME_HEAD))
		c->ended = true;
	done = done > FRAME_HEAD ? done - FRAME_HEAD : 0;
	if (!c->ended && done < n &&
	    !buffer_put(&c->queue, (const char *)data + done, n - done, limit))
		c->ended = true;
}

void client_send(struct supervisor *s, struct client *c, uint8_t type, uint8_t flag,
		 const void *data, size_t n)
{
	(void)s;
	frame_send(c, type, flag, data, n, QUEUE_FINAL + FRAME_MAX);
}

/* Let the starter have what was kept for it. An emulated processor pays more for waking the
 * starter than for a frame, so the agent's starters get those of a launch together. */
void uncork(struct supervisor *s)
{
	struct client *c = starter_of(s);

	if (!c || !c->corked)
		return;
	c->corked = false;
	client_flush(s, c);
}

void tell_starter(struct supervisor *s, uint8_t type, uint8_t flag, const void *data, size_t n)
{
	struct client *c = starter_of(s);

	if (c)
		client_send(s, c, type, flag, data, n);
}

void tell_all(struct supervisor *s, uint8_t type, uint8_t flag, const void *data, size_t n)
{
	for (int i = 0; i < MAX_CLIENTS; i++)
		if (s->clients[i].used)
			client_send(s, &s->clients[i], type, flag, data, n);
}

static uint8_t attach_bit(int stream)
{
	return stream == 2 ? ATTACH_STDERR : ATTACH_STDOUT;
}

/* A client that may lose output gets a note of how much, in its place in the stream. */
static bool has_room_after_gap(struct client *c, size_t n)
{
	uint8_t lost[8];

	if (c->queue.len + n + 3 * FRAME_HEAD > QUEUE_LIMIT) {
		c->gap += n;
		return false;
	}
	if (c->gap) {
		put_u64(lost, c->gap);
		c->gap = 0;
		frame_send(c, FR_GAP, 0, lost, sizeof(lost), QUEUE_LIMIT);
	}
	return true;
}

void tell_output(struct supervisor *s, int stream, const char *data, size_t n)
{
	for (int i = 0; i < MAX_CLIENTS; i++) {
		struct client *c = &s->clients[i];
		if (!c->used || c->fd < 0 || !(c->attach & attach_bit(stream)))
			continue;
		if (c->attach & ATTACH_LOSSLESS)
			frame_send(c, FR_OUTPUT, (uint8_t)stream, data, n, QUEUE_FINAL);
		else if (has_room_after_gap(c, n))
			frame_send(c, FR_OUTPUT, (uint8_t)stream, data, n, QUEUE_LIMIT);
	}
}

bool clients_have_room(const struct supervisor *s, int stream)
{
	for (int i = 0; i < MAX_CLIENTS; i++) {
		const struct client *c = &s->clients[i];
		if (c->used && c->fd >= 0 && !c->ended && (c->attach & ATTACH_LOSSLESS) &&
		    (c->attach & attach_bit(stream)) && c->queue.len > QUEUE_LIMIT - CHUNK)
			return false;
	}
	return true;
}

void client_flush(struct supervisor *s, struct client *c)
{
	while (c->queue.len) {
		ssize_t done = send(c->fd, c->queue.data + c->queue.off, c->queue.len,
				    MSG_NOSIGNAL | MSG_DONTWAIT);
		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && errno == EAGAIN)
			return;
		if (done < 0) {
			client_drop(s, c);
			return;
		}
		buffer_drop(&c->queue, (size_t)done);
	}
	if (c->gap)
		has_room_after_gap(c, 0);
}

static int send_signal(struct supervisor *s, uint32_t signum)
{
	if (s->pidfd < 0 || s->state >= DRAINING)
		return fail(ESRCH);
	if (signum >= NSIG)
		return fail(EINVAL);
	return sys_pidfd_send_signal(s->pidfd, (int)signum);
}

static int resize(struct supervisor *s, const uint8_t *body)
{
	struct winsize size = { 0 };

	if (!(s->plan.flags & HOLD_TTY) || s->streams[0] < 0)
		return fail(ENOTTY);
	memcpy(&size.ws_row, body, 2);
	memcpy(&size.ws_col, body + 2, 2);
	return ioctl(s->streams[0], TIOCSWINSZ, &size);
}

static void send_state(struct supervisor *s, struct client *c)
{
	uint8_t body[32] = { 0 };

	put_u32(body, (uint32_t)s->state);
	put_u32(body + 4, (uint32_t)s->pid);
	put_u32(body + 8, (uint32_t)getpid());
	put_u64(body + 16, s->started_ns);
	put_u64(body + 24, s->exit_ns);
	client_send(s, c, FR_STATE, 0, body, sizeof(body));
}

void client_attach(struct supervisor *s, struct client *c, uint8_t flags)
{
	if ((flags & ATTACH_STDIN) && !(s->plan.flags & HOLD_STDIN))
		flags &= (uint8_t)~ATTACH_STDIN;
	c->attach = flags;
}

/* The starter's may carry the rest of a plan. */
static bool is_go(const struct client *c)
{
	return c->starter && c->head[0] == FR_GO;
}

static int go(struct supervisor *s, const struct client *c)
{
	struct buffer whole = s->go;
	const uint8_t *body = c->body;
	int result;

	s->go = (struct buffer){ 0 };
	if (is_go(c))
		body = (const uint8_t *)whole.data + whole.off;
	result = answer_go(s, (int32_t)get_u32(body), body + 4, c->body_len - 4);
	buffer_free(&whole);
	return result;
}

static int control(struct supervisor *s, struct client *c, uint8_t type, uint8_t flag)
{
	static const uint8_t least[] = { [FR_GO] = 4, [FR_RESIZE] = 4, [FR_SIGNAL] = 4,
					 [FR_DETACH] = 0 };

	if (type < sizeof(least) && c->body_len < least[type])
		return fail(EPROTO);
	switch (type) {
	case FR_GO: return go(s, c);
	case FR_ATTACH: client_attach(s, c, flag); return 0;
	case FR_DETACH: c->attach = 0; return 0;
	case FR_RESIZE: return resize(s, c->body);
	case FR_SIGNAL: return send_signal(s, get_u32(c->body));
	case FR_SHUTDOWN: return send_signal(s, SIGKILL);
	case FR_WAIT: /* everybody is told the exit; with a flag this client sees to the rest */
		c->claims = flag & 1;
		return 0;
	case FR_LOG_REOPEN: return s->log.fd < 0 ? 0 : log_open(&s->log);
	default: return fail(EPROTO);
	}
}

static void frame_received(struct supervisor *s, struct client *c)
{
	uint8_t type = c->head[0], flag = c->head[1], error[4];

	c->head_len = 0;
	if (type == FR_STDIN)
		return;
	if (type == FR_STDIN_EOF) {
		c->stdin_eof = true;
		input_pump(s);
		return;
	}
	if (type == FR_QUERY) {
		if (flag & QUERY_LOGGED)
			stream_drain(s);
		send_state(s, c);
		return;
	}
	if (control(s, c, type, flag) == 0) {
		if (type != FR_GO)
			client_send(s, c, FR_OK, type, NULL, 0);
		return;
	}
	put_u32(error, (uint32_t)errno);
	client_send(s, c, FR_ERR, type, error, sizeof(error));
}

/* Where the next bytes of a client go, and how many are wanted; NULL for a bad frame. */
static void *next_target(struct supervisor *s, struct client *c, size_t *want)
{
	if (c->head_len < FRAME_HEAD) {
		*want = FRAME_HEAD - c->head_len;
		return c->head + c->head_len;
	}
	*want = c->left;
	if (c->head[0] == FR_STDIN)
		return buffer_room(&c->input, c->left, STDIN_WINDOW);
	if (is_go(c))
		return buffer_room(&s->go, c->left, FRAME_MAX);
	return c->body_len + c->left <= sizeof(c->body) ? c->body + c->body_len : NULL;
}

static void head_complete(struct client *c)
{
	c->left = get_u32(c->head + 4);
	c->body_len = 0;
}

static void consumed(struct supervisor *s, struct client *c, size_t n)
{
	if (c->head_len < FRAME_HEAD) {
		c->head_len += (uint8_t)n;
		if (c->head_len < FRAME_HEAD)
			return;
		head_complete(c);
	} else {
		c->left -= (uint32_t)n;
		if (c->head[0] == FR_STDIN) {
			c->input.len += n;
			input_pump(s);
		} else {
			c->body_len += (uint32_t)n;
			s->go.len += is_go(c) ? n : 0;
		}
	}
	if (!c->left)
		frame_received(s, c);
}

void client_read(struct supervisor *s, struct client *c)
{
	while (c->used && c->fd >= 0) {
		size_t want;
		void *at = next_target(s, c, &want);
		ssize_t n = at ? recv(c->fd, at, want, MSG_DONTWAIT) : 0;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) { /* gone, or not speaking our language */
			client_drop(s, c);
			return;
		}
		consumed(s, c, (size_t)n);
	}
}
