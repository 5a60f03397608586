"""Measurements on this machine: automatic speed settings, benchmarks, doctor (docs/running.md).

`pairs` compares loops that take turns: the lab's (`loops`) and the one a user would write (`plain_loop`);
`compared` has the sections that are such comparisons. `shares` says where a step's time goes, `costs` what a
run costs in addition to its steps and how close it comes to the machine's peak, `memory` what it holds;
`measure` does all of it for `ebc-lab bench`. Importing this package imports no torch.
"""
