"""What a user hands over: optimizers (`bases`) and batches (`checks`), and what is wrong with some of them."""
