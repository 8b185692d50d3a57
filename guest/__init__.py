"""What boots a guest from an image and watches it: kernels, the guest kit, QEMU, a slow link, a registry."""
