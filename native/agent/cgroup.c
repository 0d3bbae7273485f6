/* Control groups, version 2. */
#include <limits.h>
#include <sys/stat.h>

#include "../text.h"
#include "agent.h"

static const char top[] = "/sys/fs/cgroup";

/* Hand down every controller that this group has. */
static void hand_down(const char *group)
{
	char path[PATH_MAX], names[512], handed[512], word[64];
	struct text t = text_in(path, sizeof(path));
	char *save = NULL;

	text_add(&t, group);
	text_add(&t, "/cgroup.controllers");
	if (get_file(path, names, sizeof(names)) < 0)
		return;
	t = text_in(path, sizeof(path));
	text_add(&t, group);
	text_add(&t, "/cgroup.subtree_control");
	if (get_file(path, handed, sizeof(handed)) >= 0 && !strcmp(handed, names))
		return; /* done before */
	for (char *name = strtok_r(names, " \n", &save); name; name = strtok_r(NULL, " \n", &save)) {
		struct text w = text_in(word, sizeof(word));
		text_add(&w, "+");
		text_add(&w, name);
		/* One that cannot be handed down must not keep the others from it. */
		(void)!put_value(path, word);
	}
}

static int write_lines(const char *group, const char *lines, const char **what)
{
	static char path[PATH_MAX];
	char line[1024];

	while (*lines) {
		size_t len = strcspn(lines, "\n");
		struct text t = text_in(path, sizeof(path));
		char *value;
		int error;
		if (len >= sizeof(line))
			return E2BIG;
		memcpy(line, lines, len);
		line[len] = 0;
		lines += len + (lines[len] != 0);
		if (!len)
			continue;
		value = strchr(line, '=');
		if (!value || memchr(line, '/', (size_t)(value - line)))
			return EINVAL;
		*value++ = 0;
		text_add(&t, group);
		text_add(&t, "/");
		text_add(&t, line);
		*what = path;
		error = put_value(path, value);
		if (error)
			return error;
	}
	return 0;
}

bool cgroup_path(char *buffer, size_t cap, const char *group)
{
	char own[64], line[PATH_MAX];
	struct text t = text_in(own, sizeof(own));

	if (!*group) {
		if (!main_is_alive())
			return false;
		text_add(&t, "/proc/");
		text_add_num(&t, the.main_pid);
		text_add(&t, "/cgroup");
		if (get_file(own, line, sizeof(line)) < 0 || strncmp(line, "0::/", 4) != 0)
			return false;
		line[strcspn(line, "\n")] = 0;
		group = line + 3;
	}
	t = text_in(buffer, cap);
	text_add(&t, top);
	text_add(&t, "/");
	text_add(&t, group + (*group == '/'));
	return !climbs(group) && t.len + 1 < cap;
}

int cgroup_create(const char *group, const char *lines, const char **what)
{
	char path[PATH_MAX];

	if (!cgroup_path(path, sizeof(path), group) || !*group)
		return EINVAL;
	hand_down(top);
	for (char *at = path + sizeof(top); (at = strchr(at, '/')); *at++ = '/') {
		*at = 0;
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			return errno;
		hand_down(path);
	}
	if (mkdir(path, 0755) < 0 && errno != EEXIST)
		return errno;
	return write_lines(path, lines, what);
}
