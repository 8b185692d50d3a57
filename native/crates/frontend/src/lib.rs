//! A vhost-user front-end without a VM: owns guest memory, plays rings.
