"""Conformance of virtio-fs back-ends: checks as data, each with what the specification says.

``check`` declares them, ``subject`` is what they are run against, ``catalogue`` has them all, ``runner`` runs
them one by one, ``report`` compares back-ends. Run by ``scripts/conformance``, and by pytest for the daemon.
"""
