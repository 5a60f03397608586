"""Files of other people, changed at random: see `__main__.py`."""
