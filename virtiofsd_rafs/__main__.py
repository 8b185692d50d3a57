"""``python -m virtiofsd_rafs`` is the console script."""

from virtiofsd_rafs.cli import main

main()
