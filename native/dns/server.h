/* The state of the name server and what its parts offer each other. */
#ifndef HUTCH_DNS_SERVER_H
#define HUTCH_DNS_SERVER_H

#include "names.h"
#include "packet.h"

#include <sys/socket.h>
#include <time.h>

#define LISTENERS_MAX 4
#define PENDING_MAX 256
#define PENDING_PER_SOURCE 64
#define STREAMS_MAX 64
#define STREAMS_PER_SOURCE 16
#define QUERY_MAX 1232
#define MESSAGE_MAX 65535
#define TRY_MS 2000
#define TRIES_MAX 4
#define STREAM_MS 10000
#define EDGE_UDP 512

/* What an epoll event belongs to: `index` counts within the kind. */
enum kind { KIND_INOTIFY, KIND_UDP, KIND_TCP, KIND_PENDING, KIND_STREAM, KIND_STREAM_UPSTREAM };

struct listener {
	struct address address;
	int udp, tcp;
};

struct upstreams {
	const char *path;
	struct timespec changed;
	uint64_t inode;
	size_t count;
	struct address list[UPSTREAMS_MAX];
};

struct server {
	int epoll, directory, inotify;
	uint16_t port;
	size_t listener_count;
	struct listener listeners[LISTENERS_MAX];
	struct names *names;
	struct upstreams upstreams;
	long long accept_at; /* no descriptor for another connection: not before then, or 0 */
};

/* main.c */
long long now_ms(void);
int watch(struct server *server, int fd, enum kind kind, size_t index, uint32_t events);
int rewatch(struct server *server, int fd, enum kind kind, size_t index, uint32_t events);
socklen_t address_to_socket(const struct address *address, uint16_t port,
			    struct sockaddr_storage *out);
void address_from_socket(const struct sockaddr_storage *from, struct address *out);

/* upstream.c */
size_t upstreams_for(struct server *server, const struct address *source,
		     struct address out[UPSTREAMS_MAX]);

/* udp.c */
void udp_query(struct server *server, size_t listener);
void udp_reply(struct server *server, size_t pending);
long long udp_expire(struct server *server);

/* tcp.c */
void tcp_accept(struct server *server, size_t listener);
void tcp_event(struct server *server, size_t stream, int from_upstream, uint32_t events);
long long tcp_expire(struct server *server);

#endif
