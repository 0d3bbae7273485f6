/* The instance's log file: see docs/reference/log-format.md. */
#ifndef HUTCH_LOG_H
#define HUTCH_LOG_H

#include <stddef.h>
#include <stdint.h>

struct log {
	int fd; /* -1: no log */
	const char *path;
	uint64_t size, max_bytes;
	uint32_t max_files;
};

int log_open(struct log *log); /* also: open the path anew */
void log_write(struct log *log, int stream, uint64_t time_ns, const char *data, size_t n);

#endif
