/* Names of a network's instances, read from its `hosts` file; see names.c. */
#ifndef HUTCH_DNS_NAMES_H
#define HUTCH_DNS_NAMES_H

#include <stddef.h>
#include <stdint.h>

#define NAME_MAX_LENGTH 253
#define UPSTREAMS_MAX 4

/* family is 4 or 6; 0 is no address */
struct address {
	uint8_t family;
	uint8_t bytes[16];
};

/* What holds for one source address, or, in the first scope of a file, for all others. */
struct scope {
	struct address source;
	int forward;
	size_t upstream_count;
	struct address upstreams[UPSTREAMS_MAX];
};

struct names;

struct names *names_parse(char *text, size_t length);
void names_free(struct names *names);
size_t names_scope(const struct names *names, const struct address *source);
const struct scope *names_scope_at(const struct names *names, size_t scope);
int names_find(const struct names *names, size_t scope, const char *name, struct address *out,
	       size_t room, size_t *count);
const char *names_reverse(const struct names *names, size_t scope, const struct address *address);
int address_parse(const char *text, struct address *out);
int address_equal(const struct address *one, const struct address *other);

#endif
