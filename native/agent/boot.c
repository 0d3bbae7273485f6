/* The duties of process 1 before it can serve: mounts, modules, the port to the host. */
#include <dirent.h>
#include <limits.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "../text.h"
#include "agent.h"

enum { PORT_MS = 30000, LIST = 16 << 10 };

static const char port_name[] = "org.hutch.agent\n";

void give_up(const char *what)
{
	char message[512];
	struct text t = text_in(message, sizeof(message));
	int error = errno;

	text_add(&t, "hutch-agent: ");
	text_add(&t, what);
	text_add(&t, ": ");
	text_add(&t, strerror(error));
	text_add(&t, "\n");
	(void)!write_all(2, message, t.len);
	if (!the.init)
		_exit(1);
	sync();
	reboot(RB_POWER_OFF);
	_exit(1);
}

/* Launchers call pivot_root(2), which refuses while the root is the first of all mounts. A
 * mount of the initramfs on itself is as good as any other and copies nothing. */
static void leave_first_root(void)
{
	mkdir("/newroot", 0755);
	if (mount("/", "/newroot", NULL, MS_BIND, NULL) < 0 || chdir("/newroot") < 0 ||
	    mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		give_up("the root");
	rmdir("/newroot");
}

static void mount_one(const char *fstype, const char *target, unsigned long flags, const char *data)
{
	mkdir(target, 0755);
	/* devtmpfs may be there already: the kernel mounts it where it was built to. */
	if (mount(fstype, target, fstype, flags, data) < 0 && errno != EBUSY)
		give_up(target);
}

static void mount_all(void)
{
	const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;

	mount_one("proc", "/proc", plain, NULL);
	mount_one("sysfs", "/sys", plain, NULL);
	mount_one("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	mount_one("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
	mount_one("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	mount_one("cgroup2", "/sys/fs/cgroup", plain, NULL);
}

static void open_console(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (fd < 0)
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int to = 0; fd >= 0 && to < 3; to++)
		if (fd != to)
			dup2(fd, to);
	if (fd > 2)
		close(fd);
}

/* A path and its parameters a line. */
static void load_modules(void)
{
	static char list[LIST];
	char *save = NULL;

	if (get_file("/etc/modules", list, sizeof(list)) < 0)
		return; /* everything is built in */
	for (char *line = strtok_r(list, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		char *params = line + strcspn(line, " \t");
		int error;
		if (*line == '#' || params == line)
			continue;
		if (*params)
			*params++ = 0;
		error = insmod(line, params);
		if (error) {
			errno = error;
			give_up(line);
		}
	}
}

int open_uevents(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
			NETLINK_KOBJECT_UEVENT);

	if (fd >= 0 && bind(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	if (fd >= 0)
		close(fd);
	return -1;
}

/* The port's node, when the host has told its name. */
static bool find_port(char *node, size_t cap)
{
	char path[PATH_MAX], name[64];
	struct dirent *entry;
	bool found = false;
	DIR *dir = opendir("/sys/class/virtio-ports");

	while (dir && !found && (entry = readdir(dir))) {
		struct text t = text_in(path, sizeof(path));
		text_add(&t, "/sys/class/virtio-ports/");
		text_add(&t, entry->d_name);
		text_add(&t, "/name");
		if (entry->d_name[0] == '.' || get_file(path, name, sizeof(name)) < 0 ||
		    strcmp(name, port_name) != 0)
			continue;
		t = text_in(node, cap);
		text_add(&t, "/dev/");
		text_add(&t, entry->d_name);
		found = true;
	}
	if (dir)
		closedir(dir);
	return found;
}

static int open_port(void)
{
	struct pollfd wait = { .fd = the.uevents, .events = POLLIN };
	uint64_t until = mono_ns() + (uint64_t)PORT_MS * 1000000u;
	char node[64], drain[4096];

	while (!find_port(node, sizeof(node))) {
		uint64_t now = mono_ns();
		if (now >= until) {
			errno = ETIMEDOUT;
			give_up("the port org.hutch.agent");
		}
		poll(&wait, 1, (int)((until - now) / 1000000 + 1));
		while (recv(the.uevents, drain, sizeof(drain), MSG_DONTWAIT) > 0)
			;
	}
	return open(node, O_RDWR | O_NONBLOCK | O_CLOEXEC);
}

int boot(void)
{
	int fd;

	umask(0);
	leave_first_root();
	mount_all();
	open_console();
	reboot(RB_DISABLE_CAD);
	the.uevents = open_uevents();
	if (the.uevents < 0)
		give_up("uevents");
	load_modules();
	fd = open_port();
	if (fd < 0)
		give_up("the port");
	return fd;
}
