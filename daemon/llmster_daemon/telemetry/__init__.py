"""What a machine has and what it is doing: GPUs through NVML, CPU and memory through the system."""
