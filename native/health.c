/* The health probe: an exec plan, run on a timer by another launcher. */
#include "supervisor.h"

void health_start(struct supervisor *s)
{
	(void)s;
}

void health_stop(struct supervisor *s)
{
	(void)s;
}

void health_tick(struct supervisor *s, uint64_t now)
{
	(void)s;
	(void)now;
}

void health_read(struct supervisor *s)
{
	(void)s;
}

uint64_t health_deadline(const struct supervisor *s)
{
	(void)s;
	return 0;
}
