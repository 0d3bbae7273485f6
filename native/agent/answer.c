/* Append fields to an answer. */
#include "agent.h"

void answer_bytes(struct answer *a, const void *data, size_t n)
{
	if (a->failed || !n)
		return;
	if (!buffer_put(&a->bytes, data, n, MAX_ANSWER))
		a->failed = true;
}

void answer_u32(struct answer *a, uint32_t value)
{
	uint8_t bytes[4];

	put_u32(bytes, value);
	answer_bytes(a, bytes, sizeof(bytes));
}

void answer_u64(struct answer *a, uint64_t value)
{
	uint8_t bytes[8];

	put_u64(bytes, value);
	answer_bytes(a, bytes, sizeof(bytes));
}

void answer_str(struct answer *a, const char *s)
{
	size_t n = strlen(s);

	answer_u32(a, (uint32_t)n);
	answer_bytes(a, s, n + 1);
}
