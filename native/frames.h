/* The frames between a supervisor and its clients. */
#ifndef HUTCH_FRAMES_H
#define HUTCH_FRAMES_H

/* Frames: u8 type, u8 flag, u16 zero, u32 length, payload. See docs/reference/supervisor.md. */
enum frame {
	FR_GO = 1, FR_ATTACH, FR_STDIN, FR_STDIN_EOF, FR_RESIZE, FR_SIGNAL, FR_WAIT, FR_QUERY,
	FR_LOG_REOPEN, FR_SHUTDOWN, FR_DETACH, FR_PLAN,
	FR_PID = 65, FR_SYNC, FR_STARTED, FR_FAILED, FR_OUTPUT, FR_GAP, FR_EXIT, FR_STATE, FR_HEALTH,
	FR_OK, FR_ERR, FR_ACK
};

enum { ATTACH_STDIN = 1, ATTACH_STDOUT = 2, ATTACH_STDERR = 4, ATTACH_LOSSLESS = 8 };
enum { QUERY_LOGGED = 1 };

enum {
	FRAME_HEAD = 8,
	FRAME_MAX = 64 << 10,
	STDIN_WINDOW = 64 << 10, /* unacknowledged input of a client */
};

#endif
