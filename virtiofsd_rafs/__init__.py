"""virtiofsd-rafs: a virtio-fs vhost-user back-end for RAFS images that are still remote."""

__version__ = "0.1.0"
