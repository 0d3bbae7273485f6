/* Run a program in a machine and end as it ends: `hutch-vmm exec DIRECTORY PLAN`, which is how
 * a health check, started by the supervisor on the host, reaches into the guest. */
#include "hold.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "../supervisor.h"

enum { KIND_EXEC = 3, EXIT_LOST = 125 };

static bool write_all(int fd, const void *data, size_t n)
{
	const char *at = data;

	while (n) {
		ssize_t done = write(fd, at, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		at += done;
		n -= (size_t)done;
	}
	return true;
}

static bool read_all(int fd, void *data, size_t n)
{
	char *at = data;

	while (n) {
		ssize_t done = read(fd, at, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		at += done;
		n -= (size_t)done;
	}
	return true;
}

/* By way of the working directory: a socket's path has room for 107 bytes only. */
static int connect_agent(const char *directory)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "agent.sock" };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || chdir(directory) < 0 ||
	    connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
		return -1;
	return fd;
}

static bool send_plan(int connection, const char *path)
{
	static const uint8_t head[8] = { 'H', 'V', 'A', '1', KIND_EXEC };
	static const uint8_t attach[FRAME_HEAD] = { FR_ATTACH, ATTACH_STDOUT | ATTACH_STDERR };
	static char piece[16 << 10];
	int plan = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t size[4];
	ssize_t n;

	if (plan < 0 || fstat(plan, &st) < 0 || st.st_size <= 0 || st.st_size > MAX_PLAN)
		return false;
	put_u32(size, (uint32_t)st.st_size);
	if (!write_all(connection, head, sizeof(head)) || !write_all(connection, size, 4))
		return false;
	while ((n = read(plan, piece, sizeof(piece))) > 0)
		if (!write_all(connection, piece, (size_t)n))
			return false;
	close(plan);
	return n == 0 && write_all(connection, attach, sizeof(attach));
}

int probe_guest(const char *directory, const char *plan)
{
	static uint8_t body[FRAME_MAX];
	uint8_t head[FRAME_HEAD];
	int connection = connect_agent(directory);

	if (connection < 0 || !send_plan(connection, plan))
		return EXIT_LOST;
	while (read_all(connection, head, sizeof(head))) {
		uint32_t length = get_u32(head + 4);

		if (length > sizeof(body) || !read_all(connection, body, length))
			return EXIT_LOST;
		if (head[0] == FR_OUTPUT)
			(void)!write_all(head[1] == 2 ? STDERR_FILENO : STDOUT_FILENO, body, length);
		else if (head[0] == FR_FAILED)
			return length >= 8 && get_u32(body + 4) == ENOENT ? 127 : 126;
		else if (head[0] == FR_EXIT && length >= 4)
			return (int)get_u32(body) & 0xFF;
	}
	return EXIT_LOST;
}
