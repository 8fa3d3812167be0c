"""Where a stage's arrays lie: devices, meshes, and the search for the best layout.

- `hardware`: chips and devices as data, with the sources of the figures.
- `stage_layout`: a layout, and its memory by phases of a step.
- `layout_query`: what a layout is searched for, and why there may be none.
- `kernels`: the choice of the attention kernel.
- `meshes`: the meshes that are legal for a stage.
- `layout_search`: the layouts that fit, best first.
- `remedies`: changes that would make a stage fit.
- `sweep_fusion`: whether one program trains the branches of a sweep.
- `plan_layouts`: layouts of all stages of a plan, and what the plan says of them.
"""
