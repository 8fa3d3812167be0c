"""Rules that compare values with each other and with what stands outside the spec."""
