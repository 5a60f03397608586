"""User-defined suites and parts. Such a part is a function outside this package, named by a target."""
