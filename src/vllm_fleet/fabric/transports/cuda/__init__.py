"""What GPU transports are made of: the CUDA driver, and kernels that copy and check runs of bytes."""
