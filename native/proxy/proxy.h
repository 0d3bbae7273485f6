/* The state of the port proxy and what its parts offer each other. */
#ifndef HUTCH_PROXY_H
#define HUTCH_PROXY_H

#include <stdint.h>
#include <sys/socket.h>

#define STREAMS_MAX 512
#define FLOWS_MAX 512
#define FLOW_IDLE_MS 90000 /* as Docker's proxy has it */
#define RETRY_MS 200
#define BUFFER_SIZE 16384
#define DATAGRAM_MAX 65535

/* What an epoll event belongs to: `index` counts within the kind. */
enum kind { KIND_OWNER, KIND_LISTENER, KIND_CLIENT, KIND_SERVER, KIND_FLOW };

struct listener {
	int fd, type;
	int family;
	struct sockaddr_storage target;
	socklen_t target_length;
};

struct proxy {
	int epoll;
	size_t count;
	struct listener *listeners;
};

extern struct proxy proxy;

/* main.c */
long long now_ms(void);
int watch(int fd, enum kind kind, size_t index, uint32_t events);
int rewatch(int fd, enum kind kind, size_t index, uint32_t events);

/* tcp.c: connections; the result of `tcp_timeout` is in milliseconds, -1 for none */
void tcp_accept(size_t listener);
void tcp_event(size_t stream, int from_server, uint32_t events);
long long tcp_timeout(void);

/* udp.c: who asked, and the socket that asks for them */
void udp_request(size_t listener);
void udp_reply(size_t flow);
long long udp_expire(void);

#endif
