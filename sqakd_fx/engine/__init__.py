"""How a training step runs on the machine: compilation, CUDA graphs, processes, memory, signals."""
