/* The link to the starter: how far the machine is, and its GO. */
#include <sys/socket.h>

#include "vmm.h"

static void starter_left(struct vmm *v)
{
	close(v->status);
	v->status = -1;
	if (!machine_is_up(v))
		machine_lost(v, PART_QEMU, ECANCELED, "the starter left");
}

/* All that is ever said fits into the socket's buffer: nobody waits for the starter. */
void status_send(struct vmm *v, uint8_t type, uint8_t flag, const void *data, size_t n)
{
	uint8_t frame[FRAME_HEAD + 12 + MAX_TEXT] = { type, flag };

	if (v->status < 0 || n > sizeof(frame) - FRAME_HEAD)
		return;
	put_u32(frame + 4, (uint32_t)n);
	if (n)
		memcpy(frame + FRAME_HEAD, data, n);
	(void)!send(v->status, frame, FRAME_HEAD + n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Take a GO once it is whole: false for anything else. It may tell what of its input the
 * process has not taken, where that was not known yet when the monitor was started. */
static bool take_go(struct vmm *v)
{
	uint32_t length = get_u32(v->status_head + 4);

	if (v->status_head[0] != STATUS_GO || (length != 0 && length != GO_UNACKED))
		return false;
	if (v->status_len < FRAME_HEAD + length)
		return true;
	v->status_len = 0;
	if (length && get_u32(v->status_head + FRAME_HEAD) > STDIN_WINDOW)
		return false;
	if (length)
		v->config.unacked = get_u32(v->status_head + FRAME_HEAD);
	if (v->stage == ST_HELD)
		machine_greet(v);
	return true;
}

void status_read(struct vmm *v)
{
	size_t want = FRAME_HEAD;
	ssize_t n;

	if (v->status_len >= FRAME_HEAD)
		want = FRAME_HEAD + GO_UNACKED;
	n = recv(v->status, v->status_head + v->status_len, want - v->status_len, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		starter_left(v);
		return;
	}
	v->status_len += (uint8_t)n;
	if (v->status_len >= FRAME_HEAD && !take_go(v))
		starter_left(v); /* it does not speak our language */
}
