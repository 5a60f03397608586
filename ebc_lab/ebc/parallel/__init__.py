"""One model trained by several processes: what they agree on (`workers`), and weights in parts (`shards`)."""
