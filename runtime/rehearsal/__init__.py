"""Compiles a stage's programs for hardware that need not be here.

- `rehearse`: compiles the programs of a stage, and finds remedies for those that do not fit.
- `topologies`: descriptions of absent devices for XLA's compilers.
- `collectives`: reads the collectives of a compiled program.
"""
