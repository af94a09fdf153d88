"""SAM2's image encoder on a CPU: samq's engines beside those of other tools; see `__main__`."""
