"""What a model's layers are really given, and what follows from it for a recipe."""
