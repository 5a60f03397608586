"""What `ebc-lab train` takes over from Hydra: its flags, and its launchers for multirun."""
