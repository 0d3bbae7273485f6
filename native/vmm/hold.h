/* The roles of hutch-vmm beside its main one. */
#ifndef HUTCH_VMM_HOLD_H
#define HUTCH_VMM_HOLD_H

/* hold.c: keep a template's memory for `seconds` after the last caller; return the exit code. */
int hold_memory(const char *seconds);

/* probe.c: run the plan in file `plan` as a further process of the machine whose run directory
 * is `directory`; return its exit code. */
int probe_guest(const char *directory, const char *plan);

#endif
