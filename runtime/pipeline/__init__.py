"""Runs a plan: stage by stage, with what the stages share."""
