/* A byte queue that has no memory while it is empty. */
#include "buffer.h"

#include <string.h>
#include <sys/mman.h>

enum { FIRST = 64 << 10, SPARE = 4 };

static struct {
	void *at[SPARE];
	unsigned count, most;
} spare;

void buffer_keep(unsigned most)
{
	spare.most = most < SPARE ? most : SPARE;
}

static void *new_memory(size_t cap)
{
	if (cap == FIRST && spare.count)
		return spare.at[--spare.count];
	return mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static bool grow(struct buffer *b, size_t need)
{
	size_t cap = b->cap ? b->cap : FIRST;
	void *data;

	while (cap < need)
		cap *= 2;
	if (cap == b->cap)
		return true;
	data = b->cap ? mremap(b->data, b->cap, cap, MREMAP_MAYMOVE) : new_memory(cap);
	if (data == MAP_FAILED)
		return false;
	b->data = data;
	b->cap = cap;
	return true;
}

char *buffer_room(struct buffer *b, size_t n, size_t limit)
{
	if (n > limit || b->len > limit - n)
		return NULL;
	if (b->off && b->off + b->len + n > b->cap) {
		memmove(b->data, b->data + b->off, b->len);
		b->off = 0;
	}
	if (!grow(b, b->len + n))
		return NULL;
	return b->data + b->off + b->len;
}

bool buffer_put(struct buffer *b, const void *data, size_t n, size_t limit)
{
	char *at = buffer_room(b, n, limit);

	if (!at)
		return false;
	memcpy(at, data, n);
	b->len += n;
	return true;
}

void buffer_drop(struct buffer *b, size_t n)
{
	b->off += n;
	b->len -= n;
	if (!b->len)
		buffer_free(b);
}

void buffer_take(struct buffer *b, size_t n)
{
	b->off += n;
	b->len -= n;
	if (!b->len)
		b->off = 0;
}

void buffer_free(struct buffer *b)
{
	if (b->cap == FIRST && spare.count < spare.most)
		spare.at[spare.count++] = b->data;
	else if (b->cap)
		munmap(b->data, b->cap);
	*b = (struct buffer){ 0 };
}
