/* What the guest uses: memory, the instance's control group, block devices, processes. */
#include <dirent.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "../text.h"
#include "agent.h"

static const char *join(char path[PATH_MAX], const char *a, const char *b, const char *c)
{
	struct text t = text_in(path, PATH_MAX);

	text_add(&t, a);
	text_add(&t, b);
	text_add(&t, c);
	return path;
}

/* The number after a word at the beginning of a line. */
static uint64_t number_of(const char *text, const char *word)
{
	size_t len = strlen(word);

	for (const char *at = text; at; at = strchr(at, '\n')) {
		at += *at == '\n';
		if (!strncmp(at, word, len) && (at[len] == ' ' || at[len] == ':'))
			return strtoull(at + len + 1, NULL, 10);
	}
	return 0;
}

static uint64_t number_in(const char *group, const char *name, const char *word)
{
	char path[PATH_MAX], text[4096];

	if (get_file(join(path, group, name, ""), text, sizeof(text)) < 0)
		return 0;
	return word ? number_of(text, word) : strtoull(text, NULL, 10);
}

/* One device: its name, then sectors and requests out of the fields of its `stat`. */
static bool add_block(struct answer *a, const char *name)
{
	char path[PATH_MAX], text[512], line[256], *at = text;
	struct text t = text_in(line, sizeof(line));
	uint64_t field[8];

	if (get_file(join(path, "/sys/block/", name, "/stat"), text, sizeof(text)) < 0)
		return false;
	for (size_t i = 0; i < 8; i++)
		field[i] = strtoull(at, &at, 10);
	text_add(&t, name);
	for (size_t i = 0; i < 4; i++) {
		static const uint8_t order[4] = { 2, 6, 0, 4 };
		uint64_t value = field[order[i]] * (i < 2 ? 512 : 1);
		text_add(&t, " ");
		text_add_num(&t, (int64_t)value);
	}
	answer_u32(a, (uint32_t)t.len);
	answer_bytes(a, line, t.len);
	return true;
}

static void add_blocks(struct answer *a)
{
	struct answer list = { 0 };
	struct dirent *entry;
	uint32_t count = 0;
	DIR *dir = opendir("/sys/block");

	while (dir && (entry = readdir(dir)))
		if (!strncmp(entry->d_name, "vd", 2))
			count += add_block(&list, entry->d_name);
	if (dir)
		closedir(dir);
	answer_u32(a, count);
	if (list.bytes.len)
		answer_bytes(a, list.bytes.data + list.bytes.off, list.bytes.len);
	a->failed |= list.failed;
	buffer_free(&list.bytes);
}

int stats(struct answer *a, const char *group)
{
	char path[PATH_MAX];

	if (!cgroup_path(path, sizeof(path), group))
		return *group ? EINVAL : ESRCH;
	answer_u64(a, number_in("/proc/meminfo", "", "MemTotal") * 1024);
	answer_u64(a, number_in("/proc/meminfo", "", "MemAvailable") * 1024);
	answer_u64(a, number_in(path, "/memory.current", NULL));
	answer_u64(a, number_in(path, "/cpu.stat", "usage_usec"));
	answer_u64(a, number_in(path, "/cpu.stat", "user_usec"));
	answer_u64(a, number_in(path, "/cpu.stat", "system_usec"));
	answer_u64(a, number_in(path, "/pids.current", NULL));
	answer_u64(a, number_in(path, "/memory.events", "oom_kill"));
	add_blocks(a);
	return 0;
}

/* Processes. */

/* As ps prints it. */
static void add_tty(struct answer *a, long device)
{
	char name[32];
	struct text t = text_in(name, sizeof(name));
	long major = device >> 8 & 0xfff, minor = (device & 0xff) | (device >> 12 & 0xfff00);

	if (major >= 136 && major <= 143) {
		text_add(&t, "pts/");
		text_add_num(&t, (major - 136) * 256 + minor);
	} else {
		text_add(&t, "?");
	}
	answer_str(a, name);
}

static void add_command(struct answer *a, const char *pid, const char *name, size_t name_len)
{
	char path[PATH_MAX], line[4096];
	ssize_t n = get_file(join(path, "/proc/", pid, "/cmdline"), line, sizeof(line));
	struct text t;

	while (n > 0 && !line[n - 1])
		n--;
	for (ssize_t i = 0; i < n; i++)
		if (!line[i])
			line[i] = ' ';
	if (n <= 0) { /* a process that has ended but was not waited for */
		t = text_in(line, sizeof(line));
		text_add(&t, "[");
		text_add_bytes(&t, name, name_len);
		text_add(&t, "]");
	} else {
		line[n] = 0;
	}
	answer_str(a, line);
}

enum { FIELD_PPID = 4, FIELD_TTY = 7, FIELD_FLAGS = 9, FIELD_UTIME = 14, FIELD_STIME = 15,
       FIELD_START = 22, FIELDS, KERNEL_THREAD = 0x00200000 };

/* See proc_pid_stat(5): the fields after the name, which may hold anything. */
static bool read_stat(char *text, uint64_t field[FIELDS], const char **name, size_t *name_len)
{
	char *open = strchr(text, '('), *close = strrchr(text, ')'), *at = close;

	if (!open || !close || close < open || strlen(close) < 4)
		return false;
	*name = open + 1;
	*name_len = (size_t)(close - open - 1);
	at += 3; /* the state */
	for (int i = FIELD_PPID; i < FIELDS; i++)
		field[i] = strtoull(at + 1, &at, 10);
	return true;
}

static void add_process(struct answer *a, const char *pid)
{
	char path[PATH_MAX], text[2048];
	uint64_t field[FIELDS];
	const char *name;
	size_t name_len;
	struct stat st;

	if (stat(join(path, "/proc/", pid, ""), &st) < 0 ||
	    get_file(join(path, "/proc/", pid, "/stat"), text, sizeof(text)) < 0 ||
	    !read_stat(text, field, &name, &name_len) || (field[FIELD_FLAGS] & KERNEL_THREAD))
		return;
	answer_u32(a, (uint32_t)strtoul(pid, NULL, 10));
	answer_u32(a, (uint32_t)field[FIELD_PPID]);
	answer_u32(a, st.st_uid);
	answer_u64(a, field[FIELD_START]);
	answer_u64(a, field[FIELD_UTIME] + field[FIELD_STIME]);
	add_tty(a, (long)field[FIELD_TTY]);
	add_command(a, pid, name, name_len);
}

/* "PID\n" each: a cgroup.procs is longer than any buffer of ours. */
static void add_listed(struct answer *a, const char *group)
{
	char path[PATH_MAX], pid[16];
	size_t len = 0;
	char c;
	struct buffer list = { 0 };
	int fd = open(join(path, group, "/cgroup.procs", ""), O_RDONLY | O_CLOEXEC);
	ssize_t n = 1;

	while (fd >= 0 && n > 0) {
		char *at = buffer_room(&list, 4096, MAX_ANSWER);
		n = at ? read(fd, at, 4096) : 0;
		list.len += n > 0 ? (size_t)n : 0;
	}
	if (fd >= 0)
		close(fd);
	for (size_t i = 0; i < list.len; i++) {
		c = list.data[list.off + i];
		if (c >= '0' && c <= '9' && len + 1 < sizeof(pid)) {
			pid[len++] = c;
			continue;
		}
		pid[len] = 0;
		if (len)
			add_process(a, pid);
		len = 0;
	}
	buffer_free(&list);
}

static void add_group(struct answer *a, const char *group, int depth)
{
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *dir;

	add_listed(a, group);
	dir = depth ? opendir(group) : NULL;
	while (dir && (entry = readdir(dir)))
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.')
			add_group(a, join(path, group, "/", entry->d_name), depth - 1);
	if (dir)
		closedir(dir);
}

int processes(struct answer *a, const char *group)
{
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *dir;

	if (*group) {
		if (!cgroup_path(path, sizeof(path), group))
			return EINVAL;
		add_group(a, path, 8);
		return 0;
	}
	dir = opendir("/proc");
	if (!dir)
		return errno;
	while ((entry = readdir(dir)))
		if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9')
			add_process(a, entry->d_name);
	closedir(dir);
	return 0;
}
