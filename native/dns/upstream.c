/* The servers that other names are asked of: those of resolv.conf, read anew when it changes. */
#include "server.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RESOLV_MAX 16384

static int is_own(const struct server *server, const struct address *address)
{
	for (size_t i = 0; i < server->listener_count; i++)
		if (address_equal(&server->listeners[i].address, address))
			return 1;
	return 0;
}

static void parse(struct server *server, char *text)
{
	struct upstreams *upstreams = &server->upstreams;
	upstreams->count = 0;
	char *rest = NULL;
	for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		char *words = NULL;
		char *verb = strtok_r(line, " \t\r", &words);
		char *value = verb ? strtok_r(NULL, " \t\r", &words) : NULL;
		struct address address;
		if (!value || strcmp(verb, "nameserver") != 0 || !address_parse(value, &address))
			continue;
		if (upstreams->count < UPSTREAMS_MAX && !is_own(server, &address))
			upstreams->list[upstreams->count++] = address;
	}
}

static void refresh(struct server *server)
{
	static char text[RESOLV_MAX + 1];
	struct upstreams *upstreams = &server->upstreams;
	struct stat status;
	if (stat(upstreams->path, &status) < 0)
		return;
	if (status.st_ino == upstreams->inode &&
	    memcmp(&status.st_mtim, &upstreams->changed, sizeof status.st_mtim) == 0)
		return;
	int fd = open(upstreams->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return;
	ssize_t length = read(fd, text, RESOLV_MAX);
	close(fd);
	if (length < 0)
		return;
	text[length] = 0;
	upstreams->inode = status.st_ino;
	upstreams->changed = status.st_mtim;
	parse(server, text);
}

/* Fill `out` with the servers for a client: its own, or those of the host. */
size_t upstreams_for(struct server *server, const struct address *source,
		     struct address out[UPSTREAMS_MAX])
{
	const struct scope *scope =
		names_scope_at(server->names, names_scope(server->names, source));
	if (scope->upstream_count == 0) {
		refresh(server);
		memcpy(out, server->upstreams.list, sizeof server->upstreams.list);
		return server->upstreams.count;
	}
	memcpy(out, scope->upstreams, sizeof scope->upstreams);
	return scope->upstream_count;
}
