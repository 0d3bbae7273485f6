/* Write a tree as a pax tar stream: PACK, and PACKUPPER as a layer of an image. */
#include <dirent.h>
#include <limits.h>
#include <linux/limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "../text.h"
#include "files.h"

enum { PAX_LIMIT = 128 << 10, LINKS_LIMIT = 1 << 20, OCTAL_ID = 07777777 };

#define OCTAL_SIZE 077777777777u

struct seen {
	dev_t dev;
	ino_t ino;
	char *name;
};

struct pack {
	bool layer; /* overlay's marks become whiteouts */
	char *pax;  /* records of the entry at hand */
	size_t pax_len;
	struct seen *seen; /* by hash; a power of two */
	size_t seen_cap, seen_len;
};

static const uint8_t zeros[2 * TAR_BLOCK];

static void pad(uint64_t size)
{
	out_bytes(zeros, (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK);
}

static void octal(char *field, size_t width, uint64_t value)
{
	field[--width] = 0;
	while (width) {
		field[--width] = (char)('0' + (value & 7));
		value >>= 3;
	}
}

static void checksum(struct tar_head *h)
{
	const uint8_t *at = (const uint8_t *)h;
	unsigned sum = 0;

	memset(h->checksum, ' ', sizeof(h->checksum));
	for (size_t i = 0; i < TAR_BLOCK; i++)
		sum += at[i];
	octal(h->checksum, 7, sum);
}

static void fill(char *field, size_t width, const char *value)
{
	size_t n = strlen(value);

	memcpy(field, value, n < width ? n : width);
}

/* "LENGTH KEY=VALUE\n", where LENGTH counts itself. */
static void pax_record(struct pack *p, const char *key, const void *value, size_t n)
{
	size_t body = 3 + strlen(key) + n, len = body + 1;
	char head[16 + XATTR_NAME_MAX + 64], digits[24];
	struct text t = text_in(head, sizeof(head)), d;

	for (;;) {
		d = text_in(digits, sizeof(digits));
		text_add_num(&d, (int64_t)len);
		if (d.len + body == len)
			break;
		len = d.len + body;
	}
	if (len > PAX_LIMIT - p->pax_len)
		return;
	text_add(&t, digits);
	text_add(&t, " ");
	text_add(&t, key);
	text_add(&t, "=");
	memcpy(p->pax + p->pax_len, head, t.len);
	memcpy(p->pax + p->pax_len + t.len, value, n);
	p->pax[p->pax_len + len - 1] = '\n';
	p->pax_len += len;
}

static void pax_number(struct pack *p, const char *key, int64_t value)
{
	char digits[24];
	struct text d = text_in(digits, sizeof(digits));

	text_add_num(&d, value);
	pax_record(p, key, digits, d.len);
}

static void head_out(struct pack *p, struct tar_head *h)
{
	struct tar_head extended = { .type = 'x', .magic = "ustar", .version = "00" };

	if (p->pax_len) {
		fill(extended.name, sizeof(extended.name), "pax");
		octal(extended.mode, 8, 0644);
		octal(extended.uid, 8, 0);
		octal(extended.gid, 8, 0);
		octal(extended.size, 12, p->pax_len);
		octal(extended.mtime, 12, 0);
		checksum(&extended);
		out_bytes(&extended, TAR_BLOCK);
		out_bytes(p->pax, p->pax_len);
		pad(p->pax_len);
	}
	checksum(h);
	out_bytes(h, TAR_BLOCK);
	p->pax_len = 0;
}

static void number_or_pax(struct pack *p, char *field, size_t width, uint64_t value,
			  uint64_t most, const char *key)
{
	octal(field, width, value > most ? 0 : value);
	if (value > most)
		pax_number(p, key, (int64_t)value);
}

static void entry_out(struct pack *p, const char *name, const char *link, char type,
		      const struct stat *st, uint64_t size)
{
	struct tar_head h = { .type = type, .magic = "ustar", .version = "00" };

	fill(h.name, sizeof(h.name), name);
	fill(h.link, sizeof(h.link), link);
	if (strlen(name) > sizeof(h.name))
		pax_record(p, "path", name, strlen(name));
	if (strlen(link) > sizeof(h.link))
		pax_record(p, "linkpath", link, strlen(link));
	octal(h.mode, sizeof(h.mode), st->st_mode & 07777);
	number_or_pax(p, h.uid, sizeof(h.uid), st->st_uid, OCTAL_ID, "uid");
	number_or_pax(p, h.gid, sizeof(h.gid), st->st_gid, OCTAL_ID, "gid");
	number_or_pax(p, h.size, sizeof(h.size), size, OCTAL_SIZE, "size");
	if (st->st_mtim.tv_sec < 0)
		pax_number(p, "mtime", st->st_mtim.tv_sec);
	octal(h.mtime, sizeof(h.mtime), st->st_mtim.tv_sec < 0 ? 0 : (uint64_t)st->st_mtim.tv_sec);
	octal(h.major, sizeof(h.major), major(st->st_rdev));
	octal(h.minor, sizeof(h.minor), minor(st->st_rdev));
	head_out(p, &h);
}

static bool is_kept(const char *xattr)
{
	if (!strncmp(xattr, "user.overlay.", 13))
		return false;
	return !strcmp(xattr, "security.capability") || !strncmp(xattr, "user.", 5);
}

static void add_xattrs(struct pack *p, int fd)
{
	static char names[XATTR_LIST_MAX], value[XATTR_SIZE_MAX];
	char key[XATTR_NAME_MAX + 64];
	ssize_t n = flistxattr(fd, names, sizeof(names));

	for (ssize_t at = 0; at < n; at += (ssize_t)strlen(names + at) + 1) {
		struct text t = text_in(key, sizeof(key));
		ssize_t len;
		if (!is_kept(names + at))
			continue;
		len = fgetxattr(fd, names + at, value, sizeof(value));
		if (len < 0)
			continue;
		text_add(&t, "SCHILY.xattr.");
		text_add(&t, names + at);
		pax_record(p, key, value, (size_t)len);
	}
}

/* Hard links: the first name of an inode that has several. */

static size_t slot_of(const struct pack *p, const struct stat *st)
{
	size_t at = (size_t)(st->st_ino * 0x9e3779b97f4a7c15u >> 20) & (p->seen_cap - 1);

	while (p->seen[at].name && (p->seen[at].ino != st->st_ino || p->seen[at].dev != st->st_dev))
		at = (at + 1) & (p->seen_cap - 1);
	return at;
}

static bool seen_grow(struct pack *p)
{
	struct pack larger = { .seen_cap = p->seen_cap ? p->seen_cap * 2 : 1024 };

	if (p->seen_len * 2 < p->seen_cap)
		return true;
	if (larger.seen_cap > LINKS_LIMIT)
		return false;
	larger.seen = calloc(larger.seen_cap, sizeof(*larger.seen));
	if (!larger.seen)
		return false;
	for (size_t i = 0; i < p->seen_cap; i++) {
		struct stat st = { .st_ino = p->seen[i].ino, .st_dev = p->seen[i].dev };
		if (p->seen[i].name)
			larger.seen[slot_of(&larger, &st)] = p->seen[i];
	}
	free(p->seen);
	p->seen = larger.seen;
	p->seen_cap = larger.seen_cap;
	return true;
}

/* The earlier name of this inode; NULL, and remembered, when it is the first. */
static const char *link_of(struct pack *p, const struct stat *st, const char *name)
{
	size_t at;

	if (st->st_nlink < 2 || S_ISDIR(st->st_mode) || !seen_grow(p))
		return NULL;
	at = slot_of(p, st);
	if (p->seen[at].name)
		return p->seen[at].name;
	p->seen[at] = (struct seen){ st->st_dev, st->st_ino, strdup(name) };
	p->seen_len += p->seen[at].name != NULL;
	return NULL;
}

/* Exactly `size` bytes go out, as the head promised, whatever happens to the file meanwhile. */
static void content_out(int fd, uint64_t size)
{
	static uint8_t chunk[64 << 10];
	uint64_t left = size;

	while (left) {
		ssize_t n = read(fd, chunk, left < sizeof(chunk) ? left : sizeof(chunk));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			n = left < sizeof(chunk) ? (ssize_t)left : (ssize_t)sizeof(chunk);
			memset(chunk, 0, (size_t)n);
		}
		out_bytes(chunk, (size_t)n);
		left -= (uint64_t)n;
	}
	pad(size);
}

static void whiteout(struct pack *p, const char *name, const struct stat *st)
{
	char path[PATH_MAX];
	struct text t = text_in(path, sizeof(path));
	const char *slash = strrchr(name, '/'), *leaf = slash ? slash + 1 : name;
	struct stat plain = { .st_mtim = st->st_mtim };

	text_add_bytes(&t, name, (size_t)(leaf - name));
	text_add(&t, ".wh.");
	text_add(&t, leaf);
	entry_out(p, path, "", '0', &plain, 0);
}

static void opaque(struct pack *p, int fd, const char *name, const struct stat *st)
{
	char value[2], path[PATH_MAX];
	struct text t = text_in(path, sizeof(path));

	if (!p->layer || fgetxattr(fd, "trusted.overlay.opaque", value, sizeof(value)) != 1 ||
	    value[0] != 'y')
		return;
	text_add(&t, name);
	text_add(&t, ".wh..opq"); /* whiteout() puts ".wh." before it */
	whiteout(p, path, st);
}

static void children_out(struct pack *p, int fd, const char *name);

static void directory_out(struct pack *p, int fd, const char *name, const struct stat *st)
{
	char path[PATH_MAX];
	struct text t = text_in(path, sizeof(path));

	text_add(&t, name);
	text_add(&t, "/");
	add_xattrs(p, fd);
	entry_out(p, path, "", '5', st, 0);
	opaque(p, fd, path, st);
	children_out(p, fd, path);
}

static void special_out(struct pack *p, const char *name, const struct stat *st)
{
	if (p->layer && S_ISCHR(st->st_mode) && !st->st_rdev)
		whiteout(p, name, st);
	else if (S_ISFIFO(st->st_mode))
		entry_out(p, name, "", '6', st, 0);
	else if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode))
		entry_out(p, name, "", S_ISCHR(st->st_mode) ? '3' : '4', st, 0);
	/* Sockets mean nothing without their listeners. */
}

/* What is no directory; `fd` is open for reading if it is a file, else for its name only. */
static void leaf_out(struct pack *p, int fd, const char *name, const struct stat *st)
{
	char target[PATH_MAX];
	const char *link = link_of(p, st, name);

	if (link) {
		entry_out(p, name, link, '1', st, 0);
	} else if (S_ISREG(st->st_mode)) {
		add_xattrs(p, fd);
		entry_out(p, name, "", '0', st, (uint64_t)st->st_size);
		content_out(fd, (uint64_t)st->st_size);
	} else if (S_ISLNK(st->st_mode)) {
		ssize_t n = readlinkat(fd, "", target, sizeof(target) - 1);
		target[n > 0 ? n : 0] = 0;
		entry_out(p, name, target, '2', st, 0);
	} else {
		special_out(p, name, st);
	}
}

/* One entry, by its name below a directory. What is gone meanwhile is left out. */
static void node_out(struct pack *p, int dir, const char *leaf, const char *name)
{
	struct stat st;
	int how, fd;

	if (fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return;
	/* Opening a device or a FIFO may do things. */
	how = S_ISREG(st.st_mode) || S_ISDIR(st.st_mode) ? O_RDONLY | O_NONBLOCK : O_PATH;
	fd = openat(dir, leaf, how | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return;
	if (fstat(fd, &st) == 0) {
		if (S_ISDIR(st.st_mode))
			directory_out(p, fd, name, &st);
		else
			leaf_out(p, fd, name, &st);
	}
	close(fd);
}

static void children_out(struct pack *p, int fd, const char *name)
{
	char path[PATH_MAX];
	int own = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = own < 0 ? NULL : fdopendir(own);
	struct dirent *entry;

	while (dir && (entry = readdir(dir))) {
		struct text t = text_in(path, sizeof(path));
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		text_add(&t, name);
		text_add(&t, entry->d_name);
		if (t.len + 1 < sizeof(path)) /* what is cut here could not be named there either */
			node_out(p, own, entry->d_name, path);
	}
	if (dir)
		closedir(dir);
	else if (own >= 0)
		close(own);
}

static struct pack begin(bool layer)
{
	struct pack p = { .layer = layer, .pax = malloc(PAX_LIMIT) };

	if (!p.pax)
		fail_with(ENOMEM, "");
	return p;
}

/* The file that a path led to, whatever now stands at that path. */
static int reopen(int fd)
{
	char own[64];
	struct text t = text_in(own, sizeof(own));

	text_add(&t, "/proc/self/fd/");
	text_add_num(&t, fd);
	return open(own, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

void pack(const char *path, uint32_t flags, const char *name)
{
	struct pack p = begin(false);
	struct stat st;
	int fd = tree_open(ROOT, path, O_PATH | ((flags & PACK_FOLLOW) ? 0 : O_NOFOLLOW), 0);

	if (fd < 0 || fstat(fd, &st) < 0)
		fail_with(errno, path);
	if ((flags & PACK_CONTENTS) && !S_ISDIR(st.st_mode))
		fail_with(ENOTDIR, path);
	if (S_ISDIR(st.st_mode)) {
		fd = tree_open(fd, ".", O_RDONLY | O_DIRECTORY, 0);
		if (fd < 0)
			fail_with(errno, path);
	} else if (S_ISREG(st.st_mode)) {
		fd = reopen(fd);
		if (fd < 0)
			fail_with(errno, path);
	}
	out_ok();
	if (flags & PACK_CONTENTS)
		children_out(&p, fd, "");
	else if (S_ISDIR(st.st_mode))
		directory_out(&p, fd, name, &st);
	else
		leaf_out(&p, fd, name, &st);
	out_bytes(zeros, sizeof(zeros));
}

void pack_upper(const char *upper)
{
	struct pack p = begin(true);
	int fd = open(upper, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		fail_with(errno, upper);
	out_ok();
	children_out(&p, fd, "");
	out_bytes(zeros, sizeof(zeros));
}
