"""A checked spec to a plan for the devices of this machine or others."""
