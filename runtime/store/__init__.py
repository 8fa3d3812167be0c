"""Results on disk: stages by fingerprint, and runs.

- `run_store`: the store: folders of stages, the index of runs.
- `atomic_files`: files that are replaced atomically, lines that are appended completely.
- `locks`: locks between processes, and who holds them.
- `export_manifest`: the folder of an export, and the files that the stage wrote.
"""
