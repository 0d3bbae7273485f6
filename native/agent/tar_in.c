/* Unpack a tar stream below a directory: ustar, pax, GNU long names. Links that the stream
 * itself makes cannot lead what follows out of the directory. */
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "../text.h"
#include "agent.h"
#include "files.h"

enum { EXTENDED_LIMIT = 1 << 20, XATTRS = 32, TIMES_LIMIT = 1 << 16 };

struct xattr {
	const char *name;
	const char *value;
	size_t len;
};

/* An entry as its head and what came before it say. */
struct entry {
	char name[PATH_MAX], link[PATH_MAX];
	bool has_name, has_link, has_size, has_mtime, has_uid, has_gid;
	uint64_t size, major, minor;
	uint32_t mode, uid, gid;
	int64_t mtime;
	char type;
	char *extended; /* what the xattrs point into */
	struct xattr xattrs[XATTRS];
	size_t xattr_count;
};

struct unpack {
	int dir;
	uint32_t uid, gid, entries;
	struct entry entry;
	struct { char *name; int64_t mtime; } times[TIMES_LIMIT]; /* of directories, set at the end */
	size_t time_count;
};

static void skip(uint64_t n)
{
	const uint8_t *at;

	while (n) {
		size_t got = in_some(&at, n < INT_MAX ? (size_t)n : INT_MAX);
		if (!got)
			fail_with(EPROTO, "the archive ends in the middle");
		n -= got;
	}
}

static uint64_t padding(uint64_t size)
{
	return (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK;
}

/* Octal digits, or GNU's big-endian number with the first bit set. */
static bool number(const char *field, size_t width, uint64_t *value)
{
	size_t i = 0;

	*value = 0;
	if ((unsigned char)field[0] & 0x80) {
		*value = (unsigned char)field[0] & 0x3f; /* bit 6: a negative one, of no use here */
		for (i = 1; i < width; i++) {
			if (*value >> 56)
				return false;
			*value = *value << 8 | (unsigned char)field[i];
		}
		return !(field[0] & 0x40);
	}
	while (i < width && field[i] == ' ')
		i++;
	for (; i < width && field[i] >= '0' && field[i] <= '7'; i++)
		*value = *value << 3 | (uint64_t)(field[i] - '0');
	return i == width || !field[i] || field[i] == ' ';
}

static bool is_zero(const struct tar_head *h)
{
	const uint8_t *at = (const uint8_t *)h;

	for (size_t i = 0; i < TAR_BLOCK; i++)
		if (at[i])
			return false;
	return true;
}

static bool checksum_fits(const struct tar_head *h)
{
	const uint8_t *at = (const uint8_t *)h;
	const size_t begin = offsetof(struct tar_head, checksum), end = begin + sizeof(h->checksum);
	uint64_t sum = 0, said;

	for (size_t i = 0; i < TAR_BLOCK; i++)
		sum += i >= begin && i < end ? ' ' : at[i];
	return number(h->checksum, sizeof(h->checksum), &said) && said == sum;
}

static void set_text(char to[PATH_MAX], const char *from, size_t n)
{
	if (n >= PATH_MAX || memchr(from, 0, n))
		fail_with(n >= PATH_MAX ? ENAMETOOLONG : EPROTO, "a name of the archive");
	memcpy(to, from, n);
	to[n] = 0;
}

/* pax records: "LENGTH KEY=VALUE\n". */

static bool key_is(const char *key, size_t len, const char *wanted)
{
	return len == strlen(wanted) && !memcmp(key, wanted, len);
}

static void pax_value(struct entry *e, const char *key, size_t key_len, const char *value, size_t n)
{
	static const char prefix[] = "SCHILY.xattr.";
	const size_t prefix_len = sizeof(prefix) - 1;

	if (key_is(key, key_len, "path")) {
		set_text(e->name, value, n);
		e->has_name = true;
	} else if (key_is(key, key_len, "linkpath")) {
		set_text(e->link, value, n);
		e->has_link = true;
	} else if (key_is(key, key_len, "size")) {
		e->size = strtoull(value, NULL, 10); /* a newline ends every record */
		e->has_size = true;
	} else if (key_is(key, key_len, "mtime")) {
		e->mtime = strtoll(value, NULL, 10);
		e->has_mtime = true;
	} else if (key_is(key, key_len, "uid")) {
		e->uid = (uint32_t)strtoul(value, NULL, 10);
		e->has_uid = true;
	} else if (key_is(key, key_len, "gid")) {
		e->gid = (uint32_t)strtoul(value, NULL, 10);
		e->has_gid = true;
	} else if (key_len > prefix_len && !memcmp(key, prefix, prefix_len) &&
		   e->xattr_count < XATTRS) {
		e->xattrs[e->xattr_count++] = (struct xattr){ key + prefix_len, value, n };
	}
}

static void pax_records(struct entry *e, char *at, size_t n)
{
	while (n) {
		char *end, *equals;
		unsigned long len = at[0] >= '0' && at[0] <= '9' ? strtoul(at, &end, 10) : 0;
		if (!len || len > n || *end != ' ' || end >= at + len || at[len - 1] != '\n')
			fail_with(EPROTO, "a pax header");
		end++;
		equals = memchr(end, '=', (size_t)(at + len - end));
		if (!equals)
			fail_with(EPROTO, "a pax header");
		*equals = 0;
		pax_value(e, end, (size_t)(equals - end), equals + 1,
			  (size_t)(at + len - 1 - (equals + 1)));
		n -= len;
		at += len;
	}
}

/* A head that speaks of the next entry: x, L, K. The bytes end with a NUL more. */
static char *extended_body(uint64_t size)
{
	char *body = size <= EXTENDED_LIMIT ? malloc(size + 1) : NULL;

	if (!body)
		fail_with(size <= EXTENDED_LIMIT ? ENOMEM : EFBIG, "a header of the archive");
	if (!in_exact(body, size))
		fail_with(EPROTO, "the archive ends in the middle");
	body[size] = 0;
	skip(padding(size));
	return body;
}

static bool is_extension(struct entry *e, char type, uint64_t size)
{
	char *body;

	if (type == 'g') {
		skip(size + padding(size));
		return true;
	}
	if (type != 'x' && type != 'L' && type != 'K')
		return false;
	body = extended_body(size);
	if (type == 'x') {
		free(e->extended);
		e->extended = body;
		e->xattr_count = 0;
		pax_records(e, body, size);
		return true;
	}
	set_text(type == 'L' ? e->name : e->link, body, strlen(body));
	*(type == 'L' ? &e->has_name : &e->has_link) = true;
	free(body);
	return true;
}

static void join_name(struct entry *e, const struct tar_head *h)
{
	char name[sizeof(h->prefix) + sizeof(h->name) + 2];
	struct text t = text_in(name, sizeof(name));

	if (!memcmp(h->magic, "ustar", 6) && h->prefix[0]) {
		text_add_bytes(&t, h->prefix, strnlen(h->prefix, sizeof(h->prefix)));
		text_add(&t, "/");
	}
	text_add_bytes(&t, h->name, strnlen(h->name, sizeof(h->name)));
	set_text(e->name, name, t.len);
}

static bool read_entry(struct entry *e, const struct tar_head *h)
{
	uint64_t mode, uid, gid, size, mtime;
	bool good = number(h->mode, 8, &mode) & number(h->uid, 8, &uid) & number(h->gid, 8, &gid) &
		    number(h->size, 12, &size) & number(h->major, 8, &e->major) &
		    number(h->minor, 8, &e->minor);

	if (!number(h->mtime, 12, &mtime))
		mtime = 0;
	e->type = h->type ? h->type : '0';
	e->mode = (uint32_t)mode;
	if (!e->has_name)
		join_name(e, h);
	if (!e->has_link)
		set_text(e->link, h->link, strnlen(h->link, sizeof(h->link)));
	if (!e->has_size)
		e->size = size;
	if (!e->has_mtime)
		e->mtime = (int64_t)mtime;
	if (!e->has_uid)
		e->uid = (uint32_t)uid;
	if (!e->has_gid)
		e->gid = (uint32_t)gid;
	return good;
}

static void forget(struct entry *e)
{
	free(e->extended);
	e->extended = NULL;
	e->has_name = e->has_link = e->has_size = e->has_mtime = e->has_uid = e->has_gid = false;
	e->xattr_count = 0;
}

/* Making what an entry says. */

static void set_times(int parent, const char *leaf, int64_t mtime)
{
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_sec = mtime } };

	(void)!utimensat(parent, leaf, times, AT_SYMLINK_NOFOLLOW);
}

static void set_xattrs(const struct entry *e, int fd)
{
	for (size_t i = 0; i < e->xattr_count; i++) {
		const struct xattr *x = &e->xattrs[i];
		if (strcmp(x->name, "security.capability") != 0 && strncmp(x->name, "user.", 5) != 0)
			continue;
		if (fsetxattr(fd, x->name, x->value, x->len, 0) < 0 && errno != ENOTSUP &&
		    errno != EPERM)
			fail_with(errno, e->name);
	}
}

static void set_owner(const struct unpack *u, int parent, const char *leaf)
{
	const struct entry *e = &u->entry;
	uint32_t uid = u->uid == (uint32_t)KEEP ? e->uid : u->uid;
	uint32_t gid = u->gid == (uint32_t)KEEP ? e->gid : u->gid;

	if (fchownat(parent, leaf, uid, gid, AT_SYMLINK_NOFOLLOW) < 0)
		fail_with(errno, e->name);
}

static void make_file(struct unpack *u, int parent, const char *leaf)
{
	struct entry *e = &u->entry;
	uint64_t left = e->size;
	int fd = openat(parent, leaf, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

	if (fd < 0)
		fail_with(errno, e->name);
	while (left) {
		const uint8_t *at;
		size_t n = in_some(&at, left < INT_MAX ? (size_t)left : INT_MAX);
		if (!n || write_all(fd, at, n) < 0) {
			int error = n ? errno : EPROTO;
			unlinkat(parent, leaf, 0);
			fail_with(error, n ? e->name : "the archive ends in the middle");
		}
		left -= n;
	}
	skip(padding(e->size));
	e->size = 0;
	set_owner(u, parent, leaf);
	set_xattrs(e, fd);
	if (fchmod(fd, e->mode & 07777) < 0)
		fail_with(errno, e->name);
	close(fd);
	set_times(parent, leaf, e->mtime);
}

static void make_directory(struct unpack *u, int parent, const char *leaf)
{
	struct entry *e = &u->entry;
	int fd;

	if (mkdirat(parent, leaf, 0700) < 0 && errno != EEXIST)
		fail_with(errno, e->name);
	fd = openat(parent, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		fail_with(errno, e->name);
	set_owner(u, parent, leaf);
	set_xattrs(e, fd);
	if (fchmod(fd, e->mode & 07777) < 0)
		fail_with(errno, e->name);
	close(fd);
	if (u->time_count < TIMES_LIMIT) {
		u->times[u->time_count].name = strdup(e->name);
		u->times[u->time_count].mtime = e->mtime;
		u->time_count += u->times[u->time_count].name != NULL;
	}
}

static void make_hard_link(struct unpack *u, int parent, const char *leaf)
{
	struct entry *e = &u->entry;
	const char *from;
	int dir = tree_parent(u->dir, e->link, &from);

	if (dir < 0 || linkat(dir, from, parent, leaf, 0) < 0)
		fail_with(errno, e->name);
	close(dir);
}

static void make_node(struct unpack *u, int parent, const char *leaf)
{
	struct entry *e = &u->entry;
	mode_t kind = e->type == '3' ? S_IFCHR : e->type == '4' ? S_IFBLK : S_IFIFO;

	if (mknodat(parent, leaf, kind | 0600, makedev(e->major, e->minor)) < 0)
		fail_with(errno, e->name);
	set_owner(u, parent, leaf);
	if (fchmodat(parent, leaf, e->mode & 07777, 0) < 0)
		fail_with(errno, e->name);
	set_times(parent, leaf, e->mtime);
}

static void make_symbolic_link(struct unpack *u, int parent, const char *leaf)
{
	struct entry *e = &u->entry;

	if (symlinkat(e->link, parent, leaf) < 0)
		fail_with(errno, e->name);
	set_owner(u, parent, leaf);
	set_times(parent, leaf, e->mtime);
}

/* What is there goes away, but a directory stays, and nothing else makes way for one. */
static void make_way(const struct entry *e, int parent, const char *leaf)
{
	struct stat st;

	if (fstatat(parent, leaf, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return;
	if (S_ISDIR(st.st_mode) != (e->type == '5'))
		fail_with(S_ISDIR(st.st_mode) ? EISDIR : ENOTDIR, e->name);
	if (!S_ISDIR(st.st_mode) && unlinkat(parent, leaf, 0) < 0)
		fail_with(errno, e->name);
}

static int open_parent(struct unpack *u, const char **leaf)
{
	char before[PATH_MAX];
	struct entry *e = &u->entry;
	int parent = tree_parent(u->dir, e->name, leaf);
	struct text t = text_in(before, sizeof(before));

	if (parent >= 0 || errno != ENOENT)
		return parent;
	text_add_bytes(&t, e->name, (size_t)(*leaf - e->name)); /* archives may leave parents out */
	if (tree_make(u->dir, before, 0755, u->uid, u->gid) < 0)
		return -1;
	return tree_parent(u->dir, e->name, leaf);
}

static void make_entry(struct unpack *u)
{
	struct entry *e = &u->entry;
	size_t len = strlen(e->name);
	const char *leaf;
	int parent;

	while (len && e->name[len - 1] == '/')
		e->name[--len] = 0;
	if (!len || !strcmp(e->name, ".") || (len > 1 && !strcmp(e->name + len - 2, "/.")))
		return; /* the directory itself */
	if (climbs(e->name))
		fail_with(EINVAL, e->name);
	parent = open_parent(u, &leaf);
	if (parent < 0)
		fail_with(errno, e->name);
	make_way(e, parent, leaf);
	switch (e->type) {
	case '0': case '7': make_file(u, parent, leaf); break;
	case '1': make_hard_link(u, parent, leaf); break;
	case '2': make_symbolic_link(u, parent, leaf); break;
	case '3': case '4': case '6': make_node(u, parent, leaf); break;
	case '5': make_directory(u, parent, leaf); break;
	default: fail_with(EPROTO, e->name);
	}
	close(parent);
	u->entries++;
}

static void set_directory_times(struct unpack *u)
{
	while (u->time_count) {
		const char *leaf, *name = u->times[--u->time_count].name;
		int parent = tree_parent(u->dir, name, &leaf);
		if (parent < 0)
			continue;
		set_times(parent, leaf, u->times[u->time_count].mtime);
		close(parent);
	}
}

void unpack(const char *path, uint32_t uid, uint32_t gid)
{
	static struct unpack u;
	struct tar_head head;
	uint64_t size;

	u.dir = tree_open(ROOT, path, O_RDONLY | O_DIRECTORY, 0);
	if (u.dir < 0)
		fail_with(errno, path);
	u.uid = uid;
	u.gid = gid;
	while (in_exact(&head, sizeof(head)) && !is_zero(&head)) {
		if (!checksum_fits(&head) || !number(head.size, sizeof(head.size), &size))
			fail_with(EPROTO, "a head of the archive");
		if (is_extension(&u.entry, head.type, size))
			continue;
		if (!read_entry(&u.entry, &head))
			fail_with(EPROTO, "a head of the archive");
		make_entry(&u);
		if (u.entry.size)
			skip(u.entry.size + padding(u.entry.size));
		forget(&u.entry);
	}
	set_directory_times(&u);
	out_ok();
	out_u32(u.entries);
}
