"""For each room with Triton kernels, the calls of its launchers that are compiled."""
