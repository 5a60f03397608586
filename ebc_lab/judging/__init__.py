"""What runs that somebody else trained can say: read, compared with intervals, and judged (docs/judge.md).

`readers` turn what lies in files into rows; `columns` finds which column is which; `runs` makes one table of
runs and their curves of them; everything else is a view of that table. Nothing is trained, and torch is not
imported.
"""
