"""The scripts that `evaluate.load` reads; `hf_ext.metrics.path` says where each one is."""
