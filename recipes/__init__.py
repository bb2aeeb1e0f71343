"""Recipes, profiles and the bundled tiny model: data only."""
