"""Accuracy of samq's methods beside its peers', measured by one script; see `samq.tools.bench_accuracy.__main__`."""
