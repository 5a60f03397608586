"""What a user hands over, and what may be wrong with it: `bases`, `checks` of batches, `forwards`."""
