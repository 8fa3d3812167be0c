"""Drawings of the stage graph.

- `draw`: what a drawing shows, and its forms as text, Mermaid and Graphviz.
- `svg`: the same as a picture.
"""
