"""What a user hands over, and what may be wrong with it.

`bases` are the optimizers, `capture` keeps the training forwards, `checks` and `rows` look at batches and cut
them, and `first` compares the first steps with what it works out by itself.
"""
