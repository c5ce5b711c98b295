"""What `generate()` does on a PagedCache beyond calling the model: decode steps as CUDA graphs."""
