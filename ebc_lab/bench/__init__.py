"""Measurements on this machine: automatic speed settings, benchmarks, doctor (docs/running.md).

`measure` has the list of sections of `ebc-lab bench`, most of which are in `pairs` and `compared`: loops that
take turns, the lab's (`loops`) and the one a user would write (`plain_loop`). `shares` says where a step's
time goes, `costs` what a run costs in addition to its steps and how close it comes to the machine's peak,
`memory` what it holds. `speeds` chooses precision, threads and compiling by what `step_timer` measures, in
processes of their own (`child`). Importing this package imports no torch.
"""
