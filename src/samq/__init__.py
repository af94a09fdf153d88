"""samq: 4-bit Segment Anything, from a checkpoint to a checked, deployable engine."""

__version__ = "0.1.0"
