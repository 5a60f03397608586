"""Many runs: what to run, where it is kept, who runs it, and what the results decide. Never imports torch."""
