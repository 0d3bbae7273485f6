/* Text in fixed buffers, whole writes and the clocks. */
#include "text.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct text text_in(char *buffer, size_t cap)
{
	buffer[0] = 0;
	return (struct text){ .at = buffer, .cap = cap, .len = 0 };
}

void text_add_bytes(struct text *t, const char *s, size_t n)
{
	size_t room = t->cap - 1 - t->len;

	if (n > room)
		n = room;
	memcpy(t->at + t->len, s, n);
	t->len += n;
	t->at[t->len] = 0;
}

void text_add(struct text *t, const char *s)
{
	text_add_bytes(t, s, strlen(s));
}

void text_add_num(struct text *t, int64_t n)
{
	char digits[24];
	size_t at = sizeof(digits);
	uint64_t left = n < 0 ? 0 - (uint64_t)n : (uint64_t)n;

	do {
		digits[--at] = (char)('0' + left % 10);
		left /= 10;
	} while (left);
	if (n < 0)
		digits[--at] = '-';
	text_add_bytes(t, digits + at, sizeof(digits) - at);
}

/* How many bytes the UTF-8 sequence at `s` has; 0 for what is none. */
static size_t utf8_length(const unsigned char *s, size_t n)
{
	size_t len = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3
		   : s[0] < 0xf5 ? 4 : 0;

	if (!len || len > n)
		return 0;
	for (size_t i = 1; i < len; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
	    (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
		return 0; /* overlong, surrogate, past the last */
	return len;
}

void text_add_json(struct text *t, const char *s, size_t n)
{
	static const char hex[] = "0123456789abcdef";

	text_add(t, "\"");
	for (size_t i = 0, len; i < n && t->len + 8 < t->cap; i += len) {
		unsigned char c = (unsigned char)s[i];
		len = utf8_length((const unsigned char *)s + i, n - i);
		if (!len) {
			text_add(t, "\\ufffd");
			len = 1;
		} else if (c == '"' || c == '\\') {
			char two[2] = { '\\', (char)c };
			text_add_bytes(t, two, 2);
		} else if (c < 0x20) {
			char six[6] = { '\\', 'u', '0', '0', hex[c >> 4], hex[c & 15] };
			text_add_bytes(t, six, 6);
		} else {
			text_add_bytes(t, s + i, len);
		}
	}
	text_add(t, "\"");
}

int write_all(int fd, const void *data, size_t n)
{
	const char *at = data;

	while (n) {
		ssize_t done = write(fd, at, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -1;
		at += done;
		n -= (size_t)done;
	}
	return 0;
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t now_ns(void)
{
	return clock_ns(CLOCK_REALTIME);
}

uint64_t mono_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}
