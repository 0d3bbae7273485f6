/* Clients of agent.sock: each is one channel, its bytes passed on both ways. */
#include <sys/socket.h>

#include <poll.h>

#include "../text.h"
#include "vmm.h"

static struct vmm_client *unused(struct vmm *v)
{
	for (int i = 0; i < MAX_VMM_CLIENTS; i++)
		if (!v->clients[i].used)
			return &v->clients[i];
	return NULL;
}

bool clients_have_place(const struct vmm *v)
{
	for (int i = 0; i < MAX_VMM_CLIENTS; i++)
		if (!v->clients[i].used)
			return true;
	return false;
}

/* The host may have run out of descriptors, not we: then nobody who leaves makes room. */
void accept_later(struct vmm *v)
{
	if (is_exhausted(errno))
		v->accept_ns = mono_ns() + ACCEPT_PAUSE_MS * 1000000ull;
}

void clients_accept(struct vmm *v)
{
	struct vmm_client *c = unused(v);
	int fd;

	if (!c)
		return;
	fd = accept4(FD_LISTEN, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0) {
		accept_later(v);
		return;
	}
	*c = (struct vmm_client){ .owner = OWNER_CLIENT, .used = true, .fd = fd };
}

static void release(struct vmm *v, struct vmm_client *c)
{
	v->accept_ns = 0;
	close(c->fd);
	if (c->passed)
		close(c->passed);
	buffer_free(&c->rest);
	*c = (struct vmm_client){ .owner = OWNER_CLIENT };
}

static void drop(struct vmm *v, struct vmm_client *c)
{
	if (c->ch)
		mux_close(&v->mux, c->ch, 0);
	release(v, c);
}

/* A client that has closed is found when it is written to or read from; one that has only
 * ended its own bytes waits for the guest's, and is found by POLLHUP. Where nothing can be
 * done with a client now it is not watched, for POLLHUP cannot be turned off. */
short client_events(const struct vmm_client *c)
{
	short events = c->blocked ? POLLOUT : 0;

	if (c->ch ? !c->half_closed && !c->ch->starved : !c->rest.len)
		return (short)(events | POLLIN);
	return events || c->half_closed ? events : -1;
}

static bool open_channel(struct vmm *v, struct vmm_client *c)
{
	uint8_t kind = c->head[4];

	if (memcmp(c->head, "HVA1", 4) != 0 || c->head[5] || c->head[6] || c->head[7])
		return false;
	if (kind == CLIENT_QUIESCE)
		return quiet_begin(v, c);
	if (kind == CLIENT_END && v->process.started)
		process_signal(v, SIGKILL);
	if (kind != MUX_CALL && kind != MUX_EXEC && kind != MUX_FILES)
		return false; /* SPAWN is the monitor's own: it makes the main process */
	c->ch = mux_open(&v->mux, (enum mux_kind)kind);
	if (c->ch)
		c->ch->owner = c;
	return c->ch != NULL;
}

/* With a descriptor, if one comes along. */
static ssize_t receive_head(struct vmm_client *c)
{
	struct iovec io = { .iov_base = c->head + c->head_len,
			    .iov_len = (size_t)(CLIENT_HEAD - c->head_len) };
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
				  /* room for one, without the padding: it would take a second */
				  .msg_controllen = CMSG_LEN(sizeof(int)) };
	ssize_t n = recvmsg(c->fd, &message, MSG_CMSG_CLOEXEC);
	const struct cmsghdr *m = n < 0 ? NULL : CMSG_FIRSTHDR(&message);

	if (m && m->cmsg_level == SOL_SOCKET && m->cmsg_type == SCM_RIGHTS &&
	    m->cmsg_len == CMSG_LEN(sizeof(int))) {
		if (c->passed)
			close(c->passed);
		memcpy(&c->passed, CMSG_DATA(m), sizeof(int));
	}
	return n;
}

static void read_head(struct vmm *v, struct vmm_client *c)
{
	ssize_t n = receive_head(c);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		drop(v, c);
		return;
	}
	c->head_len += (uint8_t)n;
	if (c->head_len == CLIENT_HEAD && !open_channel(v, c))
		drop(v, c);
}

static void read_bytes_of(struct vmm *v, struct vmm_client *c)
{
	size_t room;
	uint8_t *at = mux_space(&v->mux, c->ch, &room);
	ssize_t n;

	if (!at)
		return;
	n = recv(c->fd, at, room, 0);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n < 0) {
		drop(v, c);
		return;
	}
	if (n == 0) {
		c->half_closed = true;
		mux_eof(&v->mux, c->ch);
		return;
	}
	mux_commit(&v->mux, c->ch, (size_t)n);
}

/* Returns how much the client took; when it is gone, it is dropped. */
static size_t pass_on(struct vmm *v, struct vmm_client *c, const void *data, size_t n)
{
	ssize_t done = send(c->fd, data, n, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (done < 0 && (errno == EAGAIN || errno == EINTR)) {
		c->blocked = true;
		return 0;
	}
	if (done < 0) {
		drop(v, c);
		return 0;
	}
	c->blocked = (size_t)done < n;
	return (size_t)done;
}

static void write_rest(struct vmm *v, struct vmm_client *c)
{
	while (c->used && c->rest.len) {
		size_t done = pass_on(v, c, c->rest.data + c->rest.off, c->rest.len);
		if (!done)
			return;
		buffer_drop(&c->rest, done);
	}
	if (c->used)
		release(v, c);
}

static void can_write(struct vmm *v, struct vmm_client *c)
{
	c->blocked = false;
	if (c->ch)
		mux_pull(&v->mux, c->ch);
	else
		write_rest(v, c);
}

void client_event(struct vmm *v, struct vmm_client *c, short events)
{
	if (c->blocked && (events & (POLLOUT | POLLERR | POLLHUP)))
		can_write(v, c);
	if (!c->used || !(events & (POLLIN | POLLHUP | POLLERR)))
		return;
	if (c->head_len < CLIENT_HEAD)
		read_head(v, c);
	else if (c == v->quiet.client && !quiet_client(v, c))
		drop(v, c);
	else if (!c->ch)
		return;
	else if (c->half_closed && (events & (POLLHUP | POLLERR)))
		drop(v, c);
	else if (!c->half_closed)
		read_bytes_of(v, c);
}

size_t client_data(struct vmm *v, struct vmm_client *c, const uint8_t *data, size_t n)
{
	c->answered = true;
	return pass_on(v, c, data, n);
}

void client_eof(struct vmm_client *c)
{
	shutdown(c->fd, SHUT_WR);
}

/* An EXEC that the agent refuses has no supervisor to say so: say it in its place. */
static void tell_refusal(const struct vmm_client *c, uint32_t error)
{
	uint8_t frame[FRAME_HEAD + 8] = { FR_FAILED, 5 /* section: supervise */ };

	put_u32(frame + 4, 8);
	put_u32(frame + FRAME_HEAD + 4, error);
	(void)!send(c->fd, frame, sizeof(frame), MSG_NOSIGNAL | MSG_DONTWAIT);
}

void client_closed(struct vmm *v, struct vmm_client *c, uint32_t error)
{
	if (error && !c->answered && c->ch->kind == MUX_EXEC)
		tell_refusal(c, error);
	c->rest = c->ch->in;
	c->ch->in = (struct buffer){ 0 };
	c->ch = NULL;
	if (!c->rest.len)
		release(v, c);
}
