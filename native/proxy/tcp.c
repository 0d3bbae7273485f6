/* Relay connections, each end closed for writing when the other has said all it had. */
#include "../sys.h"
#include "proxy.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* What goes one way: read from one end, not yet written to the other. */
struct half {
	size_t start, end;
	int ended, passed_on; /* the source has ended; the other end was told so */
	unsigned char *data;
};

struct stream {
	int used, connected;
	int fds[2];	     /* the client's and the server's end */
	struct half half[2]; /* half[i] is what fds[i] has said */
};

static struct stream streams[STREAMS_MAX];
static size_t used;
static int paused;

static void pause_listeners(int pause)
{
	paused = pause;
	for (size_t i = 0; i < proxy.count; i++)
		if (proxy.listeners[i].type == SOCK_STREAM)
			rewatch(proxy.listeners[i].fd, KIND_LISTENER, i, pause ? 0 : EPOLLIN);
}

long long tcp_timeout(void)
{
	static long long since;
	if (!paused) {
		since = 0;
		return -1;
	}
	/* Paused for want of descriptors that others have: ask again after a while. */
	if (since && now_ms() - since >= RETRY_MS && used < STREAMS_MAX) {
		since = 0;
		pause_listeners(0);
		return -1;
	}
	if (!since)
		since = now_ms();
	return RETRY_MS;
}

static void close_stream(struct stream *stream)
{
	for (int i = 0; i < 2; i++) {
		if (stream->fds[i] >= 0)
			close(stream->fds[i]);
		free(stream->half[i].data);
	}
	memset(stream, 0, sizeof *stream);
	used--;
	if (paused)
		pause_listeners(0);
}

static uint32_t interest(const struct stream *stream, int end)
{
	const struct half *said = &stream->half[end], *heard = &stream->half[!end];
	if (!stream->connected)
		return end ? EPOLLOUT : 0;
	return (!said->ended && said->end < BUFFER_SIZE ? EPOLLIN : 0) |
	       (heard->start < heard->end ? EPOLLOUT : 0);
}

/* An end that has ended both ways reports it for ever: each event is asked for once, and none
 * where nothing can be done with it. */
static int watch_both(const struct stream *stream)
{
	size_t index = (size_t)(stream - streams);
	for (int end = 0; end < 2; end++) {
		uint32_t events = interest(stream, end);
		if (events && rewatch(stream->fds[end], end ? KIND_SERVER : KIND_CLIENT, index,
				      events | EPOLLONESHOT) < 0)
			return -1;
	}
	return 0;
}

/* Write what `half` holds; tell the end of it. -1 when the connection is broken. */
static int pass_on(struct half *half, int to)
{
	while (half->start < half->end) {
		ssize_t sent =
			send(to, half->data + half->start, half->end - half->start, MSG_NOSIGNAL);
		if (sent < 0)
			return errno == EAGAIN || errno == EINTR ? 0 : -1;
		half->start += (size_t)sent;
	}
	half->start = half->end = 0;
	if (half->ended && !half->passed_on) {
		half->passed_on = 1;
		shutdown(to, SHUT_WR);
	}
	return 0;
}

static int take_in(struct half *half, int from)
{
	if (half->ended || half->end == BUFFER_SIZE)
		return 0;
	ssize_t got = recv(from, half->data + half->end, BUFFER_SIZE - half->end, 0);
	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	half->ended = got == 0;
	half->end += (size_t)got;
	return 0;
}

static int connection_error(int fd)
{
	int error = 0;
	socklen_t length = sizeof error;
	return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0 || error;
}

void tcp_event(size_t index, int from_server, uint32_t events)
{
	struct stream *stream = &streams[index];
	int broken = 0;

	if (!stream->used)
		return;
	if (!stream->connected) {
		/* The client may have left; the server has answered, or has not. */
		broken = !from_server || connection_error(stream->fds[1]);
		stream->connected = 1;
	} else if (events & EPOLLERR) {
		broken = 1;
	} else {
		broken = take_in(&stream->half[from_server], stream->fds[from_server]) < 0;
	}
	for (int i = 0; i < 2 && !broken; i++)
		broken = pass_on(&stream->half[i], stream->fds[!i]) < 0;
	if (broken || (stream->half[0].passed_on && stream->half[1].passed_on) ||
	    watch_both(stream) < 0)
		close_stream(stream);
}

static struct stream *new_stream(int client, int server)
{
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &streams[i];
		if (stream->used)
			continue;
		stream->used = 1;
		used++;
		stream->fds[0] = client;
		stream->fds[1] = server;
		for (int end = 0; end < 2; end++)
			stream->half[end].data = malloc(BUFFER_SIZE);
		if (stream->half[0].data && stream->half[1].data &&
		    watch(client, KIND_CLIENT, i, EPOLLONESHOT) == 0 &&
		    watch(server, KIND_SERVER, i, EPOLLOUT | EPOLLONESHOT) == 0)
			return stream;
		stream->fds[0] = stream->fds[1] = -1; /* the caller closes them */
		close_stream(stream);
		return NULL;
	}
	return NULL;
}

/* Packets go at once, and a peer that has vanished is noticed. */
static void tune(int fd)
{
	int on = 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

/* Connect to where the port leads. -1 when that is refused at once. */
static int connect_target(const struct listener *listener)
{
	int fd = socket(listener->target.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	tune(fd);
	if (connect(fd, (const struct sockaddr *)&listener->target, listener->target_length) < 0 &&
	    errno != EINPROGRESS) {
		close(fd);
		return -1;
	}
	return fd;
}

void tcp_accept(size_t index)
{
	if (used == STREAMS_MAX) {
		pause_listeners(1);
		return;
	}
	int client = accept4(proxy.listeners[index].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (client < 0) {
		if (is_exhausted(errno))
			pause_listeners(1);
		return;
	}
	tune(client);
	int server = connect_target(&proxy.listeners[index]);
	if (server < 0 || !new_stream(client, server)) {
		if (server >= 0)
			close(server);
		close(client);
	}
}
