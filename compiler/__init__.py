"""From a checked program to a plan; nothing here runs on a device.

- `graph`: the graph of stages, with a node for each branch of a sweep.
- `fingerprint`: a digest of everything that decides a node's result.
- `file_digests`: digests of the files that a spec names.
- `changes`: what differs between two fingerprints, in words.
- `stage_states`: what a run would do with each node, by what the store holds.
- `plan`: the plan as plain data.
- `models`: architectures and their counts.
- `layout`: layouts and devices as data.
- `costs`: estimates of the memory and the time of a step in a layout.
- `search`: the search for the best layout of each stage.
- `drawing`: drawings of the graph.
"""
