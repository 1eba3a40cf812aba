"""Reading, keeping and analysing traces; needs neither torch nor CUDA."""
