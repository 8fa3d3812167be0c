"""From a checked `Program` and a description of hardware to a `Plan`. Runs nothing on a device."""
