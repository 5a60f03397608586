"""Energy budgets: each layer's gradient is limited to a share of the norm of its output at the same step.

For any training loop three lines:

    clip = energy_budget_clip(model)
    ...
    loss.backward(); clip(); optimizer.step()

`clip` has that limit and `monitor_ebc_ratio`, which measures the same ratios and changes nothing; `record`
the forward hooks that keep one number for each layer on the device. Idea and names of the two functions:
github.com/zeusindomitable-max/ebc-clip.
"""
