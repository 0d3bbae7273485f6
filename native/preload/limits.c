/* hutch-limits.so: lets CRIU read the limits of another user's processes where the host withholds
 * CAP_SYS_RESOURCE from root, as hosts that are containers themselves do.
 *
 * CRIU asks for them with prlimit(2), which wants that capability even for reading; /proc has
 * the same numbers for root. Preloaded, this answers from there what the kernel refused. Other
 * system calls, and every change of a limit, pass as they are.
 *
 * No library is linked: errno is that of CRIU's own C library. */
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>

enum { ROOM = 4096, SOFT_COLUMN = 26, HARD_COLUMN = 47, MAX_ERRNO = 4095 };

extern int *__errno_location(void);

static long raw(long n, const long a[6])
{
#if defined(__x86_64__)
	register long r10 __asm__("r10") = a[3];
	register long r8 __asm__("r8") = a[4];
	register long r9 __asm__("r9") = a[5];
	long result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(n), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a[0];
	register long x1 __asm__("x1") = a[1];
	register long x2 __asm__("x2") = a[2];
	register long x3 __asm__("x3") = a[3];
	register long x4 __asm__("x4") = a[4];
	register long x5 __asm__("x5") = a[5];

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
#else
#error "no system call for this machine"
#endif
}

static void limits_path(char *path, long pid)
{
	static const char head[] = "/proc/", tail[] = "/limits";
	char digits[20];
	int n = 0;

	for (const char *at = head; *at; at++)
		*path++ = *at;
	do
		digits[n++] = (char)('0' + pid % 10);
	while ((pid /= 10) > 0);
	while (n)
		*path++ = digits[--n];
	for (const char *at = tail; *at; at++)
		*path++ = *at;
	*path = 0;
}

static unsigned long number(const char *at)
{
	unsigned long value = 0;

	if (*at < '0' || *at > '9')
		return ~0UL; /* unlimited */
	for (; *at >= '0' && *at <= '9'; at++)
		value = value * 10 + (unsigned long)(*at - '0');
	return value;
}

/* The lines stand in the order of the limits' numbers, below one of titles. */
static int find_limit(const char *text, long resource, unsigned long out[2])
{
	for (long line = 0; line <= resource; line++) {
		while (*text && *text != '\n')
			text++;
		if (!*text++)
			return -1;
	}
	for (int i = 0; i < HARD_COLUMN; i++)
		if (!text[i] || text[i] == '\n')
			return -1;
	out[0] = number(text + SOFT_COLUMN);
	out[1] = number(text + HARD_COLUMN);
	return 0;
}

static int told_limit(long pid, long resource, unsigned long *out)
{
	char path[64], text[ROOM + 1];
	long fd, n, len = 0;

	if (pid <= 0 || resource < 0 || !out)
		return -1;
	limits_path(path, pid);
	fd = raw(__NR_openat, (long[6]){ AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC });
	if (fd < 0)
		return -1;
	while ((n = raw(__NR_read, (long[6]){ fd, (long)(text + len), ROOM - len })) > 0)
		len += n;
	raw(__NR_close, (long[6]){ fd });
	text[len] = 0;
	return n < 0 ? -1 : find_limit(text, resource, out);
}

long syscall(long n, ...);
long syscall(long n, ...)
{
	va_list list;
	long a[6], result;

	va_start(list, n);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	result = raw(n, a);
	if (result == -EPERM && n == __NR_prlimit64 && !a[2] &&
	    told_limit(a[0], a[1], (unsigned long *)a[3]) == 0)
		return 0;
	if (result < 0 && result >= -MAX_ERRNO) {
		*__errno_location() = (int)-result;
		return -1;
	}
	return result;
}
