"""From a recipe to a checkpoint: recipe → plan → job → verify."""
