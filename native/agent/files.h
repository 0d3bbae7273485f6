/* The files helper: one request on descriptors 0 and 1, about the tree at descriptor 3. */
#ifndef HUTCH_FILES_H
#define HUTCH_FILES_H

#include <sys/stat.h>

#include "../sys.h"
#include "../wire.h"

enum { ROOT = 3, KEEP = -1 };

/* files.c: the stream. Writing to a peer that is gone ends the helper. */
size_t in_some(const uint8_t **at, size_t most); /* 0: the end */
bool in_exact(void *to, size_t n);
bool in_was_abandoned(void); /* the other side did not finish, but went away */
void out_bytes(const void *data, size_t n);
void out_u32(uint32_t value);
void out_u64(uint64_t value);
void out_str(const char *s);
void out_flush(void);
void out_ok(void); /* the head of a good answer */
_Noreturn void fail_with(int error, const char *detail);

/* tree.c: names below a directory; links lead nowhere else. -1 and errno. */
int tree_open(int dir, const char *path, uint64_t flags, uint64_t mode);
int tree_parent(int dir, const char *path, const char **leaf); /* leaf: into `path`, no slashes */
int tree_make(int dir, const char *path, uint32_t mode, uint32_t uid, uint32_t gid);
int tree_remove(int parent, const char *leaf, bool recursive);

/* tar_out.c, tar_in.c */
enum { PACK_FOLLOW = 1, PACK_CONTENTS = 2 };
void pack(const char *path, uint32_t flags, const char *name);
void pack_upper(const char *upper);
void unpack(const char *path, uint32_t uid, uint32_t gid);

enum { TAR_BLOCK = 512 };

struct tar_head {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type;
	char link[100], magic[6], version[2], uname[32], gname[32], major[8], minor[8];
	char prefix[155], pad[12];
};

_Static_assert(sizeof(struct tar_head) == TAR_BLOCK, "a tar head is one block");

#endif
