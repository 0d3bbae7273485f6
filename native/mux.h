/* The agent channel: many byte streams over one, with credit. Both ends use this: hutch-vmm on
 * the host opens channels, hutch-agent in the guest accepts them. See
 * docs/reference/guest-protocol.md.
 *
 * An owner calls mux_read when the descriptor is readable, and mux_flush once at the end of
 * each turn of its loop, so that the frames of one turn go out in one write. Neither blocks if
 * the descriptor does not.
 *
 * Memory is bounded: a channel holds at most MUX_WINDOW received bytes that its owner did not
 * take, and the queue of frames to be written MUX_OUT bytes, beyond which nothing is read. */
#ifndef HUTCH_MUX_H
#define HUTCH_MUX_H

#include "buffer.h"
#include "wire.h"

enum mux_type { MUX_HELLO = 1, MUX_OPEN, MUX_DATA, MUX_EOF, MUX_CLOSE, MUX_CREDIT };
enum mux_kind { MUX_CALL = 1, MUX_SPAWN, MUX_EXEC, MUX_FILES, MUX_ADOPT };

enum {
	MUX_VERSION = 1,
	MUX_KEEP = 1,             /* flag of a HELLO: the main link is to be kept */
	MUX_HEAD = 12,            /* u32 channel, u8 type, u8 flag, u16 zero, u32 length */
	MUX_PAYLOAD = 32 << 10,   /* of one frame */
	MUX_CHANNELS = 512,
	MUX_WINDOW = 64 << 10,    /* credit in each direction when a channel opens */
	MUX_OUT_DATA = 128 << 10, /* DATA waits while so much is to be written */
	MUX_OUT = 1 << 20,        /* and nothing is read while so much is */
};

struct mux_channel {
	uint32_t id; /* 0: free */
	uint8_t kind;
	bool eof_in, eof_told, eof_out, closed; /* closed: our CLOSE is sent, the peer's is not here */
	bool starved;      /* mux_space had no room: `ready` is called when there is some */
	uint32_t credit;   /* what we may send */
	uint32_t granted;  /* what the peer may send */
	uint32_t owed;     /* taken by the owner, not granted anew yet */
	struct buffer in;  /* what the owner did not take */
	void *owner;       /* the handler's */
};

struct mux;

/* In each, mux_close may be called for the channel. After `closed` and after mux_close nothing
 * more is heard of a channel, and its pointer must not be kept. */
struct mux_handler {
	/* Guest: a channel was opened. 0, or the errno with which to close it. */
	int (*opened)(struct mux *m, struct mux_channel *ch);
	/* Bytes arrived: return how many were taken. The rest is kept; see mux_pull. */
	size_t (*data)(struct mux *m, struct mux_channel *ch, const uint8_t *data, size_t n);
	/* No bytes follow those that were taken. */
	void (*eof)(struct mux *m, struct mux_channel *ch);
	/* The peer closed it with this errno, or everything is reset (ECONNRESET). */
	void (*closed)(struct mux *m, struct mux_channel *ch, uint32_t error);
	/* There is room again after mux_space had none. */
	void (*ready)(struct mux *m, struct mux_channel *ch);
	/* Host: the guest answered our HELLO. Guest: the host's was answered. May be NULL. */
	void (*greeted)(struct mux *m);
};

struct mux {
	int fd;
	bool host;
	bool greeted;          /* HELLO has gone both ways; until then bytes are scanned for it */
	bool starved;          /* some channel waits for the queue */
	bool keep;             /* guest: the last HELLO had MUX_KEEP */
	const struct mux_handler *handler;
	void *owner;
	const char *problem;   /* after MUX_BROKEN: what the peer did */
	uint64_t nonce;        /* host: of the HELLO under way */
	uint64_t start_ns;     /* the agent's start, CLOCK_BOOTTIME: guest sets, host is told */
	uint32_t next_id, high; /* channels at `high` and beyond are free */
	struct buffer out;
	size_t in_len;
	struct mux_channel channels[MUX_CHANNELS];
	uint8_t in[2 * (MUX_HEAD + MUX_PAYLOAD)];
};

enum mux_result { MUX_OK, MUX_GONE, MUX_BROKEN };

void mux_init(struct mux *m, int fd, bool host, const struct mux_handler *handler);

/* Host: say HELLO. Channels of before are dropped, with `keep` all but the main link; mux_open
 * works after `greeted`. */
void mux_hello(struct mux *m, uint64_t nonce, bool keep);

/* The same with `keep`, to a guest that may have been stopped in the middle of a frame, as
 * the twin of a running one: what ends any frame and begins none goes first. */
void mux_hello_again(struct mux *m, uint64_t nonce);

/* Drop every channel (their owners hear `closed`) and what is to be written, and look for the
 * next HELLO, in what has been read already too. What a guest does with a broken peer. */
void mux_reset(struct mux *m);

/* Read once and deal with the frames that came. MUX_GONE: end of file or an error (errno, 0 for
 * the end of file). MUX_BROKEN: `problem` says which rule the peer broke. */
enum mux_result mux_read(struct mux *m);

/* False while the peer leaves so much unread that it is not heard: do not poll for input. */
bool mux_may_read(const struct mux *m);

/* Write what is queued, as far as it goes; poll for output while mux_pending. */
enum mux_result mux_flush(struct mux *m);
bool mux_pending(const struct mux *m);

/* Host: open a channel; NULL when there are MUX_CHANNELS, or no memory (errno). */
struct mux_channel *mux_open(struct mux *m, enum mux_kind kind);

/* Where the next bytes of a channel go, and how many may be put there (0: none now, the handler
 * hears `ready` later; or never, after mux_eof or mux_close). mux_commit sends them. Nothing
 * else may be sent in between. */
uint8_t *mux_space(struct mux *m, struct mux_channel *ch, size_t *room);
void mux_commit(struct mux *m, struct mux_channel *ch, size_t n);

/* Send as many of these bytes as there is room for; return how many. */
size_t mux_send(struct mux *m, struct mux_channel *ch, const void *data, size_t n);

void mux_eof(struct mux *m, struct mux_channel *ch);
void mux_close(struct mux *m, struct mux_channel *ch, uint32_t error);

/* The owner can take bytes again: offer it what was kept. */
void mux_pull(struct mux *m, struct mux_channel *ch);

#endif
