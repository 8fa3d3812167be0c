"""From a checked program to a plan; nothing here runs on a device.

- `graph`: the graph of stages, with a node for each branch of a sweep.
- `fingerprint`: a digest of everything that decides a node's result.
- `file_digests`: digests of the files that a spec names.
- `changes`: what differs between two fingerprints, in words.
- `stage_states`: what a run would do with each node, by what the store holds.
- `plan`: the plan as plain data.
- `models`: architectures and their counts.
- `layout`: meshes, micro-batches and memory of each stage.
- `costs`: estimates of a step's memory and time.
- `drawing`: drawings of the graph.
"""
