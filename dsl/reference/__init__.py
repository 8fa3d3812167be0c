"""The language's own documentation: `tune explain`, the JSON schema, resolved specs as text."""
