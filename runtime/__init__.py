"""Runs plans, and holds the command line.

- `cli`: options, and one call a command.
- `errors`: errors that several sub-packages raise or catch.
- `sharding`: logical axes to mesh axes.
- `hub`: folders of published models, fetched where they are missing.
- `user_functions`: a user's Python functions in compiled programs.

The sub-packages and their order are in `ARCHITECTURE.md`.
"""
