"""Pictures of the arms that a study compares, alone and together."""
