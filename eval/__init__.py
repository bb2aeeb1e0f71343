"""Runs a pipeline under observation."""
