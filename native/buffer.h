/* A byte queue that has no memory while it is empty. */
#ifndef HUTCH_BUFFER_H
#define HUTCH_BUFFER_H

#include <stdbool.h>
#include <stddef.h>

struct buffer {
	char *data;
	size_t off, len, cap;
};

/* Make room for `n` more bytes, at most `limit` queued in all; return where to put them. */
char *buffer_room(struct buffer *b, size_t n, size_t limit);
bool buffer_put(struct buffer *b, const void *data, size_t n, size_t limit);
void buffer_drop(struct buffer *b, size_t n);
/* The same, but what is empty keeps its memory for what comes next. */
void buffer_take(struct buffer *b, size_t n);
void buffer_free(struct buffer *b);
/* Keep the memory of up to so many buffers that became empty, for the next ones. */
void buffer_keep(unsigned most);

#endif
