/* The operations of a SETUP. The host decides what is done; here it is carried out. */
#include <dirent.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <stdlib.h>
#include <sys/vfs.h>
#include <time.h>

#include "../text.h"
#include "agent.h"

enum { WARM_MAX = 16 << 20 };

/* EXT4_IOC_RESIZE_FS, which the kernel's headers do not give to programs. */
#define EXT4_RESIZE_FS _IOW('f', 16, uint64_t)

/* The fields of each operation, as in docs/reference/guest-protocol.md. */
static const char *const shapes[SETUP_COUNT] = {
	[SETUP_ENTROPY] = "b", [SETUP_CLOCK] = "qq", [SETUP_HOSTNAME] = "s",
	[SETUP_INSMOD] = "ss", [SETUP_DISK] = "ss", [SETUP_MOUNT] = "sssqs",
	[SETUP_MKDIR] = "su", [SETUP_WRITE_FILE] = "sub", [SETUP_INTERFACE] = "usbu",
	[SETUP_ADDRESS] = "sbu", [SETUP_LINK_UP] = "s", [SETUP_ROUTE] = "sb",
	[SETUP_SYSCTL] = "ss", [SETUP_SYMLINK] = "ss", [SETUP_CGROUP] = "ss",
	[SETUP_RESIZE] = "ssq", [SETUP_ONLINE] = "u", [SETUP_REWRITE] = "sb", [SETUP_FLUSH] = "s",
	[SETUP_RETIRE] = "ss", [SETUP_WARM] = "s",
};

static bool fits(const struct op *op)
{
	struct reader r = op->body;

	return op->code > 0 && op->code < SETUP_COUNT && skip_fields(&r, shapes[op->code]) &&
	       r.at == r.end;
}

bool setup_fits(struct reader operations, uint32_t count, uint32_t *bad)
{
	struct op op;

	for (*bad = 0; *bad < count; ++*bad)
		if (!next_op(&operations, &op) || !fits(&op))
			return false;
	return operations.at == operations.end;
}

static int entropy(struct reader *r, const char **what)
{
	struct {
		struct rand_pool_info head;
		uint8_t bytes[512];
	} pool;
	uint32_t len;
	const uint8_t *at = read_bytes(r, &len);
	static int fd = -1; /* stays open: a clone has it from its template */

	*what = "/dev/urandom";
	if (len > sizeof(pool.bytes))
		return E2BIG;
	pool.head.entropy_count = (int)len * 8;
	pool.head.buf_size = (int)len;
	if (len)
		memcpy(pool.head.buf, at, len);
	if (fd < 0)
		fd = open(*what, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	/* Twins of one template hold the same pool: make the new bytes count at once. */
	return ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0 ? errno : 0;
}

static int clock_set(struct reader *r)
{
	struct timespec now = { .tv_sec = (time_t)read_u64(r) };

	now.tv_nsec = (long)read_u64(r);
	return clock_settime(CLOCK_REALTIME, &now) < 0 ? errno : 0;
}

/* The main process has a name space of its own for it: the twin of a machine is renamed. */
static int hostname_of_main(int own, const char *name)
{
	int error = 0;

	if (setns(the.main_fd, CLONE_NEWUTS) < 0 || sethostname(name, strlen(name)) < 0)
		error = errno;
	if (setns(own, CLONE_NEWUTS) < 0 && !error)
		error = errno;
	return error;
}

static int hostname(struct reader *r, const char **what)
{
	const char *name = *what = read_str(r);
	static int own = -1; /* stays open: a clone has it from its template */

	if (own < 0)
		own = open("/proc/self/ns/uts", O_RDONLY | O_CLOEXEC);
	if (own < 0 || sethostname(name, strlen(name)) < 0)
		return errno;
	return main_is_alive() ? hostname_of_main(own, name) : 0;
}

int insmod(const char *path, const char *params)
{
	int error = 0, fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (syscall(SYS_finit_module, fd, params, 0) < 0 && errno != EEXIST)
		error = errno;
	close(fd);
	return error;
}

/* Where a block device says which it is. */
static bool has_serial(const char *name, const char *serial)
{
	char path[PATH_MAX], found[64];
	struct text t = text_in(path, sizeof(path));

	text_add(&t, "/sys/block/");
	text_add(&t, name);
	text_add(&t, "/serial");
	return get_file(path, found, sizeof(found)) >= 0 && !strcmp(found, serial);
}

static int disk(struct reader *r, const char **what)
{
	const char *serial = *what = read_str(r), *link = read_str(r);
	char node[64] = "";
	struct text t = text_in(node, sizeof(node));
	struct dirent *entry;
	DIR *dir = opendir("/sys/block");

	if (!dir)
		return errno;
	while (!t.len && (entry = readdir(dir)))
		if (!strncmp(entry->d_name, "vd", 2) && has_serial(entry->d_name, serial)) {
			text_add(&t, "/dev/");
			text_add(&t, entry->d_name);
		}
	closedir(dir);
	if (!t.len)
		return SETUP_WAIT;
	*what = link;
	return make_symlink(node, link);
}

static int mount_at(struct reader *r, const char **what)
{
	const char *source = read_str(r), *target = *what = read_str(r);
	const char *fstype = read_str(r);
	uint64_t flags = read_u64(r);
	const char *data = read_str(r);
	int error = make_dirs(target, 0755, true);

	if (error)
		return error;
	if (mount(source, target, fstype, flags, *data ? data : NULL) == 0)
		return 0;
	/* That is how virtiofs says that it knows no such tag: the device may be on its way. */
	return errno == EINVAL && !strcmp(fstype, "virtiofs") ? SETUP_WAIT : errno;
}

/* Let an ext4 grow to `bytes`, once its device has heard that it is as large. */
static int resize(struct reader *r, const char **what)
{
	const char *device = *what = read_str(r), *path = read_str(r);
	uint64_t wanted = read_u64(r), size = 0, blocks;
	struct statfs fs;
	int error = 0, fd = open(device, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (ioctl(fd, BLKGETSIZE64, &size) < 0)
		error = errno;
	close(fd);
	if (error || size < wanted)
		return error ? error : SETUP_WAIT;
	*what = path;
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	if (fstatfs(fd, &fs) < 0) {
		error = errno;
	} else {
		blocks = wanted / (uint64_t)fs.f_bsize;
		if (ioctl(fd, EXT4_RESIZE_FS, &blocks) < 0)
			error = errno;
	}
	close(fd);
	return error;
}

static int write_whole(struct reader *r, const char **what)
{
	const char *path = *what = read_str(r);
	uint32_t mode = read_u32(r), len;
	const uint8_t *content = read_bytes(r, &len);

	return put_file(path, mode, content, len);
}

static int rewrite(struct reader *r, const char **what)
{
	const char *path = *what = read_str(r);
	uint32_t len;
	const uint8_t *content = read_bytes(r, &len);

	return rewrite_file(path, content, len);
}

static int sysctl(struct reader *r, const char **what)
{
	const char *key = *what = read_str(r);
	char path[PATH_MAX];
	struct text t = text_in(path, sizeof(path));

	text_add(&t, "/proc/sys/");
	text_add(&t, key);
	if (climbs(key) || t.len + 1 >= sizeof(path))
		return EINVAL;
	return put_value(path, read_str(r));
}

static void read_all(int fd, mode_t mode)
{
	_Alignas(8) static char chunk[64 << 10];
	size_t left = WARM_MAX;
	long n = 1;

	while (left && n > 0) {
		size_t part = left < sizeof(chunk) ? left : sizeof(chunk);
		n = S_ISDIR(mode) ? syscall(SYS_getdents64, fd, chunk, part)
				  : read(fd, chunk, part);
		left -= n > 0 ? (size_t)n : 0;
	}
}

/* Read a file or directory of the image, so that it need not be read from its disk again. That
 * it is not there, or cannot be read, is no failure. */
static int warm(struct reader *r, const char **what)
{
	const char *path = *what = read_str(r);
	int fd, root = open(the.root, O_PATH | O_DIRECTORY | O_CLOEXEC);
	struct stat st;

	if (root < 0)
		return errno;
	fd = sys_openat2(root, path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0,
			 RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
	close(root);
	if (fd < 0)
		return 0;
	if (fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)))
		read_all(fd, st.st_mode);
	close(fd);
	return 0;
}

/* Write `value` to every file DIR/PREFIXn/NAME that says otherwise, and "0" from n = `end` on. */
static int put_each(const char *where, const char *prefix, const char *name, const char *value,
		    unsigned long end)
{
	char path[PATH_MAX], state[32];
	struct dirent *entry;
	int error = 0;
	DIR *dir = opendir(where);

	while (dir && !error && (entry = readdir(dir))) {
		struct text t = text_in(path, sizeof(path));
		const char *number = entry->d_name + strlen(prefix), *wanted;
		if (strncmp(entry->d_name, prefix, strlen(prefix)) != 0 || *number < '0' || *number > '9')
			continue;
		text_add(&t, where);
		text_add(&t, "/");
		text_add(&t, entry->d_name);
		text_add(&t, name);
		if (get_file(path, state, sizeof(state)) < 0)
			continue; /* the first processor has none */
		wanted = strtoul(number, NULL, 10) < end ? value : "0";
		if (strncmp(state, wanted, strlen(wanted)) != 0)
			error = put_value(path, wanted);
	}
	if (dir)
		closedir(dir);
	return error;
}

/* The processors in a list as the kernel writes it: 0-2,5. */
static unsigned long count_listed(const char *list)
{
	unsigned long count = 0;

	while (*list >= '0' && *list <= '9') {
		char *end;
		unsigned long first = strtoul(list, &end, 10), last = first;
		if (*end == '-')
			last = strtoul(end + 1, &end, 10);
		count += last - first + 1;
		list = *end == ',' ? end + 1 : end;
	}
	return count;
}

/* Use as many processors as there are to be, which are waited for, and all memory. */
static int online(struct reader *r, const char **what)
{
	unsigned long wanted = read_u32(r);
	char list[4096];
	int error;

	*what = "/sys/devices/system/cpu";
	error = put_each(*what, "cpu", "/online", "1", wanted ? wanted : ULONG_MAX);
	if (error)
		return error;
	if (get_file("/sys/devices/system/cpu/online", list, sizeof(list)) >= 0 &&
	    count_listed(list) < wanted)
		return SETUP_WAIT;
	*what = "/sys/devices/system/memory";
	return put_each(*what, "memory", "/state", "online", ULONG_MAX);
}

/* Two strings, in the order in which they are read. */
static int with_pair(struct reader *r, const char **what,
		     int (*act)(const char *first, const char *second))
{
	const char *first = *what = read_str(r);

	return act(first, read_str(r));
}

int setup_run(const struct op *op, const char **what)
{
	struct reader body = op->body, *r = &body;
	const char *first;

	*what = "";
	switch (op->code) {
	case SETUP_ENTROPY: return entropy(r, what);
	case SETUP_CLOCK: return clock_set(r);
	case SETUP_HOSTNAME: return hostname(r, what);
	case SETUP_INSMOD: return with_pair(r, what, insmod);
	case SETUP_DISK: return disk(r, what);
	case SETUP_MOUNT: return mount_at(r, what);
	case SETUP_MKDIR:
		first = *what = read_str(r);
		return make_dirs(first, read_u32(r), true);
	case SETUP_WRITE_FILE: return write_whole(r, what);
	case SETUP_INTERFACE: return setup_interface(r, what);
	case SETUP_ADDRESS: return setup_address(r, what);
	case SETUP_LINK_UP: return setup_link_up(r, what);
	case SETUP_ROUTE: return setup_route(r, what);
	case SETUP_SYSCTL: return sysctl(r, what);
	case SETUP_SYMLINK: return with_pair(r, what, make_symlink);
	case SETUP_CGROUP:
		first = *what = read_str(r);
		return cgroup_create(first, read_str(r), what);
	case SETUP_RESIZE: return resize(r, what);
	case SETUP_ONLINE: return online(r, what);
	case SETUP_REWRITE: return rewrite(r, what);
	case SETUP_FLUSH: return setup_flush(r, what);
	case SETUP_RETIRE: return setup_retire(r, what);
	case SETUP_WARM: return warm(r, what);
	default: return ENOSYS; /* never: the number was checked */
	}
}
