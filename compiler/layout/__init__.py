"""Layouts as data: the devices that there are, the question to the search and its answer.

- `hardware`: chips and devices as data, with the sources of the figures.
- `stage_layout`: a layout, and its memory by phases of a step.
- `layout_query`: the question that a layout answers, and the errors where there is none.
- `kernels`: the choice of the attention kernel.
"""
