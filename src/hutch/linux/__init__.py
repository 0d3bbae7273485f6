"""The Linux kernel's interfaces: one function per system call, and the files of /proc and
/sys that are interfaces too. The only home of ctypes. Import the modules, not this package."""
