"""Compiles a stage's programs for hardware that need not be here.

- `rehearse`: compiles the programs of a stage, and says what would make them fit.
- `topologies`: devices of other machines, as XLA's compilers know them.
- `collectives`: exchanges between devices in a compiled program.
"""
