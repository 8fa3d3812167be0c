"""The commands of `tune`, and how they show things to people."""
