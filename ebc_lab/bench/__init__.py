"""Speed, overhead, fixed costs and memory of a run, measured in this process (DESIGN.md section 9, docs/speed.md).

`pairs` compares loops that take turns; `loops` holds those of the lab, `ebc_lab.plain` the one a user would write; `shares`
says where a step's time goes, `costs` what a run costs beside its steps, `compute` how near to the machine's peak it comes,
`memory` what is held; `measure` does all of it for `ebc-lab bench`.
"""

from .pairs import overhead_and_record, paired_overhead

__all__ = ["overhead_and_record", "paired_overhead"]
