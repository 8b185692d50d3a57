//! FUSE wire structures as the Linux kernel sends them (include/uapi/linux/fuse.h).
