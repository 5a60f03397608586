"""Suites and parts defined by the user. Such a part is a function outside this package, named by its
target."""
