/*
 * The names that this server answers itself. The file is text, one statement a line:
 *
 *   version 1
 *   forward yes|no              whether other names go to an upstream server
 *   upstream ADDRESS            one to ask instead of those of resolv.conf
 *   host ADDRESS NAME...        what the names resolve to
 *   from ADDRESS                what follows holds for queries from this address only
 *
 * A file with anything else in it is refused whole, and the previous one stays in force.
 */
#include "names.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#define HOSTS_MAX 262144u
#define SCOPES_MAX 65536u
#define NONE UINT32_MAX

struct host {
	struct address address;
	const char *name;
	uint32_t scope;
	uint32_t next;
};

struct names {
	char *text;
	struct host *hosts;
	size_t host_count, host_room;
	struct scope *scopes;
	size_t scope_count, scope_room;
	uint32_t *buckets;
	size_t bucket_count;
};

int address_parse(const char *text, struct address *out)
{
	memset(out, 0, sizeof *out);
	if (inet_pton(AF_INET, text, out->bytes) == 1)
		out->family = 4;
	else if (inet_pton(AF_INET6, text, out->bytes) == 1)
		out->family = 6;
	return out->family != 0;
}

int address_equal(const struct address *one, const struct address *other)
{
	return one->family == other->family && memcmp(one->bytes, other->bytes, 16) == 0;
}

static uint32_t hash_name(const char *name)
{
	uint32_t value = 2166136261u;
	for (; *name; name++)
		value = (value ^ (uint8_t)*name) * 16777619u;
	return value;
}

/* Make room for one more element; elements are counted before they are used. */
static void *grow(void *array, size_t count, size_t *room, size_t limit, size_t size)
{
	if (count < *room)
		return array;
	if (count >= limit)
		return NULL;
	size_t wanted = *room ? *room * 2 : 64;
	void *bigger = realloc(array, wanted * size);
	if (bigger)
		*room = wanted;
	return bigger;
}

static int add_scope(struct names *names, const struct address *source)
{
	struct scope *scopes = grow(names->scopes, names->scope_count, &names->scope_room,
				    SCOPES_MAX, sizeof *scopes);
	if (!scopes)
		return 0;
	names->scopes = scopes;
	struct scope *scope = &scopes[names->scope_count++];
	memset(scope, 0, sizeof *scope);
	scope->source = *source;
	scope->forward = names->scope_count > 1 ? scopes[0].forward : 1;
	return 1;
}

static int add_host(struct names *names, const struct address *address, const char *name)
{
	size_t length = strlen(name);
	if (length == 0 || length > NAME_MAX_LENGTH)
		return 0;
	struct host *hosts =
		grow(names->hosts, names->host_count, &names->host_room, HOSTS_MAX, sizeof *hosts);
	if (!hosts)
		return 0;
	names->hosts = hosts;
	hosts[names->host_count++] = (struct host){
		.address = *address,
		.name = name,
		.scope = (uint32_t)names->scope_count - 1,
		.next = NONE,
	};
	return 1;
}

static char *next_word(char **rest)
{
	char *start = *rest + strspn(*rest, " \t\r");
	if (!*start)
		return NULL;
	char *end = start + strcspn(start, " \t\r");
	*rest = *end ? end + 1 : end;
	*end = 0;
	return start;
}

static int parse_host(struct names *names, char *rest)
{
	struct address address;
	char *word = next_word(&rest);
	if (!word || !address_parse(word, &address))
		return 0;
	while ((word = next_word(&rest)))
		if (!add_host(names, &address, word))
			return 0;
	return 1;
}

static int parse_statement(struct names *names, const char *verb, char *rest)
{
	struct scope *scope = &names->scopes[names->scope_count - 1];
	struct address address;
	if (strcmp(verb, "host") == 0)
		return parse_host(names, rest);
	char *word = next_word(&rest);
	if (!word || next_word(&rest))
		return 0;
	if (strcmp(verb, "version") == 0)
		return strcmp(word, "1") == 0;
	if (strcmp(verb, "forward") == 0) {
		scope->forward = strcmp(word, "yes") == 0;
		return scope->forward || strcmp(word, "no") == 0;
	}
	if (!address_parse(word, &address))
		return 0;
	if (strcmp(verb, "from") == 0)
		return add_scope(names, &address);
	if (strcmp(verb, "upstream") != 0)
		return 0;
	if (scope->upstream_count < UPSTREAMS_MAX)
		scope->upstreams[scope->upstream_count++] = address;
	return 1;
}

static int build_table(struct names *names)
{
	size_t wanted = 16;
	while (wanted < names->host_count * 2)
		wanted *= 2;
	names->buckets = malloc(wanted * sizeof *names->buckets);
	if (!names->buckets)
		return 0;
	memset(names->buckets, 0xff, wanted * sizeof *names->buckets);
	names->bucket_count = wanted;
	for (size_t i = names->host_count; i-- > 0;) {
		uint32_t *bucket = &names->buckets[hash_name(names->hosts[i].name) & (wanted - 1)];
		names->hosts[i].next = *bucket;
		*bucket = (uint32_t)i;
	}
	return 1;
}

/* Take ownership of `text` (malloc'd, with a zero at `length`); NULL if it is not valid. */
struct names *names_parse(char *text, size_t length)
{
	struct names *names = calloc(1, sizeof *names);
	const struct address everybody = {0};
	if (!names) {
		free(text);
		return NULL;
	}
	names->text = text;
	int good = strlen(text) == length && add_scope(names, &everybody);
	char *line = text;
	while (good && *line) {
		char *end = line + strcspn(line, "\n");
		char *following = *end ? end + 1 : end;
		*end = 0;
		char *verb = next_word(&line);
		if (verb && !parse_statement(names, verb, line))
			good = 0;
		line = following;
	}
	if (good && build_table(names))
		return names;
	names_free(names);
	return NULL;
}

void names_free(struct names *names)
{
	if (!names)
		return;
	free(names->buckets);
	free(names->scopes);
	free(names->hosts);
	free(names->text);
	free(names);
}

/* Return the number of the scope of a source address, 0 where it has none of its own. */
size_t names_scope(const struct names *names, const struct address *source)
{
	for (size_t i = 1; i < names->scope_count; i++)
		if (address_equal(&names->scopes[i].source, source))
			return i;
	return 0;
}

const struct scope *names_scope_at(const struct names *names, size_t scope)
{
	return &names->scopes[scope];
}

/* Fill `out` with the addresses of a lower-case name; return whether the name is known. */
int names_find(const struct names *names, size_t scope, const char *name, struct address *out,
	       size_t room, size_t *count)
{
	int known = 0;
	*count = 0;
	uint32_t i = names->buckets[hash_name(name) & (names->bucket_count - 1)];
	for (; i != NONE; i = names->hosts[i].next) {
		const struct host *host = &names->hosts[i];
		if ((host->scope != 0 && host->scope != scope) || strcmp(host->name, name) != 0)
			continue;
		known = 1;
		if (*count < room)
			out[(*count)++] = host->address;
	}
	return known;
}

/* Return the first name of an address, or NULL. */
const char *names_reverse(const struct names *names, size_t scope, const struct address *address)
{
	for (size_t i = 0; i < names->host_count; i++) {
		const struct host *host = &names->hosts[i];
		if ((host->scope == 0 || host->scope == scope) &&
		    address_equal(&host->address, address))
			return host->name;
	}
	return NULL;
}
