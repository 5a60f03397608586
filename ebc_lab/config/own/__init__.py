"""A user's own parts: functions outside this package, found by their targets and among installed packages."""
