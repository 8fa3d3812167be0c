"""Runs plans, and holds the command line."""
