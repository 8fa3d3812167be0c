"""`python -m tunelang.runtime`: the command line where another package's `tune` is in front."""

from tunelang.runtime.cli import main

main()
