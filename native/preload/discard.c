/* hutch-discard.so: for a QEMU whose guest's memory is a template's, mapped privately. It lets
 * QEMU give memory back that it has on top of that, and takes no huge pages.
 *
 * To discard memory that comes from a file QEMU punches a hole into the file, then drops its
 * own pages (MADV_DONTNEED). A template's memory file is sealed against writing, so the first
 * fails, and QEMU leaves out the second, which alone matters: a private mapping's own pages.
 * Preloaded, this says that a hole was punched where a seal forbids it. Nothing of a file
 * changes by that; what the guest finds in such memory afterwards is the template's, and a
 * guest that gave memory back does not count on what is in it.
 *
 * Of memory mapped like that no page is huge, whatever is set. What else QEMU asks them for is
 * a place for the tables of ACPI, of which it fills a tenth: 2 MB, and the time to clear them.
 *
 * No library is linked: `syscall` is that of QEMU's own C library, which sets its errno. */
#include <asm/unistd.h>
#include <linux/falloc.h>
#include <linux/fcntl.h>
#include <linux/prctl.h>

extern long syscall(long number, ...);

static __attribute__((constructor)) void take_no_huge_pages(void)
{
	syscall(__NR_prctl, PR_SET_THP_DISABLE, 1L, 0L, 0L, 0L);
}

static int allocate(int fd, int mode, long offset, long length)
{
	if (mode & FALLOC_FL_PUNCH_HOLE) {
		long seals = syscall(__NR_fcntl, fd, F_GET_SEALS);
		if (seals > 0 && seals & F_SEAL_WRITE)
			return 0;
	}
	return (int)syscall(__NR_fallocate, fd, mode, offset, length);
}

int fallocate(int fd, int mode, long offset, long length);
int fallocate(int fd, int mode, long offset, long length)
{
	return allocate(fd, mode, offset, length);
}

/* The name under which programs built for large files know it. */
int fallocate64(int fd, int mode, long offset, long length);
int fallocate64(int fd, int mode, long offset, long length)
{
	return allocate(fd, mode, offset, length);
}
