"""Where a stage's arrays lie: devices, meshes, and the search for the best of them."""
