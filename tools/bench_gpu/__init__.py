"""Every way to run an image encoder on an NVIDIA GPU, measured by one script; see `samq.tools.bench_gpu.__main__`."""
