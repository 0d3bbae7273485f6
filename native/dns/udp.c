/*
 * Queries by UDP. A forwarded query has a socket of its own: a random port and a random id
 * that a forged answer would have to guess, and only its upstream can send to it.
 */
#include "server.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

struct pending {
	int fd, listener;
	struct sockaddr_storage client;
	socklen_t client_length;
	struct address source;
	uint8_t client_id[2];
	uint8_t query[QUERY_MAX];
	size_t length;
	struct address upstreams[UPSTREAMS_MAX];
	size_t upstream_count, tries;
	long long deadline;
	int used;
};

static struct pending table[PENDING_MAX];
static uint8_t buffer[MESSAGE_MAX];

static void finish(struct pending *pending)
{
	if (pending->fd >= 0)
		close(pending->fd);
	pending->used = 0;
}

static void send_to_client(struct server *server, const struct pending *pending,
			   const uint8_t *message, size_t length)
{
	/* A client that does not read loses its answer, as the network could lose it. */
	sendto(server->listeners[pending->listener].udp, message, length,
	       MSG_DONTWAIT | MSG_NOSIGNAL, (const struct sockaddr *)&pending->client,
	       pending->client_length);
}

static void give_up(struct server *server, struct pending *pending)
{
	uint8_t answer[EDGE_UDP];
	memcpy(pending->query, pending->client_id, 2);
	size_t length =
		packet_error(pending->query, pending->length, RCODE_FAILED, answer, sizeof answer);
	if (length)
		send_to_client(server, pending, answer, length);
	finish(pending);
}

/* Ask the next upstream; after the last try, tell the client that it failed. */
static void ask_next(struct server *server, struct pending *pending)
{
	while (pending->upstream_count && pending->tries < TRIES_MAX) {
		const struct address *upstream =
			&pending->upstreams[pending->tries++ % pending->upstream_count];
		struct sockaddr_storage to;
		socklen_t length = address_to_socket(upstream, 53, &to);
		if (pending->fd >= 0)
			close(pending->fd);
		pending->fd = socket(to.ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (pending->fd < 0)
			break;
		if (getrandom(pending->query, 2, GRND_NONBLOCK) != 2)
			break;
		if (connect(pending->fd, (struct sockaddr *)&to, length) < 0 ||
		    send(pending->fd, pending->query, pending->length, MSG_NOSIGNAL) < 0)
			continue;
		if (watch(server, pending->fd, KIND_PENDING, (size_t)(pending - table), EPOLLIN) <
		    0)
			break;
		pending->deadline = now_ms() + TRY_MS;
		return;
	}
	give_up(server, pending);
}

/* Return a free entry, NULL where the table, or the client's share of it, is full. */
static struct pending *take(const struct address *source)
{
	struct pending *unused = NULL;
	size_t own = 0;
	for (size_t i = 0; i < PENDING_MAX; i++) {
		if (!table[i].used)
			unused = &table[i];
		else if (address_equal(&table[i].source, source))
			own++;
	}
	return own < PENDING_PER_SOURCE ? unused : NULL;
}

static void forward(struct server *server, struct pending *asked, size_t length)
{
	struct pending *pending = take(&asked->source);
	if (!pending || length > QUERY_MAX) {
		unsigned rcode = length > QUERY_MAX ? RCODE_FORMAT : RCODE_FAILED;
		uint8_t answer[EDGE_UDP];
		size_t size = packet_error(buffer, length, rcode, answer, sizeof answer);
		if (size)
			send_to_client(server, asked, answer, size);
		return;
	}
	*pending = *asked;
	pending->used = 1;
	pending->fd = -1;
	pending->length = length;
	memcpy(pending->query, buffer, length);
	memcpy(pending->client_id, buffer, 2);
	pending->upstream_count = upstreams_for(server, &pending->source, pending->upstreams);
	ask_next(server, pending);
}

/* Read one query and answer it, or pass it on. */
void udp_query(struct server *server, size_t listener)
{
	static struct pending asked;
	uint8_t answer[EDGE_UDP];
	size_t size = 0;
	asked.listener = (int)listener;
	asked.tries = 0;
	asked.client_length = sizeof asked.client;
	ssize_t length =
		recvfrom(server->listeners[listener].udp, buffer, sizeof buffer, MSG_DONTWAIT,
			 (struct sockaddr *)&asked.client, &asked.client_length);
	if (length < HEADER_SIZE)
		return;
	address_from_socket(&asked.client, &asked.source);
	switch (packet_answer(server->names, &asked.source, buffer, (size_t)length, answer,
			      sizeof answer, &size)) {
	case VERDICT_REPLY:
		send_to_client(server, &asked, answer, size);
		break;
	case VERDICT_FORWARD:
		forward(server, &asked, (size_t)length);
		break;
	case VERDICT_DROP:
		break;
	}
}

/* Read what an upstream sent; give it to the client if it is the answer. */
void udp_reply(struct server *server, size_t index)
{
	struct pending *pending = &table[index];
	if (!pending->used || pending->fd < 0)
		return;
	ssize_t length = recv(pending->fd, buffer, sizeof buffer, MSG_DONTWAIT);
	if (length < 0) {
		if (errno != EAGAIN && errno != EINTR)
			ask_next(server, pending);
		return;
	}
	if (!packet_is_reply(pending->query, pending->length, buffer, (size_t)length))
		return;
	memcpy(buffer, pending->client_id, 2);
	send_to_client(server, pending, buffer, (size_t)length);
	finish(pending);
}

/* Go on with what waited too long; return the milliseconds until the next does, or -1. */
long long udp_expire(struct server *server)
{
	long long now = now_ms(), soonest = -1;
	for (size_t i = 0; i < PENDING_MAX; i++) {
		if (table[i].used && table[i].deadline <= now)
			ask_next(server, &table[i]);
		if (table[i].used && (soonest < 0 || table[i].deadline - now < soonest))
			soonest = table[i].deadline - now;
	}
	return soonest;
}
