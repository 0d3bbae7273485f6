/* The configuration: a memfd, every length of it checked before anything is started. */
#include <sys/mman.h>
#include <sys/stat.h>

#include "vmm.h"

static bool load(struct config *c)
{
	struct stat st;
	size_t got = 0;

	if (fstat(FD_CONFIG, &st) < 0 || st.st_size <= 0 || st.st_size > MAX_CONFIG)
		return false;
	c->size = (size_t)st.st_size;
	c->memory = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (c->memory == MAP_FAILED) {
		c->memory = NULL;
		return false;
	}
	while (got < c->size) {
		ssize_t n = pread(FD_CONFIG, c->memory + got, c->size - got, (off_t)got);
		if (n <= 0)
			return false;
		got += (size_t)n;
	}
	close(FD_CONFIG);
	return true;
}

/* Check a list of strings and leave a reader at its count. */
static uint32_t take_list(struct reader *r, struct reader *list)
{
	uint32_t count;

	*list = *r;
	count = read_count(r);
	for (uint32_t i = 0; i < count && !r->bad; i++)
		read_str(r);
	list->end = r->at;
	return count;
}

bool config_load(struct config *c, const char **problem)
{
	struct reader r;
	uint32_t arguments;

	*problem = "its size";
	if (!load(c))
		return false;
	r = (struct reader){ .at = c->memory, .end = c->memory + c->size };
	*problem = "the head";
	if (c->size < 28 || memcmp(c->memory, "HVC1", 4) != 0)
		return false;
	read_u32(&r);
	if (read_u32(&r) != c->size)
		return false;
	c->flags = read_u32(&r);
	c->fds = read_u32(&r);
	c->boot_ms = read_u32(&r);
	c->shutdown_ms = read_u32(&r);
	c->unacked = read_u32(&r);
	if (r.bad || c->fds > MAX_QEMU_FDS || (c->flags & ~(uint32_t)CONFIG_ALL) ||
	    c->unacked > STDIN_WINDOW || (config_has_control(c) && !c->fds))
		return false;
	*problem = "the command";
	arguments = take_list(&r, &c->argv);
	take_list(&r, &c->env);
	if (r.bad || !arguments)
		return false;
	*problem = "the setup or the plan";
	c->setup = read_bytes(&r, &c->setup_len);
	c->plan = read_bytes(&r, &c->plan_len);
	if ((c->flags & CONFIG_ADOPT) && c->plan_len > FRAME_MAX)
		return false;
	return !r.bad && r.at == r.end && c->setup_len <= MAX_PLAN && c->plan_len <= MAX_PLAN;
}

bool config_has_control(const struct config *c)
{
	return c->flags & (CONFIG_CONSOLE | CONFIG_CONTROL);
}

int config_first_fd(const struct config *c)
{
	return config_has_control(c) ? FD_CONTROL + 1 : FD_QEMU;
}

void config_free(struct config *c)
{
	if (c->memory)
		munmap(c->memory, c->size);
	c->memory = NULL;
	c->setup = c->plan = NULL;
}
