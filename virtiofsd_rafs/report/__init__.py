"""What a daemon's trace says about a boot, as data, as text and as one page to look at. No I/O."""
