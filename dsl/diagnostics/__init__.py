"""What is wrong with a spec, as data; its codes, and its rendering as text."""
