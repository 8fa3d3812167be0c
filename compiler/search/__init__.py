"""The search for the best layout of a stage.

- `meshes`: the meshes that are legal for a stage.
- `layout_search`: the layouts that fit, best first.
- `remedies`: changes that would make a stage fit.
- `sweep_fusion`: whether one program trains the branches of a sweep.
- `plan_layouts`: layouts of all stages of a plan, and the plan's text about them.
"""
