"""Tables and pictures of a study, rebuilt from its files alone."""
