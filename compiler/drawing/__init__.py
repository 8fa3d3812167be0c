"""The stage graph as text, Mermaid, DOT and SVG."""
