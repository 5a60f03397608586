"""A user's own suites, and own parts: functions outside this package, named by targets."""
