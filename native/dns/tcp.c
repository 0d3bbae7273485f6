/*
 * Queries by TCP: two bytes of length before each message (RFC 1035, 4.2.2). A client's
 * connection takes one query at a time; its memory is bounded and its time is limited.
 */
#include "../sys.h"
#include "server.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum state { READ_QUERY, ASK_UPSTREAM, READ_UPSTREAM, WRITE_ANSWER };

struct stream {
	int used, fd, upstream;
	enum state state;
	struct address source;
	uint8_t query[2 + QUERY_MAX];
	size_t query_done;
	uint8_t *answer; /* with its length before it; malloc'd while there is one */
	size_t answer_size, answer_done;
	struct address upstreams[UPSTREAMS_MAX];
	size_t upstream_count, tries;
	long long deadline;
};

static struct stream table[STREAMS_MAX];

static size_t index_of(const struct stream *stream)
{
	return (size_t)(stream - table);
}

static void drop_upstream(struct stream *stream)
{
	if (stream->upstream >= 0)
		close(stream->upstream);
	stream->upstream = -1;
}

static void drop_answer(struct stream *stream)
{
	free(stream->answer);
	stream->answer = NULL;
	stream->answer_size = stream->answer_done = 0;
}

static void end(struct stream *stream)
{
	drop_upstream(stream);
	drop_answer(stream);
	close(stream->fd);
	stream->used = 0;
}

static size_t message_length(const uint8_t *at)
{
	return (size_t)at[0] << 8 | at[1];
}

/* Allocate room for an answer of `size` bytes and write its length. */
static int make_answer(struct stream *stream, size_t size)
{
	drop_answer(stream);
	stream->answer = malloc(size + 2);
	if (!stream->answer)
		return 0;
	stream->answer[0] = (uint8_t)(size >> 8);
	stream->answer[1] = (uint8_t)size;
	stream->answer_size = size + 2;
	return 1;
}

static void start_writing(struct server *server, struct stream *stream)
{
	drop_upstream(stream);
	stream->state = WRITE_ANSWER;
	stream->answer_done = 0;
	stream->deadline = now_ms() + STREAM_MS;
	if (rewatch(server, stream->fd, KIND_STREAM, index_of(stream), EPOLLOUT) < 0)
		end(stream);
}

static void fail(struct server *server, struct stream *stream)
{
	uint8_t answer[EDGE_UDP];
	size_t size = packet_error(stream->query + 2, stream->query_done - 2, RCODE_FAILED, answer,
				   sizeof answer);
	if (!size || !make_answer(stream, size)) {
		end(stream);
		return;
	}
	memcpy(stream->answer + 2, answer, size);
	start_writing(server, stream);
}

static void ask_next(struct server *server, struct stream *stream)
{
	while (stream->upstream_count && stream->tries < TRIES_MAX) {
		const struct address *upstream =
			&stream->upstreams[stream->tries++ % stream->upstream_count];
		struct sockaddr_storage to;
		socklen_t length = address_to_socket(upstream, 53, &to);
		drop_upstream(stream);
		drop_answer(stream);
		stream->upstream =
			socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (stream->upstream < 0)
			break;
		if (connect(stream->upstream, (struct sockaddr *)&to, length) < 0 &&
		    errno != EINPROGRESS)
			continue;
		if (watch(server, stream->upstream, KIND_STREAM_UPSTREAM, index_of(stream),
			  EPOLLOUT) < 0)
			break;
		stream->state = ASK_UPSTREAM;
		stream->deadline = now_ms() + TRY_MS;
		/* The client waits; only its leaving is of interest. */
		if (rewatch(server, stream->fd, KIND_STREAM, index_of(stream), 0) < 0)
			break;
		return;
	}
	fail(server, stream);
}

static void answer_query(struct server *server, struct stream *stream)
{
	static uint8_t answer[MESSAGE_MAX];
	size_t size = 0;
	switch (packet_answer(server->names, &stream->source, stream->query + 2,
			      stream->query_done - 2, answer, sizeof answer, &size)) {
	case VERDICT_REPLY:
		if (!make_answer(stream, size)) {
			end(stream);
			return;
		}
		memcpy(stream->answer + 2, answer, size);
		start_writing(server, stream);
		return;
	case VERDICT_FORWARD:
		stream->tries = 0;
		stream->upstream_count = upstreams_for(server, &stream->source, stream->upstreams);
		ask_next(server, stream);
		return;
	case VERDICT_DROP:
		end(stream);
	}
}

static void read_query(struct server *server, struct stream *stream)
{
	for (;;) {
		size_t wanted = 2;
		if (stream->query_done >= 2) {
			wanted += message_length(stream->query);
			if (wanted < 2 + HEADER_SIZE || wanted > sizeof stream->query) {
				end(stream);
				return;
			}
			if (stream->query_done == wanted) {
				answer_query(server, stream);
				return;
			}
		}
		ssize_t got = recv(stream->fd, stream->query + stream->query_done,
				   wanted - stream->query_done, MSG_DONTWAIT);
		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (got <= 0) {
			end(stream);
			return;
		}
		stream->query_done += (size_t)got;
	}
}

static void write_answer(struct server *server, struct stream *stream)
{
	ssize_t sent = send(stream->fd, stream->answer + stream->answer_done,
			    stream->answer_size - stream->answer_done, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (sent < 0) {
		end(stream);
		return;
	}
	stream->answer_done += (size_t)sent;
	if (stream->answer_done < stream->answer_size)
		return;
	drop_answer(stream);
	stream->query_done = 0;
	stream->state = READ_QUERY;
	stream->deadline = now_ms() + STREAM_MS;
	if (rewatch(server, stream->fd, KIND_STREAM, index_of(stream), EPOLLIN) < 0)
		end(stream);
}

static void send_upstream(struct server *server, struct stream *stream)
{
	/* A query is far smaller than a fresh connection's send buffer: all or nothing. */
	ssize_t sent = send(stream->upstream, stream->query, stream->query_done,
			    MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent < 0 && errno == EAGAIN)
		return;
	if (sent != (ssize_t)stream->query_done ||
	    rewatch(server, stream->upstream, KIND_STREAM_UPSTREAM, index_of(stream), EPOLLIN) <
		    0) {
		ask_next(server, stream);
		return;
	}
	stream->state = READ_UPSTREAM;
	drop_answer(stream);
}

static void read_upstream(struct server *server, struct stream *stream)
{
	static uint8_t header[2];
	if (!stream->answer) {
		ssize_t got = recv(stream->upstream, header, 2, MSG_DONTWAIT | MSG_PEEK);
		if (got == 1 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
			return;
		if (got != 2 || message_length(header) < HEADER_SIZE ||
		    !make_answer(stream, message_length(header))) {
			ask_next(server, stream);
			return;
		}
	}
	ssize_t got = recv(stream->upstream, stream->answer + stream->answer_done,
			   stream->answer_size - stream->answer_done, MSG_DONTWAIT);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got <= 0) {
		ask_next(server, stream);
		return;
	}
	stream->answer_done += (size_t)got;
	if (stream->answer_done < stream->answer_size)
		return;
	if (packet_is_reply(stream->query + 2, stream->query_done - 2, stream->answer + 2,
			    stream->answer_size - 2))
		start_writing(server, stream);
	else
		ask_next(server, stream);
}

/* Return a free entry, NULL where the table, or the client's share of it, is full. */
static struct stream *take(const struct address *source)
{
	struct stream *unused = NULL;
	size_t own = 0;
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		if (!table[i].used)
			unused = &table[i];
		else if (address_equal(&table[i].source, source))
			own++;
	}
	return own < STREAMS_PER_SOURCE ? unused : NULL;
}

static void watch_listeners(struct server *server, uint32_t events)
{
	for (size_t i = 0; i < server->listener_count; i++)
		rewatch(server, server->listeners[i].tcp, KIND_TCP, i, events);
}

/* Take a new connection, or close it where there are too many. */
void tcp_accept(struct server *server, size_t listener)
{
	struct sockaddr_storage from;
	struct address source;
	socklen_t length = sizeof from;
	int fd = accept4(server->listeners[listener].tcp, (struct sockaddr *)&from, &length,
			 SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0) {
		if (is_exhausted(errno)) {
			server->accept_at = now_ms() + ACCEPT_PAUSE_MS;
			watch_listeners(server, 0);
		}
		return;
	}
	address_from_socket(&from, &source);
	struct stream *stream = take(&source);
	if (!stream || watch(server, fd, KIND_STREAM, index_of(stream), EPOLLIN) < 0) {
		close(fd);
		return;
	}
	*stream = (struct stream){.used = 1,
				  .fd = fd,
				  .upstream = -1,
				  .source = source,
				  .deadline = now_ms() + STREAM_MS};
}

/* Go on with a stream whose connection, or upstream connection, is ready. */
void tcp_event(struct server *server, size_t index, int from_upstream, uint32_t events)
{
	struct stream *stream = &table[index];
	if (!stream->used)
		return;
	if (from_upstream) {
		if (stream->upstream < 0)
			return;
		if (stream->state == ASK_UPSTREAM)
			send_upstream(server, stream);
		else if (stream->state == READ_UPSTREAM)
			read_upstream(server, stream);
		return;
	}
	if (stream->state == READ_QUERY)
		read_query(server, stream);
	else if (stream->state == WRITE_ANSWER)
		write_answer(server, stream);
	else if (events & (EPOLLHUP | EPOLLERR))
		end(stream);
}

/* Go on with what waited too long; return the milliseconds until the next does, or -1. */
long long tcp_expire(struct server *server)
{
	long long now = now_ms(), soonest = -1;
	if (server->accept_at && server->accept_at <= now) {
		server->accept_at = 0;
		watch_listeners(server, EPOLLIN);
	}
	if (server->accept_at)
		soonest = server->accept_at - now;
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &table[i];
		if (stream->used && stream->deadline <= now) {
			if (stream->state == ASK_UPSTREAM || stream->state == READ_UPSTREAM)
				ask_next(server, stream);
			else
				end(stream);
		}
		if (stream->used && (soonest < 0 || stream->deadline - now < soonest))
			soonest = stream->deadline - now;
	}
	return soonest;
}
