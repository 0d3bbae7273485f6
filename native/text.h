/* Text in fixed buffers: what does not fit is cut, never overrun. */
#ifndef HUTCH_TEXT_H
#define HUTCH_TEXT_H

#include <stddef.h>
#include <stdint.h>

struct text {
	char *at;
	size_t cap, len; /* len < cap: there is always a NUL */
};

struct text text_in(char *buffer, size_t cap);
void text_add(struct text *t, const char *s);
void text_add_bytes(struct text *t, const char *s, size_t n);
void text_add_num(struct text *t, int64_t n);
void text_add_json(struct text *t, const char *s, size_t n); /* with the quotes */

/* Write all bytes or return -1 with errno. */
int write_all(int fd, const void *data, size_t n);
uint64_t now_ns(void);  /* wall clock */
uint64_t mono_ns(void); /* monotonic clock */

#endif
