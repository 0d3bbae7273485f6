/* The health probe: an exec plan, run on a timer by another launcher, whose starter we
 * are. The container's pidfd is the plan's slot 0. */
#include <sys/mman.h>
#include <sys/socket.h>

#include "supervisor.h"
#include "text.h"

enum { STARTING, HEALTHY, UNHEALTHY };

static const char *const names[] = { "starting", "healthy", "unhealthy" };

static void add_probe(struct text *t, const struct probe *p)
{
	text_add(t, "{\"start_ns\":");
	text_add_num(t, (int64_t)p->begun_ns);
	text_add(t, ",\"end_ns\":");
	text_add_num(t, (int64_t)p->ended_ns);
	text_add(t, ",\"exit_code\":");
	text_add_num(t, p->code);
	text_add(t, ",\"output\":");
	text_add_json(t, p->output.len ? p->output.data + p->output.off : "", p->output.len);
	text_add(t, "}");
}

static void write_record(struct supervisor *s)
{
	size_t cap = 256 + HEALTH_KEPT * (6 * HEALTH_OUTPUT + 256);
	char *memory = mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct health *h = &s->health;
	struct text t;

	if (memory == MAP_FAILED)
		return;
	t = text_in(memory, cap);
	text_add(&t, "{\"status\":\"");
	text_add(&t, names[h->status]);
	text_add(&t, "\",\"failing_streak\":");
	text_add_num(&t, h->failures);
	text_add(&t, ",\"log\":[");
	for (uint32_t i = 0; i < h->kept; i++) {
		if (i)
			text_add(&t, ",");
		add_probe(&t, &h->probes[i]);
	}
	text_add(&t, "]}\n");
	record_write(s, "health", t.at, t.len);
	munmap(memory, cap);
}

static void keep(struct health *h)
{
	if (h->kept == HEALTH_KEPT) {
		buffer_free(&h->probes[0].output);
		memmove(h->probes, h->probes + 1, sizeof(h->probes[0]) * (HEALTH_KEPT - 1));
		h->kept--;
	}
	h->probes[h->kept++] = h->current;
	memset(&h->current, 0, sizeof(h->current));
}

/* A failure before the first success does not count while the start period lasts. */
static void judge(struct health *h, const struct health_plan *plan, bool good)
{
	if (good) {
		h->status = HEALTHY;
		h->failures = 0;
		return;
	}
	if (h->status == STARTING && mono_ns() - h->started_ns < plan->start_period_ns)
		return;
	h->failures++;
	if (h->failures >= (plan->retries ? plan->retries : 1))
		h->status = UNHEALTHY;
}

/* A program that begins is looked at more often, until it is healthy or its time is over. */
static uint64_t pause_ns(const struct health *h, const struct health_plan *plan)
{
	if (h->status == STARTING && mono_ns() - h->started_ns < plan->start_period_ns)
		return plan->start_interval_ns;
	return plan->interval_ns;
}

static void probe_ended(struct supervisor *s, int32_t code)
{
	struct health *h = &s->health;
	uint8_t before = h->status;

	close(h->fd); /* a probe that still runs is killed by this */
	h->fd = -1;
	h->current.ended_ns = now_ns();
	h->current.code = code;
	keep(h);
	judge(h, &s->plan.health, code == 0);
	h->next_ns = mono_ns() + pause_ns(h, &s->plan.health);
	write_record(s);
	if (h->status != before)
		tell_all(s, FR_HEALTH, 0, names[h->status], strlen(names[h->status]));
}

static int plan_in_memfd(const struct health_plan *plan)
{
	int fd = sys_memfd_create("hutch-plan", 1 /* MFD_CLOEXEC */);

	if (fd >= 0 && write_all(fd, plan->plan, plan->plan_len) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

/* In the new process: put the descriptors where a launcher expects them. */
static _Noreturn void become_launcher(int plan, int sock, int pidfd)
{
	static char name[] = "hutch-health";
	char *argv[] = { name, NULL }, *env[] = { NULL };
	int from[3] = { plan, sock, pidfd };

	for (int i = 0; i < 3; i++)
		from[i] = fcntl(from[i], F_DUPFD_CLOEXEC, 64);
	for (int i = 0; i < 3; i++)
		if (from[i] < 0 || dup2(from[i], 3 + i) < 0)
			_exit(127);
	execve("/proc/self/exe", argv, env);
	_exit(127);
}

static void launch_probe(struct supervisor *s)
{
	static const uint8_t attach[FRAME_HEAD] = { FR_ATTACH, ATTACH_STDOUT | ATTACH_STDERR };
	struct health *h = &s->health;
	int plan = plan_in_memfd(&s->plan.health), ends[2] = { -1, -1 };

	h->current.begun_ns = now_ns();
	h->deadline_ns = mono_ns() + s->plan.health.timeout_ns;
	h->next_ns = mono_ns() + pause_ns(h, &s->plan.health); /* should this launch fail */
	if (plan >= 0 && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0) {
		(void)!write(ends[0], attach, sizeof(attach));
		fcntl(ends[0], F_SETFL, O_RDWR | O_NONBLOCK);
		h->launcher = fork();
		if (h->launcher == 0)
			become_launcher(plan, ends[1], s->pidfd);
		if (h->launcher > 0)
			h->fd = ends[0];
		else
			close(ends[0]);
		close(ends[1]);
	}
	h->head_len = h->body_len = h->left = 0;
	if (plan >= 0)
		close(plan);
}

void health_start(struct supervisor *s)
{
	struct health *h = &s->health;

	if (!s->plan.health.set)
		return;
	h->started_ns = mono_ns();
	h->next_ns = h->started_ns + pause_ns(h, &s->plan.health);
	write_record(s);
}

void health_stop(struct supervisor *s)
{
	struct health *h = &s->health;

	if (h->fd >= 0)
		close(h->fd);
	h->fd = -1;
	h->next_ns = 0;
	if (h->launcher > 0)
		waitpid(h->launcher, NULL, 0);
	h->launcher = 0;
}

void health_tick(struct supervisor *s, uint64_t now)
{
	struct health *h = &s->health;

	if (!h->next_ns)
		return;
	if (h->launcher > 0 && waitpid(h->launcher, NULL, WNOHANG) != 0)
		h->launcher = 0;
	if (h->fd >= 0 && now >= h->deadline_ns) {
		static const char late[] = "the probe took too long";
		buffer_put(&h->current.output, late, sizeof(late) - 1, 2 * HEALTH_OUTPUT);
		probe_ended(s, -1);
	} else if (h->fd < 0 && now >= h->next_ns && s->pidfd >= 0) {
		launch_probe(s);
	}
}

uint64_t health_deadline(const struct supervisor *s)
{
	const struct health *h = &s->health;

	return !h->next_ns ? 0 : h->fd >= 0 ? h->deadline_ns : h->next_ns;
}

static void take_output(struct health *h, const uint8_t *data, size_t n)
{
	size_t room = HEALTH_OUTPUT - h->current.output.len;

	if (h->current.output.len < HEALTH_OUTPUT)
		buffer_put(&h->current.output, data, n < room ? n : room, HEALTH_OUTPUT);
}

/* Take a piece of a frame's payload; true when the probe is over. */
static bool take_payload(struct supervisor *s, const uint8_t *data, size_t n)
{
	struct health *h = &s->health;

	if (h->head[0] == FR_OUTPUT)
		take_output(h, data, n);
	for (size_t i = 0; i < n && h->body_len < sizeof(h->body); i++)
		h->body[h->body_len++] = data[i];
	h->left -= (uint32_t)n;
	if (h->left)
		return false;
	h->head_len = 0;
	if (h->head[0] == FR_EXIT)
		probe_ended(s, (int32_t)get_u32(h->body));
	else if (h->head[0] == FR_FAILED)
		probe_ended(s, 126);
	else
		return false;
	return true;
}

void health_read(struct supervisor *s)
{
	struct health *h = &s->health;
	uint8_t data[2048];

	while (h->fd >= 0) {
		bool in_head = h->head_len < FRAME_HEAD;
		size_t want = in_head ? FRAME_HEAD - h->head_len
			    : h->left < sizeof(data) ? h->left : sizeof(data);
		ssize_t n = recv(h->fd, in_head ? h->head + h->head_len : data, want, MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0) {
			probe_ended(s, 125);
			return;
		}
		if (!in_head) {
			if (take_payload(s, data, (size_t)n))
				return;
			continue;
		}
		h->head_len += (uint32_t)n;
		if (h->head_len < FRAME_HEAD)
			continue;
		h->left = get_u32(h->head + 4);
		h->body_len = 0;
		if (!h->left)
			h->head_len = 0;
	}
}
