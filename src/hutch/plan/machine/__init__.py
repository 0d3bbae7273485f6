"""Virtual machines: typed pieces and the argument list of QEMU they make (pure)."""
