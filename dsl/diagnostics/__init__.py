"""Errors and warnings as data, the registry of their codes, and their rendering.

- `diagnostic`: one error or warning with its places and fixes; their collection.
- `codes`: the registry of codes, with an explanation of each (`codes.md`).
- `tune_error`: the base of errors that a run reports, with their facts and place.
- `render`: diagnostics as text for a terminal, and as JSON for editors.
"""
